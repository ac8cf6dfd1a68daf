#!/usr/bin/env python3
"""The fused rescale of gradients against the passes that it replaces: one thread, 256 MB of float32.

    python benchmarks/bench_rescale.py --quick --json out/rescale.json

Ours multiplies, sums the squares and looks for infinities in one pass over memory. The opponents are PyTorch's own
passes: `mul_` (no sum, no search), three of them, `mul_` and the norm, and a copy of the same bytes, which reads and
writes as much as ours does. Every repeat times all of them one after the other, in an order that rotates. See
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P

from busy import undisturbed
from command_line import check_positive, parsed, parser_of, status_of, told
from records import Measurement, Record, measurement, memory_table, write_json

MIB = 1 << 20
# Opponent's time / ours that has to be reached. One mul_ moves the same bytes: ours may take a tenth more.
LIMITS = {"fused_vs_mul": 1 / 1.10, "fused_vs_three_mul": 2.8, "fused_vs_mul_norm": 1.8}
GATED_DTYPE = "float32"
Times = dict[str, list[float]]  # seconds of each repeat, by what was run
DTYPES = ("float32", "bfloat16", "float16")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    options = memory_options(
        arguments, __doc__, quick="float32 alone, fewer repeats: a few seconds", mib=256, size_of="the buffer"
    )
    options.dtypes = DTYPES[:1] if options.quick else DTYPES
    return options


def memory_options(
    arguments: Sequence[str] | None, doc: str | None, *, quick: str, mib: int, size_of: str
) -> argparse.Namespace:
    """The options of a benchmark of passes over memory. `mib`: the default size of what `size_of` names."""
    parser = parser_of(doc, quick=quick, repeats=(25, 9))
    parser.add_argument("--mib", type=int, default=mib, help=f"size of {size_of} (default: %(default)s)")
    options = parsed(parser, arguments)
    check_positive(parser, options, "mib")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return status_of(partial(report, options))


def report(options: argparse.Namespace) -> int:
    """Measure, and tell."""
    measurements = [
        item
        for dtype in options.dtypes
        for item in measure(dtype, options.mib * MIB, options.repeats, options.ignore_busy)
    ]
    print(memory_table(measurements))
    records = [item.record for item in measurements]
    if options.json:
        write_json(records, options.json)
    return told(missed(records), f"All limits kept: {limits_text()}.")


def limits_text() -> str:
    return ", ".join(f"{name} >= {limit:.2f}" for name, limit in LIMITS.items())


def missed(records: Sequence[Record]) -> list[str]:
    """A line for each limit that was not reached."""
    return [
        f"missed: {record.name}: expected at least {LIMITS[record.name]:.2f}, got {record.ratio_median}"
        for record in records
        if record.name in LIMITS
        and record.method == GATED_DTYPE
        and record.ratio_median is not None
        and record.ratio_median < LIMITS[record.name]
    ]


def measure(dtype: str, num_bytes: int, repeats: int, ignore_busy: bool) -> list[Measurement]:
    """All opponents for one dtype; again, where other work was busy."""
    times, busy = undisturbed(dtype, partial(pass_times, dtype, num_bytes, repeats), ignore_busy)
    ours = times.pop("fused")
    return [
        measurement(
            f"fused_vs_{opponent}",
            None,
            num_bytes,
            dtype,
            released_s=theirs,
            method_s=ours,
            bound_s=None,
            busy=busy,
        )
        for opponent, theirs in times.items()
    ]


def pass_times(dtype: str, num_bytes: int, repeats: int) -> Times:
    """Seconds of each repeat, by what was run."""
    import torch

    from mimo_ext import ops

    torch.set_num_threads(1)
    x = torch.empty(num_bytes // getattr(torch, dtype).itemsize, dtype=getattr(torch, dtype))
    x.uniform_(0.5, 1.0, generator=torch.Generator().manual_seed(0))
    copied = torch.empty_like(x)
    one = torch.tensor(1.0)  # keeps the values, however often it is applied
    sumsq, found_inf = ops.rescale_([x], one, with_sumsq=True, with_found_inf=True)
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)
    if found_inf.item() or not torch.isclose(sumsq.sqrt(), norm, rtol=1e-9):
        raise AssertionError(f"fused: norm {sumsq.sqrt().item()}, expected {norm.item()}")

    def three() -> None:
        x.mul_(one)
        x.mul_(one)
        x.mul_(one)

    def mul_norm() -> None:
        x.mul_(one)
        torch.linalg.vector_norm(x)

    runs: dict[str, Callable[[], object]] = {
        "fused": lambda: ops.rescale_([x], one, with_sumsq=True, with_found_inf=True),
        "mul": lambda: x.mul_(one),
        "three_mul": three,
        "mul_norm": mul_norm,
        "memcpy": lambda: copied.copy_(x),
    }
    return rotating_times(runs, repeats)


def rotating_times(runs: dict[str, Callable[[], object]], repeats: int) -> Times:
    """Every repeat runs all, each time beginning with another one. One repeat before the first warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for repeat in range(-1, repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            runs[name]()
            end = time.perf_counter()
            if repeat >= 0:
                times[name].append(end - begin)
    return times


if __name__ == "__main__":
    sys.exit(main())
