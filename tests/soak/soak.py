"""Thousands of microbatches of random shapes through several bridges: does anything grow, slow down, or go wrong?

    PYTHONPATH=tests:tests/soak python tests/soak/soak.py --seconds 600 --json out/soak.json

Four ranks send and receive over three bridges at a time: random row counts, widths, delays, blocking calls and handles,
up to `AHEAD` microbatches ahead, every value compared. After a third of the time the bridges are closed and others with
other layouts are built; after two thirds the first ones again, so that the end can be compared with the beginning.

What would grow and is nobody's leak is kept out by `ENVIRONMENT` and `warm_up`, not by the limits. What is left: the
store of torch's default group keeps the addresses that the ranks of a process group connect to. A loop of six bare
groups of gloo, with nothing of ours, leaves 8 KiB with each round on each rank, and three bridges 6 KiB: two changes of
layouts are a ten-thousandth of the heap.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
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
from levels import Limits, Sample, Samples, faults, heap_bytes, resident_bytes, table

import mimo_ext
from mimo_ext import Layout
from mimo_ext._setup import Setup

WORLD = 4
BLOCK = 50  # microbatches between two looks at the clock, in which all ranks agree
RATE = 10_000 / 600  # microbatches per second that are asked for
SAMPLES = 6
AHEAD = 4  # receives that are posted, at most
IN_FLIGHT = 2 * AHEAD  # microbatches of a bridge that are sent and not yet looked after, at most
HIDDEN = (4, 32, 128)
ROWS, SEQUENCE = 120, 63  # of a sample, at most: 2-D, 3-D
STATIC_ROWS, STATIC_HIDDEN = 16, 32
TIMEOUT = timedelta(seconds=60)

# Of the ranks, from their start. Memory that others keep for later, up to some bound, would be taken for growth:
# * malloc's caches of free blocks, one for each thread, count as live and fill slowly where sizes are random;
# * malloc keeps an arena for each of the threads that come and go with bridges, and malloc_trim returns the free end of
#   the first one alone: resident memory rose by about 1 MiB with each change of layouts, to 10 MiB after 40 of them;
# * torch records its last 2,000 collectives (two in each block here) with their Python stacks, 840 bytes each.
ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1",
    "TORCH_FR_BUFFER_SIZE": "0",
}


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
        options = {"path": self.path, "max_chunks": 3, "min_chunk_bytes": 1024, "max_in_flight": IN_FLIGHT}
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

    What a bridge keeps for the next microbatches (17 KB for each that is in flight to a receiver, 256 KiB for each
    receive that is posted) has its size then; left to chance, it would grow to it for thousands of microbatches.
    """
    parts = [largest(number, edge) for number in range(IN_FLIGHT)]
    rounds = IN_FLIGHT // AHEAD
    if bridge.is_source:
        lane, lanes = place(bridge, False)
        for part in parts:
            counts = part.counts(lane, lanes) if part.ndim == 2 and not edge.static else None
            bridge.send_forward(part.lane(lane, lanes), row_counts=counts)
    dist.barrier()  # before it nothing is received: all of them are in flight
    received: list[torch.Tensor] = []
    for _ in range(rounds if bridge.is_destination else 0):
        activations = [bridge.irecv_forward() for _ in range(AHEAD)]
        received += [handle.wait().detach() for handle in activations]
    for activation in received:
        bridge.send_backward(activation)
    dist.barrier()
    for _ in range(rounds if bridge.is_source else 0):
        gradients = [bridge.irecv_backward() for _ in range(AHEAD)]
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
    samples = Samples()
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
            held = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
            samples.append(Sample(third, BLOCK, *took, resident_bytes(), heap_bytes(), *held))
        for bridge in bridges:
            bridge.close()
        del bridges
    return samples.all()


def going_on(mine: bool, blocks: int, third: int) -> bool:
    """What rank 0 thinks; every third has a few blocks."""
    decision = torch.tensor(int(mine or blocks < 3 * (third + 1)))
    dist.broadcast(decision, 0)
    return bool(decision)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="default %(default)g")
    parser.add_argument("--seed", type=int, default=1, help="of shapes, delays and order (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    options = parser.parse_args(arguments)
    os.environ.update(ENVIRONMENT)
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
