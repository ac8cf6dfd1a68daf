#!/usr/bin/env python3
"""Our bridge and Megatron-Core's released one, side by side on an emulated cluster.

    sudo python benchmarks/bench_bridge.py --quick
    sudo python benchmarks/bench_bridge.py --layouts tp4-tp4,dp4-tp4 --sizes 4,16 --json out/bridge.json

Every rank has a network card of its own (network namespaces and token buckets, see emulation.py). Both communicators
work on the same ranks in turns; a ratio is the quotient of two neighbouring times. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P

from busy import undisturbed
from cases import FAMILIES, KIB, LAYOUTS, METHODS, Case, by_cluster, select
from command_line import parsed, parser_of, status_of
from emulation import EmulatedCluster, EmulationUnavailable, Loopback
from ranks import RankFailed, RankPool, rank_pool
from records import Measurement, measurement, slower, table, write_json
from released import ReleasedUnavailable, require_released

PAUSE_S = 10.0  # before a case is measured again


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, quick="fewer sizes and repeats: under five minutes", repeats=(9, 5))
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw them to FILE")
    parser.add_argument(
        "--layouts",
        type=_list_of(str),
        default=[],
        help=f"source-destination, by commas (default: {','.join(LAYOUTS)})",
    )
    parser.add_argument("--sizes", type=_list_of(_bytes), default=[], help="payloads in MiB, or as 16k, by commas")
    parser.add_argument("--families", type=_list_of(str), default=list(FAMILIES), help="default: " + ",".join(FAMILIES))
    parser.add_argument(
        "--methods", type=_list_of(str), default=[], help=f"of ours: {','.join(METHODS)} (default: the first two)"
    )
    options = parsed(parser, arguments)
    try:
        options.cases = select(
            quick=options.quick,
            layouts=options.layouts,
            sizes=options.sizes,
            families=options.families,
            methods=options.methods,
        )
    except ValueError as error:
        parser.error(str(error))
    return options


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return [kind(item) for item in text.split(",") if item]

    parse.__name__ = "list"  # for argparse's message
    return parse


def _bytes(text: str) -> int:
    """ "4" -> 4 MiB, "16k" -> 16 KiB."""
    return int(text[:-1]) * KIB if text.endswith("k") else int(float(text) * KIB * KIB)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    # As Ctrl-C: the namespaces are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return status_of(
        partial(report, options), skipped=(EmulationUnavailable, ReleasedUnavailable), failed=(RankFailed,)
    )


def report(options: argparse.Namespace) -> int:
    """Measure, and tell."""
    started = time.monotonic()
    require_released()
    measurements = run(options.cases, options.repeats, options.ignore_busy)
    print(table(measurements))
    print(
        f"\n{options.repeats} pairs each, {time.monotonic() - started:.0f} s in all. Not GPU or NCCL figures: gloo on "
        f"{os.cpu_count()} cores, where a broadcast is a binomial tree (NCCL's is a ring).\n"
        "Efficiency = what the links need at least / the time taken; it depends on no other program."
    )
    records = [item.record for item in measurements]
    if lost := slower(records):
        print("Smallest ratio below 0.97: " + "; ".join(lost))
    if options.json:
        write_json(records, options.json)
    if options.png:
        from picture import draw

        draw(records, options.png)
    return 0


def run(cases: Sequence[Case], repeats: int, ignore_busy: bool) -> list[Measurement]:
    """All cases, one cluster after the other.

    Raises:
        EmulationUnavailable, RankFailed: see there.
        MachineBusy: other work disturbed a case again and again.
    """
    measurements: list[Measurement] = []
    for same in by_cluster(cases):
        first = same[0]
        emulated = EmulatedCluster(first.hosts, first.rates) if first.emulated else Loopback(first.world_size)
        with emulated as cluster, rank_pool(cluster) as pool:
            for case in same:
                measurements += measure(pool, case, repeats, ignore_busy)
    return measurements


def measure(pool: RankPool, case: Case, repeats: int, ignore_busy: bool) -> list[Measurement]:
    """One case; again, where other work was busy."""
    import transfers

    times, busy = undisturbed(
        f"{case.family} {case.layout}",
        lambda: pool.call(transfers.run_case, case, repeats, timeout=_patience_s(case, repeats)),
        ignore_busy,
        used=lambda ranks: [rank.usage for rank in ranks],
        pause_s=PAUSE_S,
    )
    # From the first rank that begins to the last that ends; of one microbatch.
    seconds = {
        method: [
            (max(rank.runs[method][repeat][1] for rank in times) - min(rank.runs[method][repeat][0] for rank in times))
            / case.microbatches
            for repeat in range(repeats)
        ]
        for method in (transfers.RELEASED, *case.methods)
    }
    found = [
        measurement(
            case.family,
            case.layout,
            case.num_bytes,
            method,
            released_s=seconds[transfers.RELEASED],
            method_s=seconds[method],
            bound_s=None if case.is_small else case.bound_s(method) / case.microbatches,
            busy=busy,
        )
        for method in case.methods
    ]
    for item in found:
        record = item.record
        print(
            f"{record.name} {record.layout} {record.bytes} bytes, {record.method}: {record.ratio_median:.2f}x",
            file=sys.stderr,
        )
    return found


def _patience_s(case: Case, repeats: int) -> float:
    """Far more than any method should take, and far less than for ever."""
    return 60 + 40 * (repeats + 2) * (len(case.methods) + 1) * max(0.2, case.bound_s(case.methods[0]))


if __name__ == "__main__":
    sys.exit(main())
