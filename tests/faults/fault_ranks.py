"""What one rank does in a case of the fault matrix: a short 1F1B training during which one rank comes to harm.

Two pairs of lanes share a bridge but nothing else: ranks 0, 1 -> 2, 3 (where the operation is watched), and the
bystanders 4, 5 -> 6, 7. One microbatch goes there and back; then one side enters the operation of the case while the
other is busy elsewhere, the victim is struck, and everyone goes on as if nothing had happened, up to the end of the
program.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mimo_ext
from mimo_ext import Layout

WORLD_SIZE = 8
WATCHED = range(4)
TIMEOUT_S = 3.0
STRIKE_AFTER_S = 0.2
BUSY_S = 0.6
WIDTH = 256

OPERATIONS = {
    # operation: the side that is inside of it when the fault comes
    "send_forward": "source",
    "recv_forward": "destination",
    "send_backward": "destination",
    "recv_backward": "source",
    "send_forward_recv_backward": "source",
    "send_backward_recv_forward": "destination",
}
FAULTS = ("killed", "frozen", "raises")
ROLES = ("source rank", "destination rank", "lane peer", "bystander")


@dataclass(frozen=True)
class Case:
    """One cell of the matrix: what happens to whom, while one side of the bridge is in which operation."""

    fault: str
    operation: str
    role: str
    static: bool

    @property
    def victim(self) -> int:
        if self.role == "lane peer":
            return 1 if OPERATIONS[self.operation] == "source" else 3
        return {"source rank": 0, "destination rank": 2, "bystander": 6}[self.role]

    @property
    def connected(self) -> range:
        """The victim and those that need it."""
        return WATCHED if self.victim in WATCHED else range(len(WATCHED), WORLD_SIZE)

    def __str__(self) -> str:
        return f"{self.role} {self.fault} in {self.operation}, {'static' if self.static else 'varying'} shapes"


class UserError(Exception):
    """What the victim's own program raises."""


@dataclass
class Report:
    """What became of a rank, as far as it can tell. Times are those of the host's monotonic clock."""

    error: str = ""
    text: str = ""
    operation: str = ""
    back_at: float = 0.0  # when it had done what kept it busy; 0 where nothing did
    raised_at: float = 0.0
    closed_at: float = 0.0
    threads_left: list[str] = field(default_factory=list)
    descriptors_left: int = 0
    storages_left: int = 0


class Training:
    """A rank's part: microbatch after microbatch, with values that tell microbatch, lane and direction."""

    def __init__(self, rank: int, case: Case) -> None:
        self.rank, self.case = rank, case
        rows = 8192
        self.bridge = mimo_ext.Bridge(
            Layout([0, 1, 4, 5], tp=2, dp=2, name="images"),
            Layout([2, 3, 6, 7], tp=2, dp=2, name="language"),
            ndim=2,
            shape=(rows, WIDTH) if case.static else None,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        self.lane = rank // 4
        self.is_source = rank % 4 < 2
        self.side = "source" if self.is_source else "destination"
        self.storages: list[int] = []
        self.doing = "nothing yet"
        self.noticed_at = 0.0
        self.back_at = 0.0

    def rows(self, microbatch: int) -> int:
        return 4096 if self.case.static else 3000 + 517 * microbatch + 100 * self.lane

    def value(self, microbatch: int, backward: bool) -> float:
        return 100.0 * microbatch + 10.0 * backward + self.lane + 1

    def tensor(self, microbatch: int, backward: bool) -> torch.Tensor:
        tensor = torch.full((self.rows(microbatch), WIDTH), self.value(microbatch, backward))
        self.storages.append(tensor.untyped_storage()._weak_ref())
        return tensor

    def check(self, microbatch: int, backward: bool, got: torch.Tensor | None) -> None:
        assert got is not None
        self.storages.append(got.untyped_storage()._weak_ref())
        assert got.shape == (self.rows(microbatch), WIDTH), (self.doing, got.shape)
        assert bool((got.detach() == self.value(microbatch, backward)).all()), self.doing

    def options(self, microbatch: int) -> dict[str, Any]:
        return {} if self.case.static else {"row_counts": [self.rows(microbatch)]}

    def step(self, name: str, microbatch: int) -> None:
        """One of the six operations; the combined ones receive what goes the other way of the microbatch before."""
        self.doing = f"{name} of microbatch {microbatch}"
        bridge = self.bridge
        if name == "send_forward":
            bridge.send_forward(self.tensor(microbatch, False), **self.options(microbatch))
        elif name == "recv_forward":
            self.check(microbatch, False, bridge.recv_forward())
        elif name == "send_backward":
            bridge.send_backward(self.tensor(microbatch, True))
        elif name == "recv_backward":
            self.check(microbatch, True, bridge.recv_backward())
        elif name == "send_forward_recv_backward":
            x = self.tensor(microbatch, False)
            self.check(microbatch - 1, True, bridge.send_forward_recv_backward(x, **self.options(microbatch)))
        else:
            self.check(microbatch + 1, False, bridge.send_backward_recv_forward(self.tensor(microbatch, True)))

    def there_and_back(self, microbatch: int) -> None:
        for name in ("send_forward", "recv_backward") if self.is_source else ("recv_forward", "send_backward"):
            self.step(name, microbatch)

    def script(self) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """What comes before the fault, and what this rank wants to do then."""
        operation, source = self.case.operation, self.is_source
        if operation in ("send_forward", "recv_forward"):
            after = (
                [("send_forward", 1), ("recv_backward", 1)] if source else [("recv_forward", 1), ("send_backward", 1)]
            )
            return [], after
        before = [("send_forward", 1)] if source else [("recv_forward", 1)]
        if operation in ("send_backward", "recv_backward"):
            return before, [("recv_backward", 1)] if source else [("send_backward", 1)]
        if operation == "send_forward_recv_backward":
            if source:
                return before, [(operation, 2), ("recv_backward", 2)]
            return before, [("send_backward", 1), ("recv_forward", 2), ("send_backward", 2)]
        if source:
            return before, [("recv_backward", 1), ("send_forward", 2), ("recv_backward", 2)]
        return before, [(operation, 1), ("send_backward", 2)]

    def run(self, strike: Any) -> None:
        with self.bridge:
            try:
                self.train(strike)
            except BaseException:
                self.noticed_at = time.monotonic()
                raise
            self.doing = "close"

    def train(self, strike: Any) -> None:
        before, after = self.script()
        self.there_and_back(0)
        for step in before:
            self.step(*step)
        self.doing = "barrier"
        dist.barrier()
        strike()
        if self.side != OPERATIONS[self.case.operation]:
            self.doing = "something else"
            time.sleep(BUSY_S)
            self.back_at = time.monotonic()
        for step in after:
            self.step(*step)
        for microbatch in (3, 4):
            self.there_and_back(microbatch)


def threads() -> dict[str, str]:
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found[task.name] = (task / "comm").read_text().strip()
    return found


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def striker(case: Case, folder: Path) -> Any:
    """Strikes this process, a moment after the call."""

    def raise_in_main_thread(*_: object) -> None:
        raise UserError("the user's code failed")

    signal.signal(signal.SIGUSR2, raise_in_main_thread)
    number = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP, "raises": signal.SIGUSR2}[case.fault]

    def strike() -> None:
        (folder / "strike.new").write_text(repr(time.monotonic()))
        os.rename(folder / "strike.new", folder / "strike")
        os.kill(os.getpid(), number)

    def later() -> None:
        timer = threading.Timer(STRIKE_AFTER_S, strike)
        timer.daemon = True
        timer.start()

    return later


def settle(report: Report, tasks: dict[str, str], files: int, storages: list[int]) -> None:
    """Looks at what is left of the bridge; threads that have ended stay for a moment."""
    gc.collect()
    deadline = time.monotonic() + 5
    while True:
        report.threads_left = [name for task, name in threads().items() if task not in tasks]
        report.descriptors_left = max(0, descriptors() - files)
        report.storages_left = sum(not torch.UntypedStorage._expired(weak) for weak in storages)
        left = report.threads_left or report.descriptors_left or report.storages_left
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    for weak in storages:
        torch.UntypedStorage._free_weak_ref(weak)


def rank_main(case: Case, rank: int, folder_name: str, pipe: Connection) -> None:
    """The process of a rank. It ends as a program does: an error that nobody catches makes its exit code non-zero."""
    folder = Path(folder_name)
    gc.freeze()  # what was imported before the fork is not looked through again
    log = open(folder / f"log_{rank}", "w")  # noqa: SIM115
    os.dup2(log.fileno(), 2)
    sys.stderr = log
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    dist.barrier()
    tasks, files = threads(), descriptors()
    report = Report()
    training = Training(rank, case)
    strike = striker(case, folder) if rank == case.victim else lambda: None
    try:
        training.run(strike)
    except BaseException as error:
        report.error, report.text = type(error).__name__, str(error)
        report.raised_at = training.noticed_at or time.monotonic()
        report.operation, report.back_at = training.doing, training.back_at
        traceback.print_exc(file=log)
        traceback.clear_frames(error.__traceback__)
        raise SystemExit(1) from None
    finally:
        report.closed_at = time.monotonic()
        storages = training.storages
        closed = training.bridge.closed
        del training
        settle(report, tasks, files, storages)
        if not closed:
            report.text += " (the bridge is not closed)"
        log.flush()
        pipe.send(report)
        pipe.close()
    dist.destroy_process_group()
