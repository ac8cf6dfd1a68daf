"""Run a function on real gloo ranks, with a deadline.

`launch(fn, world_size, *args)` calls `fn(rank, world_size, *args)` on `world_size` ranks whose default process group is
gloo, and returns the list of results in rank order. A rank that raises, dies or hangs fails the call with the traceback
of every rank that has one (a hang shows where each rank stands).

Two ways, chosen by the environment:

* normally the ranks are processes of a fork server that has imported torch already (8 ranks start in about 0.3 s);
* under ``torchrun --nproc-per-node N -m pytest tests/distributed`` every rank runs pytest, and `fn` runs on the ranks
that are
  there: the first `world_size` of them. A test that wants more ranks than N is skipped, with the reason.

When `fn` has returned and the process groups are destroyed, a rank must hold no thread, descriptor, process group,
bridge or storage of a tensor that went through a bridge that it did not hold before: that fails the call, too
(tests/leaks.py).
"""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from leaks import Level, Storages

GRACE_S = 2.0  # how long the other ranks may go on after the first failure, to report their own
_calls = itertools.count()


class RankFailure(AssertionError):
    """One rank or more failed; the message holds each one's traceback."""


def launch(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, leaks: bool = False
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on every rank; `timeout` in seconds for all of it.

    `leaks`: ranks may leave something behind. `fn` and `args` must be picklable (`fn` a module-level function). Raises
    RankFailure.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _run_under_torchrun(fn, world_size, args, timeout)
    return run_ranks(fn, world_size, *args, timeout=timeout, leaks=leaks).check()


class Outcome:
    """What each rank gave: `results[rank]`, or `errors[rank]` (a traceback, or how the process ended)."""

    def __init__(self, world_size: int) -> None:
        self.results: list[Any] = [None] * world_size
        self.errors: dict[int, str] = {}
        self.exitcodes: list[int | None] = [None] * world_size

    def check(self) -> list[Any]:
        if self.errors:
            text = "\n".join(f"--- rank {rank}\n{error}" for rank, error in sorted(self.errors.items()))
            raise RankFailure(f"{len(self.errors)} of {len(self.results)} ranks failed\n{text}")
        return self.results


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, leaks: bool = False
) -> Outcome:
    """As `launch`, but returns what happened instead of raising: for tests in which a rank is meant to fail."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "mimo_ext"])
    outcome = Outcome(world_size)
    with tempfile.TemporaryDirectory(prefix="mimo_ext_ranks_") as folder:
        ranks: list[BaseProcess] = []
        pipes: dict[multiprocessing.connection.Connection, int] = {}
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(fn, rank, world_size, args, folder, theirs, timeout, leaks)
            )
            process.start()
            theirs.close()
            ranks.append(process)
            pipes[ours] = rank
        try:
            _collect(outcome, pipes, ranks, Path(folder), time.monotonic() + timeout)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
            outcome.exitcodes = [process.exitcode for process in ranks]
    return outcome


def _collect(
    outcome: Outcome,
    pipes: dict[multiprocessing.connection.Connection, int],
    ranks: list[BaseProcess],
    folder: Path,
    deadline: float,
) -> None:
    while pipes:
        ready = multiprocessing.connection.wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            for rank in pipes.values():
                outcome.errors[rank] = "did not finish in time; it stands at\n" + _stack_of(ranks[rank], rank, folder)
            return
        for pipe in ready:
            assert isinstance(pipe, multiprocessing.connection.Connection)
            rank = pipes.pop(pipe)
            try:
                # By value: shared tensors would die with the rank that made them.
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ranks[rank].join(GRACE_S)
                ok, value = False, f"the process ended with exit code {ranks[rank].exitcode} and no result"
            if ok:
                outcome.results[rank] = value
                continue
            if not outcome.errors:
                deadline = min(deadline, time.monotonic() + max(GRACE_S, _grace_wanted(value)))
            outcome.errors[rank] = value
    for process in ranks:
        process.join(max(0.1, deadline - time.monotonic()))


def _grace_wanted(error: str) -> float:
    """A rank that ended without a word is a planned death: the others need their own time to notice it."""
    return 30.0 if "and no result" in error else 0.0


def _stack_of(process: BaseProcess, rank: int, folder: Path) -> str:
    file = folder / f"stack_{rank}"
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.3)
    return file.read_text() if file.exists() else "(no stack)"


def _rank_main(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    folder: str,
    pipe: multiprocessing.connection.Connection,
    timeout: float,
    leaks: bool,
) -> None:
    with open(Path(folder) / f"stack_{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
        torch.manual_seed(1234)
        before = Level.now()
        with Storages() as storages:
            try:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{folder}/rendezvous",
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=timeout),
                )
                # A rank that is done at once must not hang up while a slow one is still connecting.
                dist.barrier()
                result = pickle.dumps((True, fn(rank, world_size, *args)))
                ok = True
                if dist.is_initialized():
                    dist.destroy_process_group()
                # Megatron's classes keep process groups of theirs past destroy_process_group().
                groups = Path(str(sys.modules[fn.__module__].__file__)).parent.name != "megatron"
                if not leaks and (left := storages.alive(fn.__module__) + before.growth(groups)):
                    raise AssertionError("left behind: " + "; ".join(left))
            except BaseException:
                ok, result = False, pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(result)
        pipe.close()
        sys.stdout.flush()
        sys.stderr.flush()
        # A failed rank must not wait for peers in destructors.
        if not ok:
            os._exit(1)


def _run_under_torchrun(fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout: float) -> list[Any]:
    rank, available = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > available:
        pytest.skip(f"needs {world_size} ranks; torchrun started {available}")
    wait = timedelta(seconds=timeout)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = dist.TCPStore(host, port, is_master=False, timeout=wait)
    store = dist.PrefixStore(f"launch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_calls)}", agent)
    if rank < world_size:
        old = {key: os.environ[key] for key in ("WORLD_SIZE",)}
        os.environ["WORLD_SIZE"] = str(world_size)
        try:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=wait)
            dist.barrier()
            result = (True, fn(rank, world_size, *args))
        except BaseException:
            result = (False, traceback.format_exc())
        store.set(f"result/{rank}", pickle.dumps(result))
        os.environ.update(old)
        if dist.is_initialized():
            dist.destroy_process_group()
    outcome = Outcome(world_size)
    for other in range(world_size):
        # Our own ranks' bytes, on one machine, within one test run: unpickling them is safe here.
        ok, value = pickle.loads(store.get(f"result/{other}"))
        if ok:
            outcome.results[other] = value
        else:
            outcome.errors[other] = value
    store.set(f"done/{rank}", "1")
    store.wait([f"done/{other}" for other in range(available)], wait)
    return outcome.check()
