#!/usr/bin/env python3
"""What telemetry costs a bridge's caller, against a build that has none.

    MIMO_EXT_TELEMETRY=0 python setup.py -q build --build-base build/bare --build-lib build/bare/lib
    python benchmarks/bench_telemetry.py --bare build/bare/lib --json out/telemetry.json      (make bench-telemetry)

Host time per forward and backward on torch's "fake" process group, as in bench_host.py, of one rank in three processes
that take turns: with telemetry (counters; no trace and no profiler run), with telemetry and a trace, and without
telemetry, twice: what those two differ by is what this machine cannot tell apart. Records are called "telemetry"; their
ratio is the time without telemetry / the time with it, and their methods are "off", "trace" and "nothing".
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P

import bench_host
from busy import Usage, process_usage, undisturbed
from cases import KIB, SHARDED, STATIC, Case, parse_layout
from command_line import parsed, parser_of, status_of, told
from records import Measurement, Record, measurement, table, write_json

METHOD = SHARDED + STATIC  # the fewest messages: all else costs more than telemetry does
CASE = Case("small", *parse_layout("tp4-tp4"), 16 * KIB, (METHOD,))
RANK = 0
WITHOUT, AGAIN = "without", "nothing"
MODES = ("off", "trace", AGAIN)
LIMIT = 0.98  # of what is off


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, quick="fewer and shorter repeats: a few seconds", repeats=(61, 21))
    parser.add_argument("--bare", type=Path, metavar="DIR", help="folder of a package built with MIMO_EXT_TELEMETRY=0")
    parser.add_argument("--worker", choices=(*MODES, WITHOUT), help=argparse.SUPPRESS)
    options = parsed(parser, arguments)
    options.steps = 300 if options.quick else 1000
    if not options.worker and (options.bare is None or not (options.bare / "mimo_ext").is_dir()):
        parser.error(f"--bare: expected a folder that holds mimo_ext, got {options.bare}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.worker:
        return work(options.worker)
    return status_of(partial(report, options))


def report(options: argparse.Namespace) -> int:
    """Measure, and tell."""
    measurements = measure(options.bare, options.repeats, options.steps, options.ignore_busy)
    records = [item.record for item in measurements]
    print(table(measurements).replace("released", "without ", 1))
    if options.json:
        write_json(records, options.json)
    return told(missed(records), f"What is off costs less than {1 - LIMIT:.0%}.")


def missed(records: Sequence[Record]) -> list[str]:
    """A line where telemetry that is off costs more than it may."""
    return [
        f"missed: telemetry that is off: expected a ratio of at least {LIMIT}, got {record.ratio_median}"
        for record in records
        if record.method == "off" and record.ratio_median is not None and record.ratio_median < LIMIT
    ]


def measure(bare: Path, repeats: int, steps: int, ignore_busy: bool) -> list[Measurement]:
    """All of them in turns; again, where other work was busy."""
    with workers(bare) as running:
        (times, _), busy = undisturbed(
            "telemetry", partial(in_turns, running, repeats, steps), ignore_busy, used=lambda turns: turns[1]
        )
    return [
        measurement(
            "telemetry",
            CASE.layout,
            CASE.num_bytes,
            mode,
            released_s=times[WITHOUT],
            method_s=times[mode],
            bound_s=None,
            busy=busy,
        )
        for mode in MODES
    ]


@contextlib.contextmanager
def workers(bare: Path) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """One process for each mode, ready to be asked."""
    running: dict[str, subprocess.Popen[str]] = {}
    with contextlib.ExitStack() as stack:
        for mode in (WITHOUT, *MODES):
            environment = dict(os.environ)
            if mode in (WITHOUT, AGAIN):
                environment["PYTHONPATH"] = str(bare.resolve())
            command = [sys.executable, "-P", "-W", "ignore", __file__, "--worker", mode]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = stack.enter_context(subprocess.Popen(command, env=environment, text=True, **pipes))
            stack.callback(process.terminate)
            running[mode] = process
        for mode, process in running.items():
            if _read(process, mode) != "ready":
                raise RuntimeError(f"{mode}: expected a process that is ready")
        yield running


def in_turns(
    running: dict[str, subprocess.Popen[str]], repeats: int, steps: int
) -> tuple[dict[str, list[float]], list[Usage]]:
    """Seconds per forward and backward, by mode, and what the processes have used. Who begins changes."""
    times: dict[str, list[float]] = {mode: [] for mode in running}
    spent: list[Usage] = []
    order = list(running)
    for turn in range(repeats):
        for mode in order[turn % len(order) :] + order[: turn % len(order)]:
            _pipe(running[mode].stdin).write(f"{steps}\n")
            _pipe(running[mode].stdin).flush()
            seconds, user, system = map(float, _read(running[mode], mode).split())
            times[mode].append(seconds)
            spent.append(Usage(user, system))
    return times, spent


def work(mode: str) -> int:
    """One process: for each number of steps that it is asked for, seconds per step."""
    import torch

    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bench_host.fake_group(RANK, CASE.world_size))
        step, bridge = bench_host.ours(stack, CASE, METHOD, RANK)
        if mode == "trace":
            bridge.start_trace()
        for _ in range(200):
            step()
        counted = bridge.telemetry()["forward"]["sends"]
        if (counted > 0) == (mode in (WITHOUT, AGAIN)):
            raise RuntimeError(f"{mode}: {counted} sends were counted: this is the other build")
        gc.collect()
        gc.disable()
        print("ready", flush=True)
        for line in sys.stdin:
            # The best of a few: what disturbs a short stretch only ever adds to it.
            before = process_usage()
            best = min(_timed(step, int(line)) for _ in range(5))
            used = process_usage() - before
            print(best, used.user, used.system, flush=True)
    return 0


def _timed(step: bench_host.Step, steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _read(process: subprocess.Popen[str], mode: str) -> str:
    line = _pipe(process.stdout).readline().strip()
    if not line:
        raise RuntimeError(f"{mode}: the process ended with status {process.wait()}")
    return line


if __name__ == "__main__":
    sys.exit(main())
