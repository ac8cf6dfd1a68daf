"""Thousands of microbatches of random shapes through several bridges: does anything grow, slow down, or go wrong?

    PYTHONPATH=tests python tests/soak/soak.py --seconds 600 --json out/soak.json

Four ranks send and receive over three bridges at a time: random row counts, widths, delays, blocking calls and handles,
up to `AHEAD` microbatches ahead, every value compared. After a third of the time the bridges are closed and others with
other layouts are built; after two thirds the first ones again, so that the end can be compared with the beginning.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import launch

import mimo_ext
from mimo_ext import Layout
from mimo_ext._setup import Setup

WORLD = 4
BLOCK = 50  # microbatches between two looks at the clock, in which all ranks agree
RATE = 10_000 / 600  # microbatches per second that are asked for
SAMPLES = 6
AHEAD = 4  # microbatches under way, at most
HIDDEN = (4, 32, 128)
ROWS, SEQUENCE = 120, 63  # of a sample, at most: 2-D, 3-D
STATIC_ROWS, STATIC_HIDDEN = 16, 32
TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Edge:
    """One bridge of the soak. `static`: its shape never changes."""

    name: str
    src: dict[str, Any]
    dst: dict[str, Any]
    ndim: int = 2
    static: bool = False
    path: str = "auto"

    def build(self, setup: Setup) -> mimo_ext.Bridge:
        shape = (SAMPLES * STATIC_ROWS, STATIC_HIDDEN) if self.static else None
        src, dst = Layout(**self.src, name=f"{self.name}1"), Layout(**self.dst, name=f"{self.name}2")
        options = {"path": self.path, "max_chunks": 3, "min_chunk_bytes": 1024}
        return mimo_ext.Bridge(src, dst, ndim=self.ndim, shape=shape, timeout=TIMEOUT, setup=setup, **options)


LAYOUTS = (
    (
        Edge("a", {"ranks": (0, 1), "dp": 2}, {"ranks": (2, 3), "tp": 2}),
        Edge("b", {"ranks": (0,)}, {"ranks": (1, 2, 3), "dp": 3}),
        Edge("c", {"ranks": (2, 3), "dp": 2}, {"ranks": (0, 1), "tp": 2}, ndim=3),
    ),
    (
        Edge("d", {"ranks": (0, 1), "tp": 2}, {"ranks": (2, 3), "dp": 2}, path="pipelined"),
        Edge("e", {"ranks": (1, 3), "dp": 2}, {"ranks": (0, 2), "tp": 2}, static=True),
        Edge("f", {"ranks": (0, 1, 2), "dp": 3}, {"ranks": (2, 3), "dp": 2}),  # rank 2 is on both sides
    ),
)


@dataclass(frozen=True)
class Sample:
    """One rank after one block.

    Attributes:
        third: of the run: 0, 1 (the other layouts), 2.
        seconds: of the block.
        cpu_seconds: of this process in it.
        rss: bytes, resident, after malloc has given back what is free.
        heap: bytes, live in malloc; after a garbage collection.
    """

    third: int
    microbatches: int
    seconds: float
    cpu_seconds: float
    rss: int
    heap: int
    threads: int
    descriptors: int


class _Mallinfo(ctypes.Structure):
    """The first fields of glibc's struct mallinfo2, and room for the others."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        ("uordblks", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 2),
    ]


@functools.cache
def _libc() -> ctypes.CDLL:
    """One for all looks: each CDLL makes a Python type, and hundreds of them would be what grows."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo
    return libc


def heap_bytes() -> int:
    """Live in malloc, of all threads."""
    info = _libc().mallinfo2()
    return int(info.uordblks + info.hblkhd)


def resident_bytes() -> int:
    """Without what malloc keeps free for the next blocks, which depends on the sizes that have met."""
    _libc().malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# One microbatch


@dataclass(frozen=True)
class Microbatch:
    """Of all lanes together. Every rank can compute it from its number."""

    number: int
    rows: tuple[int, ...]  # of each sample
    hidden: int
    ndim: int

    def lane(self, lane: int, lanes: int) -> torch.Tensor:
        """What one lane holds: whole numbers, other ones in every row and microbatch."""
        first, last = lane * SAMPLES // lanes, (lane + 1) * SAMPLES // lanes
        begin, end = sum(self.rows[:first]), sum(self.rows[:last])
        row = torch.arange(begin, end, dtype=torch.float32)[:, None] * 31
        values = (row + torch.arange(self.hidden) * 7 + self.number * 13) % 1021
        return values.reshape(last - first, -1, self.hidden) if self.ndim == 3 else values

    def counts(self, lane: int, lanes: int) -> list[int]:
        return list(self.rows[lane * SAMPLES // lanes : (lane + 1) * SAMPLES // lanes])


def microbatch(number: int, edge: Edge, chance: random.Random) -> Microbatch:
    if edge.static:
        return Microbatch(number, (STATIC_ROWS,) * SAMPLES, STATIC_HIDDEN, edge.ndim)
    hidden = chance.choice(HIDDEN)
    if edge.ndim == 3:
        return Microbatch(number, (1 + chance.randrange(SEQUENCE),) * SAMPLES, hidden, edge.ndim)
    return Microbatch(number, tuple(chance.randrange(ROWS) for _ in range(SAMPLES)), hidden, edge.ndim)


def largest(number: int, edge: Edge) -> Microbatch:
    """No microbatch of `edge` is larger."""
    if edge.static:
        return Microbatch(number, (STATIC_ROWS,) * SAMPLES, STATIC_HIDDEN, edge.ndim)
    return Microbatch(number, (SEQUENCE if edge.ndim == 3 else ROWS,) * SAMPLES, max(HIDDEN), edge.ndim)


def place(bridge: mimo_ext.Bridge, destination: bool) -> tuple[int, int]:
    """This rank's lane, and how many there are."""
    lanes = (bridge.dst if destination else bridge.src).lanes(0)
    return next(lane for lane, ranks in enumerate(lanes) if bridge.rank in ranks), len(lanes)


def warm_up(bridge: mimo_ext.Bridge, edge: Edge) -> None:
    """As much as will ever be under way, at once.

    What a bridge keeps for the next microbatches has its size then; left to chance, it would grow to it for thousands
    of microbatches.
    """
    parts = [largest(number, edge) for number in range(AHEAD)]
    activations = [bridge.irecv_forward() for _ in parts] if bridge.is_destination else []
    dist.barrier()
    if bridge.is_source:
        lane, lanes = place(bridge, False)
        for part in parts:
            counts = part.counts(lane, lanes) if part.ndim == 2 and not edge.static else None
            bridge.send_forward(part.lane(lane, lanes), row_counts=counts)
    received = [handle.wait().detach() for handle in activations]
    gradients = [bridge.irecv_backward() for _ in parts] if bridge.is_source else []
    dist.barrier()
    for activation in received:
        bridge.send_backward(activation)
    for handle in gradients:
        handle.wait()


def move(bridge: mimo_ext.Bridge, edge: Edge, parts: Sequence[Microbatch], chance: random.Random) -> None:
    """Some microbatches forward, then their gradients back; every value is compared."""
    handles = chance.random() < 0.5
    delay = random.random  # each rank its own
    if bridge.is_source:
        lane, lanes = place(bridge, False)
        for part in parts:
            counts = part.counts(lane, lanes) if part.ndim == 2 and not edge.static else None
            bridge.send_forward(part.lane(lane, lanes), row_counts=counts)
            pause(delay())
    if bridge.is_destination:
        lane, lanes = place(bridge, True)
        posted = [bridge.irecv_forward() for _ in parts] if handles else []
        for number, part in enumerate(parts):
            y = posted[number].wait() if handles else bridge.recv_forward()
            same(y.detach(), part.lane(lane, lanes), bridge, part, "activation")
            bridge.send_backward(2 * y.detach())
            pause(delay())
    if bridge.is_source:
        lane, lanes = place(bridge, False)
        posted = [bridge.irecv_backward() for _ in parts] if handles else []
        for number, part in enumerate(parts):
            dx = posted[number].wait() if handles else bridge.recv_backward()
            same(dx, 2 * part.lane(lane, lanes), bridge, part, "gradient")


def pause(chance: float) -> None:
    if chance < 0.02:
        time.sleep(chance)  # up to 20 ms


def same(got: torch.Tensor, expected: torch.Tensor, bridge: mimo_ext.Bridge, part: Microbatch, what: str) -> None:
    if not torch.equal(got, expected):
        raise AssertionError(f"{bridge!r}, rank {bridge.rank}: {what} of microbatch {part.number} {part.rows} is wrong")


# The run of one rank


def soak(rank: int, world_size: int, seconds: float, seed: int) -> list[Sample]:
    """All ranks take the same steps until rank 0 says that the time is over."""
    random.seed(1000 * seed + rank)
    chance = random.Random(seed)  # the same on every rank
    samples: list[Sample] = []
    began = time.monotonic()
    number = 0
    for third in range(3):
        edges = LAYOUTS[third % 2]
        with Setup(f"third {third}") as setup:
            bridges = [edge.build(setup) for edge in edges]
        for bridge, edge in zip(bridges, edges, strict=True):
            warm_up(bridge, edge)
        while going_on(time.monotonic() - began < seconds * (third + 1) / 3, len(samples), third):
            block_began, cpu_began = time.monotonic(), time.process_time()
            last = number + BLOCK
            while number < last:
                which = chance.randrange(len(edges))
                count = min(chance.randrange(1, AHEAD + 1), last - number)
                parts = [microbatch(number + index, edges[which], chance) for index in range(count)]
                move(bridges[which], edges[which], parts, chance)
                number += count
            dist.barrier()
            took = time.monotonic() - block_began, time.process_time() - cpu_began
            gc.collect()
            samples.append(
                Sample(
                    third,
                    BLOCK,
                    *took,
                    resident_bytes(),
                    heap_bytes(),
                    len(os.listdir("/proc/self/task")),
                    len(os.listdir("/proc/self/fd")),
                )
            )
        for bridge in bridges:
            bridge.close()
        del bridges
    return samples


def going_on(mine: bool, blocks: int, third: int) -> bool:
    """What rank 0 thinks; every third has a few blocks."""
    decision = torch.tensor(int(mine or blocks < 3 * (third + 1)))
    dist.broadcast(decision, 0)
    return bool(decision)


# What it shows


@dataclass(frozen=True)
class Limits:
    """What a soak must keep.

    Attributes:
        memory: growth of resident memory and of the heap, as a fraction.
        rate: loss of throughput from the first to the last tenth, as a fraction; None: not looked at.
        microbatches: at least so many.
    """

    memory: float = 0.01
    rate: float | None = 0.10
    microbatches: int = 10_000


def tenth(samples: Sequence[Sample], which: int) -> Sequence[Sample]:
    """One tenth of a run. `which` 0 to 9."""
    return samples[len(samples) * which // 10 : max(1 + len(samples) * which // 10, len(samples) * (which + 1) // 10)]


def rate(samples: Sequence[Sample]) -> float:
    """Microbatches per second: of the middle block, since a stall of the machine says nothing."""
    return statistics.median(sample.microbatches / sample.seconds for sample in samples)


def growth(values: Sequence[int]) -> float:
    """Of the last tenth against what it was after the warm-up, the first fifth, as a fraction."""
    count = len(values)
    early = statistics.median(values[count // 5 : max(count // 5 + 1, count * 2 // 5)])
    return statistics.median(values[-max(1, count // 10) :]) / early - 1


def faults(ranks: Sequence[Sequence[Sample]], limits: Limits) -> list[str]:
    """What is not as it must be, in words."""
    found = []
    total = sum(sample.microbatches for sample in ranks[0])
    if total < limits.microbatches:
        found.append(f"expected at least {limits.microbatches} microbatches, got {total}")
    for rank, samples in enumerate(ranks):
        for what in ("rss", "heap"):
            grown = growth([getattr(sample, what) for sample in samples])
            if grown > limits.memory:
                found.append(f"rank {rank}: {what} grew by {grown:.2%}, expected at most {limits.memory:.0%}")
        for what in ("threads", "descriptors"):
            # The first layouts are built again in the last third: as many as before.
            first = max(getattr(sample, what) for sample in samples if sample.third == 0)
            last = max(getattr(sample, what) for sample in samples if sample.third == 2)
            if last > first:
                found.append(f"rank {rank}: {last} {what} in the last third, {first} in the first")
    if limits.rate is not None:
        first, last = rate(tenth(ranks[0], 0)), rate(tenth(ranks[0], 9))
        if last < first * (1 - limits.rate):
            found.append(f"{last:.1f} microbatches/s in the last tenth, {first:.1f} in the first")
    return found


def table(ranks: Sequence[Sequence[Sample]]) -> str:
    """One line per tenth: of memory, threads and descriptors the most of all ranks."""
    lines = ["tenth  layouts  microbatches    per s   cpu ms  RSS MiB  heap MiB  threads  descriptors"]
    for which in range(10):
        parts = [tenth(samples, which) for samples in ranks]
        count = sum(sample.microbatches for sample in parts[0])
        cpu = sum(sample.cpu_seconds for part in parts for sample in part) / count

        def most(what: str, of: Sequence[Sequence[Sample]] = parts) -> int:
            return max(int(getattr(sample, what)) for part in of for sample in part)

        layouts = "second" if parts[0][-1].third == 1 else "first"
        lines.append(
            f"{which + 1:>5}  {layouts:>7}  {count:>12}  {rate(parts[0]):>7.1f}  {1e3 * cpu:>7.2f}  "
            f"{most('rss') / 2**20:>7.1f}  {most('heap') / 2**20:>8.3f}  {most('threads'):>7}"
            f"  {most('descriptors'):>11}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="default %(default)g")
    parser.add_argument("--seed", type=int, default=1, help="of shapes, delays and order (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    options = parser.parse_args(arguments)
    # malloc's caches of free blocks, one for each thread, count as live and fill slowly where sizes are random. Read by
    # the ranks' C library when they start.
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.tcache_count=0"
    ranks = launch(soak, WORLD, options.seconds, options.seed, timeout=2 * options.seconds + 120)
    limits = Limits(microbatches=int(RATE * options.seconds))
    wrong = faults(ranks, limits)
    print(table(ranks))
    verdict = [f"FAILED: {fault}" for fault in wrong] or ["flat: memory, threads, descriptors, throughput"]
    print("\n".join(["", *verdict]))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"seconds": options.seconds, "seed": options.seed, "limits": asdict(limits), "faults": wrong}
        options.json.write_text(json.dumps({**found, "ranks": [[asdict(s) for s in rank] for rank in ranks]}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
