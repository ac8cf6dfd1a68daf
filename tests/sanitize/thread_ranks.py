"""Ranks as threads of one process, so that a sanitizer sees both ends of every message. Run by run.py.

Everything that threads share in a bridge is used at the same time: receives posted ahead and blocking ones, handles
awaited by another thread, telemetry, trace and flight recorder read by a third, bridges that are dropped, aborted and
closed.
"""

from __future__ import annotations

import random
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mimo_ext import _C, BridgeError, Layout

TIMEOUT = timedelta(seconds=60)
ROUNDS = 40
ROWS, HIDDEN = 24, 8
WIDE = 2048  # payloads that do not fit into a header: their beginnings travel ahead


class Rank:
    """The ends of a bridge on one rank, over groups of its own."""

    def __init__(self, rank: int, world_size: int, store: dist.Store, meet: threading.Barrier) -> None:
        self.rank = rank
        self.meet = meet
        self._world_size = world_size
        self._store = store

    def group(self, name: str) -> dist.ProcessGroup:
        store = dist.PrefixStore(name, self._store)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(interface="lo", lazy_init=False)]
        options._threads = 1
        options._timeout = TIMEOUT
        backend = dist.ProcessGroupGloo(store, self.rank, self._world_size, options)
        group = dist.ProcessGroup(store, self.rank, self._world_size)
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        return group

    def open(self, name: str, src: Layout, dst: Layout, fixed: bool = False, **options: Any) -> _C.Communicator:
        microbatch = _C.Microbatch(
            ndim=2, batch_dim=0, seq_dim=0, samples=ROWS, shape=[1, HIDDEN], rows_per_sample=1, element_size=4
        )
        forward, backward = (self.group(f"{name}/{way}") for way in ("forward", "backward"))
        if options.get("carrier") == "groups":
            options.update(forward_groups=forward, backward_groups=backward)
        return _C.Communicator(
            name=name,
            source=src.boundary(-1),
            destination=dst.boundary(0),
            ndim=2,
            batch_dim=0,
            seq_dim=0,
            dtype=torch.float32,
            fixed=microbatch if fixed else None,
            timeout=TIMEOUT,
            max_in_flight=4,
            hash=7,
            rank=self.rank,
            group=forward,
            backward_group=backward,
            group_ranks=range(self._world_size),
            max_chunks=3,
            min_chunk_bytes=64,
            **options,
        )


def tensor_of(step: int, lane: int, lanes: int, hidden: int = HIDDEN) -> torch.Tensor:
    whole = torch.arange(ROWS * hidden, dtype=torch.float32).reshape(ROWS, hidden) + 1000 * step
    return whole[ROWS * lane // lanes : ROWS * (lane + 1) // lanes]


def lane_of(layout: Layout, rank: int) -> tuple[int, int] | None:
    lanes = layout.lanes(0)
    return next(((index, len(lanes)) for index, ranks in enumerate(lanes) if rank in ranks), None)


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(got.detach(), expected):
        raise AssertionError(f"expected {expected}, got {got}")


def traffic(rank: Rank, name: str, src: Layout, dst: Layout, hidden: int = HIDDEN, **options: Any) -> None:
    """Many microbatches both ways, in every manner of waiting, while another thread reads what the bridge tells."""
    bridge = rank.open(name, src, dst, **options)
    bridge.start_trace(16)
    over = threading.Event()

    def read() -> None:
        while not over.wait(0.001):
            bridge.counters(True)
            bridge.counters(False)
            bridge.trace_events()
            bridge.flight()

    reader = threading.Thread(target=read)
    reader.start()
    chance = random.Random(rank.rank)
    try:
        source, destination = lane_of(src, rank.rank), lane_of(dst, rank.rank)
        for step in range(0, ROUNDS, 2):
            if source:
                for ahead in (step, step + 1):
                    bridge.send_forward(tensor_of(ahead, *source, hidden))
            if destination:
                handles = [bridge.irecv_forward(waits_soon=chance.random() < 0.5) for _ in range(chance.randrange(3))]
                waits = [await_elsewhere if chance.random() < 0.5 else _C.Communicator.wait for _ in handles]
                received = [wait(bridge, handle) for wait, handle in zip(waits, handles, strict=True)]
                while len(received) < 2:
                    received.append(bridge.recv_forward())
                for ahead, y in zip((step, step + 1), received, strict=True):
                    same(y, tensor_of(ahead, *destination, hidden))
                    sent = bridge.send_backward(2 * y.detach(), want_delivery=chance.random() < 0.5)
                    if sent is not None and chance.random() < 0.5:
                        bridge.wait(sent)
            if source:
                for ahead in (step, step + 1):
                    dx = bridge.wait(bridge.irecv_backward()) if chance.random() < 0.5 else bridge.recv_backward()
                    same(dx, 2 * tensor_of(ahead, *source, hidden))
    finally:
        over.set()
        reader.join()
    bridge.close()


def await_elsewhere(bridge: _C.Communicator, handle: _C.Delivery) -> torch.Tensor:
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(bridge.wait(handle)))
    thread.start()
    thread.join()
    return found[0]


def endings(rank: Rank, name: str, src: Layout, dst: Layout, **options: Any) -> None:
    """Bridges that end while messages are under way: dropped, aborted, left with receives that nobody answers."""
    for number in range(6):
        bridge = rank.open(f"{name}{number}", src, dst, **options)
        source, destination = lane_of(src, rank.rank), lane_of(dst, rank.rank)
        if source:
            for step in range(3):
                bridge.send_forward(tensor_of(step, *source))
        if destination:
            same(bridge.recv_forward(), tensor_of(0, *destination))
            bridge.irecv_forward()
            if number % 2:
                for _ in range(3):  # more than will ever come
                    bridge.irecv_forward()
        rank.meet.wait()  # whoever ends first would take what the others still wait for
        if number % 3 == 0:
            bridge.close(abort=True, reason="this is the end")
        elif number % 3 == 1:
            bridge.leave()
        del bridge
    _C.finish_leftovers(True)


def one_gives_up(rank: Rank, name: str, src: Layout, dst: Layout, fixed: bool = False) -> None:
    """Its peers wait for it meanwhile, in both directions, and hear why."""
    for number in range(8):
        bridge = rank.open(f"{name}{number}", src, dst, fixed)
        gives_up, waits = number % 4, (number % 4 + 2) % 4
        if rank.rank == gives_up:
            bridge.close(abort=True, reason="enough")
        elif rank.rank == waits:
            try:
                source = lane_of(src, rank.rank)
                if source:
                    bridge.send_forward(tensor_of(0, *source))
                bridge.recv_backward() if source else bridge.recv_forward()
                raise AssertionError("received something")
            except BridgeError as error:
                if f"rank {gives_up} gave up: enough" not in str(error):
                    raise AssertionError("expected another reason") from error
            bridge.close(abort=True)
        rank.meet.wait()
        bridge.close()


def run_as_threads(world_size: int, body: Callable[[Rank], None]) -> list[str]:
    """One thread per rank; the tracebacks of those that failed."""
    store, meet = dist.HashStore(), threading.Barrier(world_size, timeout=TIMEOUT.total_seconds())
    failures: list[str] = []

    def run(number: int) -> None:
        try:
            body(Rank(number, world_size, store, meet))
        except BaseException:
            meet.abort()
            failures.append(f"rank {number}: {traceback.format_exc()}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def main() -> int:
    torch.set_num_threads(1)
    fan_in = Layout([0, 1], dp=2, name="a"), Layout([2, 3], tp=2, name="b")
    fan_out = Layout([0, 1], tp=2, name="a"), Layout([2, 3], dp=2, name="b")
    equal = Layout([0, 1], dp=2, name="a"), Layout([2, 3], dp=2, name="b")
    shared = Layout([0, 1, 2], dp=3, name="a"), Layout([2, 3], tp=2, name="b")
    staged = {"carrier": "staged", "copy_delay": timedelta(microseconds=300)}
    groups = {"carrier": "groups"}
    cases: list[tuple[str, Callable[[Rank], None]]] = [
        ("fan-in", lambda rank: traffic(rank, "fan-in", *fan_in)),
        ("fan-out, in chunks", lambda rank: traffic(rank, "fan-out", *fan_out, path="pipelined")),
        ("static", lambda rank: traffic(rank, "static", *fan_in, fixed=True, path="pipelined")),
        ("a rank on both sides", lambda rank: traffic(rank, "shared", *shared)),
        ("payload ahead of its turn", lambda rank: traffic(rank, "wide", *equal, hidden=WIDE)),
        ("endings", lambda rank: endings(rank, "endings", *fan_in)),
        ("staged", lambda rank: traffic(rank, "staged", *fan_in, **staged)),
        ("staged, a rank on both sides", lambda rank: traffic(rank, "staged shared", *shared, **staged)),
        ("staged endings", lambda rank: endings(rank, "staged endings", *fan_in, **staged)),
        ("in groups", lambda rank: traffic(rank, "groups", *fan_out, path="pipelined", **groups)),
        ("endings in groups", lambda rank: endings(rank, "groups endings", *fan_in, **groups)),
        ("endings, static", lambda rank: endings(rank, "static endings", *fan_in, fixed=True)),
        ("one rank gives up", lambda rank: one_gives_up(rank, "one", *equal)),
        ("one rank gives up, static", lambda rank: one_gives_up(rank, "static one", *equal, fixed=True)),
    ]
    wrong = 0
    for name, body in cases:
        failures = run_as_threads(4, body)
        print(f"{name}: {'failed' if failures else 'done'}", flush=True)
        print("\n".join(failures), end="", flush=True)
        wrong += bool(failures)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
