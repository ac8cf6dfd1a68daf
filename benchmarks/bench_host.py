#!/usr/bin/env python3
"""What a bridge costs its caller: host time per forward and backward, with no network at all.

    python benchmarks/bench_host.py --quick --json out/host.json

One process stands for one rank at a time, on torch's "fake" process group: every message is complete as soon as it is
posted. What remains is what the host does: planning, Python, dispatch, allocation, handing over between threads. Ours
has static shapes and a cached plan. The released class has to believe that each shape has arrived: the tensor that
receives one holds it already. No root, no model. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P

from busy import undisturbed
from cases import BATCH, KIB, REPLICATED, SHARDED, STATIC, Case, parse_layout
from command_line import parsed, parser_of, status_of
from records import Measurement, measurement, table, write_json
from released import ReleasedUnavailable, require_released

Step = Callable[[], None]
# A method's suffix says which clock: from call to return, processor time of the calling thread, and of all threads.
CLOCKS: dict[str, Callable[[], float]] = {
    "": time.perf_counter,
    "-caller": time.thread_time,
    "-threads": time.process_time,
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, quick="fewer and shorter repeats: a few seconds", repeats=(15, 7))
    parser.add_argument("--layouts", default="tp4-tp4", help="source-destination, by commas (default: %(default)s)")
    options = parsed(parser, arguments)
    options.steps = 300 if options.quick else 1000
    try:
        # Small, so that touching the payload costs nothing, and large enough to be cut for every rank.
        options.cases = [
            Case("small", *parse_layout(text), 16 * KIB, (REPLICATED + STATIC, SHARDED + STATIC))
            for text in options.layouts.split(",")
        ]
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return status_of(partial(report, options), skipped=(ReleasedUnavailable,))


def report(options: argparse.Namespace) -> int:
    """Measure, and tell."""
    require_released()
    measurements = [
        item for case in options.cases for item in measure(case, options.repeats, options.steps, options.ignore_busy)
    ]
    print(table(measurements))
    print(
        "\nHost time of one rank per forward and backward, messages free of charge. leader, member: what the released "
        "class makes of that rank.\n-caller: processor time of the calling thread; -threads: of all threads; "
        "else: from call to return."
    )
    if options.json:
        write_json([item.record for item in measurements], options.json)
    return 0


def measure(case: Case, repeats: int, steps: int, ignore_busy: bool) -> list[Measurement]:
    """Both sides, each as the leader of its lane and as another rank of it; again, where other work was busy."""
    found, busy = undisturbed(case.layout, partial(_measure, case, repeats, steps), ignore_busy)
    return [
        measurement(
            name,
            case.layout,
            case.num_bytes,
            method,
            released_s=theirs,
            method_s=ours,
            bound_s=None,
            busy=busy,
        )
        for name, method, theirs, ours in found
    ]


def _measure(case: Case, repeats: int, steps: int) -> list[tuple[str, str, list[float], list[float]]]:
    lines: list[tuple[str, str, list[float], list[float]]] = []
    sides = {"source": range(case.source.size), "destination": range(case.source.size, case.world_size)}
    for side, ranks in sides.items():
        roles = {
            "leader": next(rank for rank in ranks if rank in leaders(case)),
            "member": next((rank for rank in ranks if rank not in leaders(case)), None),
        }
        for role, rank in roles.items():
            if rank is None:
                continue
            clocks = rank_times(case, rank, repeats, steps)
            lines += [
                (f"host-{side}-{role}", method + suffix, times["released"], times[method])
                for suffix, times in clocks.items()
                for method in case.methods
            ]
    return lines


def rank_times(case: Case, rank: int, repeats: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Seconds per forward and backward of one rank, by clock, then by method."""
    import torch

    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_group(rank, case.world_size))
        run: dict[str, Step] = {"released": _released(stack, case, rank)}
        for method in case.methods:
            run[method] = ours(stack, case, method, rank)[0]
        for step in run.values():
            for _ in range(50):
                step()
        times: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in run} for clock in CLOCKS}
        gc.collect()
        gc.disable()
        stack.callback(gc.enable)
        for _ in range(repeats):
            for name, step in run.items():
                began = [read() for read in CLOCKS.values()]
                for _ in range(steps):
                    step()
                ended = [read() for read in CLOCKS.values()]
                for clock, begin, end in zip(CLOCKS, began, ended, strict=True):
                    times[clock][name].append((end - begin) / steps)
    return times


@contextlib.contextmanager
def fake_group(rank: int, world_size: int) -> Iterator[None]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(world_size)  # Megatron's grids believe it more than the process group
    try:
        yield
    finally:
        del os.environ["WORLD_SIZE"]
        if before is not None:
            os.environ["WORLD_SIZE"] = before
        dist.destroy_process_group()


def ours(stack: contextlib.ExitStack, case: Case, method: str, rank: int) -> tuple[Step, Any]:
    """Our bridge, whose process groups are fake ones, too; all other ranks say what this one says. And that bridge."""
    import transfers

    ops = stack.enter_context(transfers.ours(case, method))
    sends = transfers.data_of(case, rank, method.startswith(SHARDED)).sends
    return _step(ops, sends, rank < case.source.size), ops.send_forward.__self__


def _released(stack: contextlib.ExitStack, case: Case, rank: int) -> Step:
    import torch
    import transfers

    is_source = rank < case.source.size
    sends = transfers.data_of(case, rank, sharded=False).sends
    # Between leaders travel the samples that a source lane and a destination lane share; in a lane, all of its own.
    shared = list(sends.shape)
    shared[transfers.AXES["b"]] = BATCH // max(case.source.dp, case.destination.dp)
    arrived = torch.tensor(shared if rank in leaders(case) else sends.shape)
    empty = torch.empty

    def empty_or_arrived(*size: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        return arrived if dtype is torch.int64 else empty(*size, dtype=dtype, **options)

    ops = stack.enter_context(transfers.theirs(case, backend="fake", empty=empty_or_arrived))
    return _step(ops, sends, is_source)


def leaders(case: Case) -> list[int]:
    """The ranks that the released class lets do the work: a source lane's last, a destination lane's first."""
    source, destination = case.source, case.destination
    return [
        *range(source.tp - 1, source.size, source.tp),
        *range(source.size, source.size + destination.size, destination.tp),
    ]


def _step(ops: Any, tensor: Any, is_source: bool) -> Step:
    if is_source:

        def step() -> None:
            ops.send_forward(tensor)
            ops.recv_backward()
    else:

        def step() -> None:
            ops.recv_forward()
            ops.send_backward(tensor)

    return step


if __name__ == "__main__":
    sys.exit(main())
