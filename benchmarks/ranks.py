"""Processes that are the ranks of an emulated cluster, kept for all cases that run on it."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from emulation import EmulatedCluster, Loopback, enter_namespace

PRELOADED = (
    "torch",
    "torch.distributed",
    "mimo_ext",
    "megatron.core.pipeline_parallel.bridge_communicator",
    "transfers",
)
GROUP_TIMEOUT = timedelta(seconds=60)


class RankFailed(RuntimeError):
    """A rank raised, died or did not answer; the text says which, and how."""


class RankPool:
    """One process per rank, in the rank's namespace, with gloo as the default process group."""

    def __init__(
        self, processes: Sequence[BaseProcess], pipes: Sequence[multiprocessing.connection.Connection]
    ) -> None:
        self._processes = list(processes)
        self._pipes = list(pipes)

    def call(self, fn: Callable[..., Any], *args: Any, timeout: float) -> list[Any]:
        """`fn(rank, meet, *args)` on every rank; the results in the order of the ranks.

        Args:
            fn: a function of a module, collective over the ranks.
            timeout: seconds for all of it.

        Raises:
            RankFailed: with the tracebacks of the ranks that have one. The pool is of no use afterwards.
        """
        for pipe in self._pipes:
            pipe.send((fn, args))
        deadline = time.monotonic() + timeout
        results: list[Any] = [None] * len(self._pipes)
        failures: dict[int, str] = {}
        waiting = dict(zip(self._pipes, range(len(self._pipes)), strict=True))
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failures.update(dict.fromkeys(waiting.values(), "did not answer in time"))
                break
            for pipe in ready:
                assert isinstance(pipe, multiprocessing.connection.Connection)
                rank = waiting.pop(pipe)
                try:
                    good, value = pipe.recv()
                except EOFError:
                    self._processes[rank].join(1)
                    good, value = False, f"ended with exit code {self._processes[rank].exitcode}"
                if good:
                    results[rank] = value
                else:
                    failures[rank] = value
                    # The others notice by themselves or not at all.
                    deadline = min(deadline, time.monotonic() + 3)
        if failures:
            text = "\n".join(f"--- rank {rank}\n{words}" for rank, words in sorted(failures.items()))
            raise RankFailed(f"{len(failures)} of {len(results)} ranks failed\n{text}")
        return results


@contextlib.contextmanager
def rank_pool(cluster: EmulatedCluster | Loopback, preloaded: Sequence[str] = PRELOADED) -> Iterator[RankPool]:
    """The ranks of `cluster`; they end with the block, or with this process.

    Args:
        preloaded: modules that are imported once for all ranks of this process's first pool.
    """
    context = multiprocessing.get_context("forkserver")
    _start_server(context, preloaded)
    meet = context.Barrier(cluster.world_size, timeout=GROUP_TIMEOUT.total_seconds())
    processes: list[BaseProcess] = []
    pipes: list[multiprocessing.connection.Connection] = []
    with tempfile.TemporaryDirectory(prefix="mimo_ext_bench_") as folder:
        try:
            for rank in range(cluster.world_size):
                mine, theirs = context.Pipe()
                process = context.Process(
                    target=_rank_main,
                    args=(rank, cluster.world_size, cluster.namespace(rank), cluster.interface, folder, theirs, meet),
                    daemon=True,
                )
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(mine)
            yield RankPool(processes, pipes)
            for pipe in pipes:
                pipe.send(None)
            for process in processes:
                process.join(5)
        finally:
            for pipe in pipes:
                pipe.close()
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _start_server(context: Any, preloaded: Sequence[str]) -> None:
    context.set_forkserver_preload(list(preloaded))
    # The server of Python 3.11 looks for the modules only where PYTHONPATH says, and is silent where it finds none.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _rank_main(
    rank: int,
    world_size: int,
    namespace: str | None,
    interface: str,
    folder: str,
    pipe: multiprocessing.connection.Connection,
    meet: Any,
) -> None:
    # Only this thread exists yet: all later ones are in the namespace, too.
    if namespace is not None:
        enter_namespace(namespace)
    # No rank outlives a benchmark that was killed: it would keep the processor and its namespace.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark ends its ranks itself
    faulthandler.enable()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME=interface,
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    good = True
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{Path(folder) / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=GROUP_TIMEOUT,
        )
    except Exception:
        pipe.send((False, traceback.format_exc()))
        os._exit(1)
    while good:
        try:
            command = pipe.recv()
        except EOFError:
            break
        if command is None:
            break
        fn, args = command
        try:
            answer = (True, fn(rank, meet, *args))
        except Exception:
            good, answer = False, (False, traceback.format_exc())
        with contextlib.suppress(OSError):
            pipe.send(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    if good:
        dist.destroy_process_group()
    # Not through destructors: they might wait for ranks that have failed.
    os._exit(0 if good else 1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
