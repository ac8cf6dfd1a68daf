"""The fault matrix: a rank is killed, frozen or raises, in each operation, in each role; the others must notice.

    PYTHONPATH=tests/faults python tests/faults/matrix.py [--times 2] [--json FILE] [--jobs N] [PART OF A NAME...]

Each case runs on real gloo ranks (fault_ranks.py), prints a line, and is judged here: every rank that needs the victim
raises in time, says who, what and where, closes cleanly and ends with a non-zero exit code; every other rank finishes.
A rank that has not ended by then is a hang, and shown with its stacks. Exit code: 0, or 1 where a case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fault_ranks import FAULTS, OPERATIONS, ROLES, TIMEOUT_S, WORLD_SIZE, Case, Report, rank_main

# From the fault to the error of a rank that is in an operation, in seconds: the promise. Where a rank is killed the
# system closes its connections.
LIMITS = {"killed": 2.0, "frozen": TIMEOUT_S + 5, "raises": TIMEOUT_S + 5}
START_S = 60.0  # until the fault: imports, rendezvous and construction on a busy machine
END_S = 20.0  # to close, look around and end, after the error

# To start a process multiprocessing asks after all others, and no two threads may ask after the same one.
_multiprocessing = threading.Lock()


@dataclass
class Result:
    """A case, and what is wrong with it."""

    case: Case
    failures: list[str] = field(default_factory=list)
    notice_s: dict[int, float] = field(default_factory=dict)  # connected rank -> seconds from the fault to its error
    texts: dict[int, str] = field(default_factory=dict)
    hung: bool = False
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        return {
            "fault": self.case.fault,
            "operation": self.case.operation,
            "role": self.case.role,
            "shapes": "static" if self.case.static else "varying",
            "victim": self.case.victim,
            "hung": self.hung,
            "failures": self.failures,
            "notice_s": {str(rank): round(seconds, 3) for rank, seconds in self.notice_s.items()},
            "errors": {str(rank): text for rank, text in self.texts.items()},
            "seconds": round(self.seconds, 2),
        }


def all_cases() -> Iterator[Case]:
    for fault, operation, role, static in itertools.product(FAULTS, OPERATIONS, ROLES, (False, True)):
        yield Case(fault, operation, role, static)


class Ranks:
    """The processes of a case."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "mimo_ext", "fault_ranks"])
        self.pipes: list[multiprocessing.connection.Connection] = []
        self.processes = []
        self.reports: dict[int, Report] = {}
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=rank_main, args=(case, rank, str(folder), theirs), daemon=True)
            with _multiprocessing:
                process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def exit_code(self, rank: int) -> int | None:
        with _multiprocessing:
            return self.processes[rank].exitcode

    def alive(self, rank: int) -> bool:
        return self.exit_code(rank) is None

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def struck_at(self) -> float | None:
        file = self.folder / "strike"
        return float(file.read_text()) if file.exists() else None

    def wait(self, ranks: list[int], deadline: float) -> bool:
        """Until all of `ranks` have ended; takes in what they report."""
        while time.monotonic() < deadline:
            for rank in ranks:
                self.take_report(rank)
            alive = [self.processes[rank].sentinel for rank in ranks if self.alive(rank)]
            if not alive:
                for rank in ranks:
                    self.take_report(rank)
                return True
            pipes = [self.pipes[rank] for rank in ranks if rank not in self.reports and not self.pipes[rank].closed]
            multiprocessing.connection.wait([*alive, *pipes], timeout=max(0.0, deadline - time.monotonic()))
        return False

    def take_report(self, rank: int) -> None:
        pipe = self.pipes[rank]
        try:
            if rank not in self.reports and not pipe.closed and pipe.poll():
                self.reports[rank] = pipe.recv()
        except EOFError:
            pipe.close()

    def log(self, rank: int) -> str:
        file = self.folder / f"log_{rank}"
        return file.read_text() if file.exists() else "(nothing)"

    def stacks(self) -> str:
        """Of the ranks that have not ended."""
        alive = [rank for rank in range(WORLD_SIZE) if self.alive(rank)]
        for rank in alive:
            os.kill(self.pid(rank), signal.SIGCONT)
            os.kill(self.pid(rank), signal.SIGUSR1)
        time.sleep(0.5)
        return "\n".join(f"--- rank {rank} stands at\n{self.log(rank)}" for rank in alive)

    def end(self) -> None:
        for rank, process in enumerate(self.processes):
            if self.alive(rank):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid(rank), signal.SIGKILL)
            multiprocessing.connection.wait([process.sentinel])
            with _multiprocessing:
                process.join()
                process.close()
        for pipe in self.pipes:
            pipe.close()


def run_case(case: Case) -> Result:
    result = Result(case)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mimo_ext_fault_") as name:
        ranks = Ranks(case, Path(name))
        try:
            judge(case, ranks, result)
        finally:
            ranks.end()
    result.seconds = time.monotonic() - start
    return result


def judge(case: Case, ranks: Ranks, result: Result) -> None:
    survivors = [rank for rank in range(WORLD_SIZE) if rank != case.victim]
    deadline = time.monotonic() + START_S
    while ranks.struck_at() is None and time.monotonic() < deadline:
        if not all(ranks.alive(rank) for rank in survivors):
            break
        time.sleep(0.02)
    struck = ranks.struck_at()
    if struck is None:
        result.failures.append("the fault never came:\n" + "\n".join(ranks.log(rank) for rank in range(WORLD_SIZE)))
        return
    waiting = survivors if case.fault != "raises" else list(range(WORLD_SIZE))
    ended = ranks.wait(waiting, struck + LIMITS[case.fault] + END_S)
    if ended and case.fault == "frozen":
        # It goes on in a world that has moved on without it, and must notice, too.
        os.kill(ranks.pid(case.victim), signal.SIGCONT)
        ended = ranks.wait([case.victim], time.monotonic() + LIMITS["frozen"] + END_S)
    if not ended:
        result.hung = True
        result.failures.append("HUNG:\n" + ranks.stacks())
        return
    for rank in survivors:
        if rank in case.connected:
            judge_connected(case, rank, ranks, struck, result)
        else:
            judge_other(rank, ranks, result)
    if case.fault != "killed":
        judge_victim(case, ranks, result)


def judge_connected(case: Case, rank: int, ranks: Ranks, struck: float, result: Result) -> None:
    report, code = ranks.reports.get(rank), ranks.exit_code(rank)
    if report is None:
        result.failures.append(f"rank {rank} ended with exit code {code} and no report:\n{ranks.log(rank)}")
        return
    result.texts[rank] = f"{report.operation}: {report.error}: {report.text}"

    def expect(holds: bool, what: str) -> None:
        if not holds:
            result.failures.append(f"rank {rank}: {what}; {result.texts[rank]}")

    expect(
        report.error in ("BridgeError", "BridgeTimeoutError"), f"expected a BridgeError, got {report.error or 'none'}"
    )
    if not report.error:
        return
    result.notice_s[rank] = report.raised_at - struck
    limit = LIMITS[case.fault]
    waited = report.raised_at - max(struck, report.back_at)  # a rank that computes notices nothing
    expect(waited <= limit, f"raised after {waited:.2f} s, expected at most {limit:g}")
    expect(f"bridge 'images -> language', rank {rank}: " in report.text, "the message does not name the edge")
    expect(bool(re.search(r"(send|recv)_(forward|backward)", report.text)), "the message names no operation")
    expect("of microbatch " in report.text, "the message names no microbatch")
    peers = {int(peer) for peer in re.findall(r"rank (\d+)", report.text)} - {rank}
    expect(bool(peers & set(case.connected)), "the message names no peer")
    judge_end(rank, report, code, expect)


def judge_end(rank: int, report: Report, code: int | None, expect: Any) -> None:
    expect(code == 1, f"exit code {code}, expected 1")
    expect("is not closed" not in report.text, "the bridge was not closed")
    expect(report.closed_at - report.raised_at < 2, f"close() took {report.closed_at - report.raised_at:.2f} s")
    expect(not report.threads_left, f"threads that go on: {report.threads_left}")
    expect(not report.descriptors_left, f"{report.descriptors_left} descriptors stay open")
    expect(not report.storages_left, f"{report.storages_left} storages are still held")


def judge_other(rank: int, ranks: Ranks, result: Result) -> None:
    report, code = ranks.reports.get(rank), ranks.exit_code(rank)
    if report is None or report.error or code != 0:
        result.failures.append(f"rank {rank} does not need the victim, and failed ({code}):\n{ranks.log(rank)}")


def judge_victim(case: Case, ranks: Ranks, result: Result) -> None:
    rank = case.victim
    report, code = ranks.reports.get(rank), ranks.exit_code(rank)
    expected = ("UserError",) if case.fault == "raises" else ("BridgeError", "BridgeTimeoutError")
    if report is None or report.error not in expected or code != 1:
        result.failures.append(f"the victim, rank {rank}: expected {expected}, exit code 1, got {code}, {report}")
        return
    result.texts[rank] = f"{report.operation}: {report.error}: {report.text}"

    def expect(holds: bool, what: str) -> None:
        if not holds:
            result.failures.append(f"the victim, rank {rank}: {what}; {result.texts[rank]}")

    judge_end(rank, report, code, expect)


def line_of(result: Result) -> str:
    case = result.case
    seconds = sorted(result.notice_s.values())
    noticed = f"{seconds[0]:5.2f} .. {seconds[-1]:5.2f} s" if seconds else "-"
    verdict = "HUNG" if result.hung else "FAILED" if result.failures else "ok"
    shapes = "static" if case.static else "varying"
    return f"{case.fault:8}{case.operation:28}{case.role:18}{shapes:9}{noticed:18}{verdict}"


def run(cases: list[Case], jobs: int) -> Iterator[Result]:
    """In the order of `cases`."""
    # Ranks that are frozen cost nothing: cases that wait run beside those that work.
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(run_case, cases)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="run only cases whose name holds all of these; default: all")
    parser.add_argument("--times", type=int, default=1, help="how often the whole matrix runs")
    parser.add_argument("--jobs", type=int, default=max(2, (os.cpu_count() or 2) + 1), help="cases at the same time")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    options = parser.parse_args()
    cases = [case for case in all_cases() if all(part in str(case) for part in options.parts)]
    results = []
    for _ in range(options.times):
        print(f"{'fault':8}{'during':28}{'of the':18}{'shapes':9}{'noticed after':18}")
        for result in run(cases, options.jobs):
            print(line_of(result), flush=True)
            for failure in result.failures:
                print("    " + failure.replace("\n", "\n    "), flush=True)
            results.append(result)
    failed = sum(bool(result.failures) for result in results)
    hung = sum(result.hung for result in results)
    print(f"{len(results)} cases, {failed} failed, {hung} hung")
    if options.json:
        record = {
            "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "torch": torch.__version__},
            "timeout_s": TIMEOUT_S,
            "limits_s": LIMITS,
            "cases": len(results),
            "failed": failed,
            "hung": hung,
            "results": [result.record() for result in results],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
