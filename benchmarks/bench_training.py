#!/usr/bin/env python3
"""The example's training step with our communicator and with Megatron-Core's released one, on an emulated cluster.

    sudo python benchmarks/bench_training.py --quick
    sudo python benchmarks/bench_training.py --layouts "images: tp=4; language: tp=4" --json out/training.json

The same model, weights and data over either communicator, in turns. Both train to the same losses first, or nothing is
reported. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from bench_bridge import PAUSE_S
from busy import undisturbed
from command_line import parsed, parser_of, status_of
from emulation import EmulatedCluster, EmulationUnavailable, Rates
from ranks import RankFailed, RankPool, rank_pool
from records import Measurement, measurement, slower, table, write_json
from released import ReleasedUnavailable, require_released

if TYPE_CHECKING:
    from training import Measured

    from mimo_ext.timeline import RankTimeline

COMMUNICATION_BOUND, COMPUTE_BOUND = "communication-bound", "compute-bound"
RATES = {COMMUNICATION_BOUND: Rates(10, 1440), COMPUTE_BOUND: Rates(200, 1440)}
QUICK_LAYOUTS = ("images: tp=2; language: tp=2",)
LAYOUTS = (*QUICK_LAYOUTS, "images: tp=4; language: tp=4")
BATCH, MICROBATCHES = 128, 4
PRELOADED = ("torch", "torch.distributed", "mimo_ext", "training")


class DifferentLosses(AssertionError):
    """The communicators do not train the same model."""


@dataclass(frozen=True)
class Case:
    """One layout of the example on links of some rates."""

    family: str
    layout: str
    batch: int = BATCH
    microbatches: int = MICROBATCHES

    @property
    def hosts(self) -> tuple[tuple[int, ...], ...]:
        """A host for each module."""
        from vlm_digits.layout import parse_layout

        return tuple(tuple(module.ranks) for module in parse_layout(self.layout).modules.values())

    @property
    def short_layout(self) -> str:
        """ "tp2-tp2", the encoder first."""
        from vlm_digits.layout import parse_layout

        modules = parse_layout(self.layout).modules
        sides = (
            [(name, getattr(modules[side], name)) for name in ("tp", "dp", "pp")] for side in ("images", "language")
        )
        return "-".join("".join(f"{name}{size}" for name, size in sizes if size > 1) or "tp1" for sizes in sides)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, quick="four ranks and fewer repeats: under a minute", repeats=(11, 5))
    parser.add_argument(
        "--layout",
        action="append",
        dest="layouts",
        help=f"of the example, a host for each module; may be given several times (default: {' and '.join(LAYOUTS)})",
    )
    parser.add_argument("--batch", type=int, default=BATCH, help="numbers per step (default: %(default)s)")
    parser.add_argument("--microbatches", type=int, default=MICROBATCHES, help="default: %(default)s")
    parser.add_argument("--timelines", type=Path, metavar="FOLDER", help="draw a step of each method to FOLDER")
    options = parsed(parser, arguments)
    layouts = options.layouts or (QUICK_LAYOUTS if options.quick else LAYOUTS)
    options.cases = [
        Case(family, layout, options.batch, options.microbatches) for family in RATES for layout in layouts
    ]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    # As Ctrl-C: the namespaces are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return status_of(
        partial(report, options),
        skipped=(EmulationUnavailable, ReleasedUnavailable),
        failed=(RankFailed, DifferentLosses),
    )


def report(options: argparse.Namespace) -> int:
    """Measure, and tell."""
    started = time.monotonic()
    require_released()
    measurements = run(options.cases, options.repeats, options.ignore_busy, options.timelines)
    print(table(measurements))
    rates = ", ".join(f"{family}: {rates.nic_mbit:g} Mbit/s" for family, rates in RATES.items())
    print(
        f"\n{options.repeats} pairs each, {time.monotonic() - started:.0f} s in all, {os.cpu_count()} cores. "
        f"A network card per rank, {rates}. Not GPU or NCCL figures.\n"
        "exposed-...: how long a rank waits in a step for bytes that had been handed in, on average over the ranks;\n"
        "efficiency there: the share of the step in which it does not."
    )
    records = [item.record for item in measurements]
    if lost := slower([record for record in records if record.name.startswith("training-")]):
        print("Smallest ratio below 0.97: " + "; ".join(lost))
    if options.json:
        write_json(records, options.json)
    return 0


def run(cases: Sequence[Case], repeats: int, ignore_busy: bool, timelines: Path | None = None) -> list[Measurement]:
    """All cases, each on a cluster of its own.

    Raises:
        EmulationUnavailable, RankFailed: see there.
        MachineBusy: other work disturbed a case again and again.
        DifferentLosses: the methods of a case differ in the losses of a short training.
    """
    measurements: list[Measurement] = []
    for case in cases:
        with EmulatedCluster(case.hosts, RATES[case.family]) as cluster, rank_pool(cluster, PRELOADED) as pool:
            measurements += measure(pool, case, repeats, ignore_busy, timelines)
    return measurements


def measure(
    pool: RankPool, case: Case, repeats: int, ignore_busy: bool, timelines: Path | None = None
) -> list[Measurement]:
    """One case; again, where other work was busy."""
    import training

    from mimo_ext.planning.links import Links

    rates = RATES[case.family]
    links = Links(
        nic=rates.nic_bytes_per_s,
        host=rates.nvl_bytes_per_s,
        latency=30e-6,
        overhead=20e-6,
        ranks_per_host=len(case.hosts[0]),
    )
    setting = training.Setting(case.layout, case.batch, case.microbatches, links)
    ranks, busy = undisturbed(
        f"{case.family} {case.layout}",
        lambda: pool.call(training.run, setting, repeats, timelines is not None, timeout=120 + 60 * repeats),
        ignore_busy,
        used=lambda ranks: [rank.usage for rank in ranks],
        pause_s=PAUSE_S,
    )
    found = measurements_of(case, ranks, busy)
    for item in found:
        print(f"{item.record.name} {item.record.method}: {item.record.ratio_median:.2f}x", file=sys.stderr)
    if timelines is not None:
        draw(case, ranks, timelines)
    return found


def measurements_of(case: Case, ranks: Sequence[Measured], busy: float | None) -> list[Measurement]:
    """Step times and exposed times of every method of ours, against the released communicator's.

    Raises:
        DifferentLosses: as `run`.
    """
    import training

    check_losses(case, ranks)
    seconds, exposed = {}, {}
    for method in ranks[0].steps:
        steps = [[rank.steps[method][index] for rank in ranks] for index in range(len(ranks[0].steps[method]))]
        # From the first rank that begins to the last that ends.
        seconds[method] = [(max(r.end_ns for r in step) - min(r.begin_ns for r in step)) / 1e9 for step in steps]
        exposed[method] = [exposed_s(step) for step in steps]
    about = {"layout": case.short_layout, "num_bytes": ranks[0].bytes, "bound_s": None, "busy": busy}
    found = []
    for what, times in (("training", seconds), ("exposed", exposed)):
        for method in training.METHODS:
            item = measurement(
                f"{what}-{case.family}",
                method=method,
                released_s=times[training.RELEASED],
                method_s=times[method],
                **about,
            )
            if what == "exposed":
                shares = [1 - e / s for e, s in zip(exposed[method], seconds[method], strict=True)]
                item = replace(item, record=replace(item.record, efficiency=round(statistics.median(shares), 3)))
            found.append(item)
    return found


def exposed_s(step: Sequence[RankTimeline]) -> float:
    """Seconds of a step in which a rank waited for bytes that had been handed in, on average over the ranks."""
    from mimo_ext.timeline import split_waits

    return statistics.fmean(timeline.seconds("exposed") for timeline in split_waits(step))


def check_losses(case: Case, ranks: Sequence[Measured]) -> None:
    """Raises DifferentLosses unless all methods have trained to the same losses, bit by bit."""
    import training

    expected = ranks[0].losses[training.RELEASED]
    for rank, measured in enumerate(ranks):
        for method, losses in measured.losses.items():
            if losses != expected or not all(math.isfinite(loss) for loss in losses):
                raise DifferentLosses(
                    f"{case.family} {case.layout}, rank {rank}, {method}: expected the losses {expected} of the "
                    f"released communicator, got {losses}"
                )


def draw(case: Case, ranks: Sequence[Measured], folder: Path) -> None:
    """A step of every method."""
    from mimo_ext import timeline

    for method in ranks[0].shown:
        title = f"{method}, {case.family}, {case.layout}"
        file = folder / f"{case.family}-{case.short_layout}-{method}.png"
        timeline.draw([rank.shown[method] for rank in ranks], file, title)


if __name__ == "__main__":
    sys.exit(main())
