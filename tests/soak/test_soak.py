"""A few seconds of the soak, and that its verdict can be "no"."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import soak as program
import torch
from launch import launch
from levels import Limits, Sample, Samples, faults, table
from soak import BLOCK, LAYOUTS, WORLD, Microbatch, soak


def test_a_short_soak_is_flat() -> None:
    ranks = launch(soak, WORLD, 3.0, 1, timeout=120)
    # Too short for resident memory and throughput, which the machine's other work moves; the heap is exact.
    limits = Limits(memory=0.01, rate=None, microbatches=3 * 3 * BLOCK)
    small = [[replace(sample, rss=1) for sample in samples] for samples in ranks]
    assert faults(small, limits) == []
    assert {sample.third for sample in ranks[0]} == {0, 1, 2}
    assert len(table(ranks).splitlines()) == 11


def leaking_soak(rank: int, world_size: int, seconds: float, seed: int, size: int) -> list[Sample]:
    """Rank 1 loses `size` bytes with each microbatch."""
    move, malloc = program.move, ctypes.CDLL(None).malloc

    def move_and_leak(bridge: Any, edge: Any, parts: Any, chance: Any) -> None:
        move(bridge, edge, parts, chance)
        for _ in parts if rank == 1 else ():
            malloc(ctypes.c_size_t(size))

    program.move = move_and_leak
    try:
        return soak(rank, world_size, seconds, seed)
    finally:
        program.move = move


def test_a_leak_of_the_heap_is_found() -> None:
    # At least 300 microbatches come after those that the end is compared with: 4 % of the heap.
    ranks = launch(leaking_soak, WORLD, 3.0, 1, 16_000, timeout=120)
    limits = Limits(memory=0.01, rate=None, microbatches=0)
    small = [[replace(sample, rss=1) for sample in samples] for samples in ranks]
    found = faults(small, limits)
    assert any(fault.startswith("rank 1: heap grew by ") for fault in found)
    assert all(fault.startswith("rank 1: heap") for fault in found)


def test_a_small_leak_is_found_in_a_long_run() -> None:
    """Of 64 bytes with each of 40,000 microbatches, beside the heap that torch has anyway."""
    heap, blocks = 93_000_000, 800
    leaks = [replace(s, heap=heap + 64 * BLOCK * index) for index, s in enumerate(flat(blocks))]
    (found,) = faults([leaks], Limits())
    assert found.startswith("rank 0: heap grew by ")
    # What is there from the beginning is none, and the other layouts may need more.
    more = [replace(s, heap=heap + (3_000_000 if s.third == 1 else 0)) for s in flat(blocks)]
    assert faults([more], Limits()) == []


def test_a_leak_that_ends_with_the_second_layouts_is_found() -> None:
    blocks = 60
    leaks = [
        replace(s, heap=s.heap + 100_000 * (i - 20) if s.third == 1 else s.heap) for i, s in enumerate(flat(blocks))
    ]
    (found,) = faults([leaks], LIMITS)
    assert found == "rank 0: heap grew by 2.48% with the second layouts, expected at most 1%"


def test_samples_come_back_as_they_were() -> None:
    kept = Samples()
    for sample in flat(3):
        kept.append(sample)
    assert len(kept) == 3
    assert kept.all() == flat(3)


def flat(blocks: int = 60) -> list[Sample]:
    return [Sample(index * 3 // blocks, 50, 2.0, 1.0, 300_000_000, 50_000_000, 20, 60) for index in range(blocks)]


LIMITS = Limits(microbatches=3000)


def test_a_flat_run_has_no_faults() -> None:
    assert faults([flat(), flat()], LIMITS) == []


@pytest.mark.parametrize("what", ["rss", "heap"])
def test_memory_that_grows_is_found(what: str) -> None:
    # By a thirtieth of a percent per block: less than 1.5 % over the run.
    grows = [replace(s, **{what: int(getattr(s, what) * (1 + index * 3e-4))}) for index, s in enumerate(flat())]
    (found,) = faults([flat(), grows], LIMITS)
    assert found == f"rank 1: {what} grew by 1.25%, expected at most 1%"
    warms_up = [replace(s, **{what: getattr(s, what) // 2}) if index < 10 else s for index, s in enumerate(flat())]
    assert faults([warms_up], LIMITS) == []


@pytest.mark.parametrize("what", ["threads", "descriptors"])
def test_a_thread_or_descriptor_more_is_found(what: str) -> None:
    leaks = [*flat()[:-1], replace(flat()[-1], **{what: 61})]
    (found,) = faults([leaks], LIMITS)
    assert found.startswith(f"rank 0: 61 {what} in the last third")
    # The other layouts may need more.
    middle = [replace(s, **{what: 61}) if s.third == 1 else s for s in flat()]
    assert faults([middle], LIMITS) == []


def test_a_run_that_slows_down_is_found_unless_it_is_one_stall() -> None:
    slower = [replace(s, seconds=2.3) if index >= 54 else s for index, s in enumerate(flat())]
    assert faults([slower], LIMITS) == ["21.7 microbatches/s in the last tenth, 25.0 in the first"]
    stall = [*flat()[:-1], replace(flat()[-1], seconds=60.0)]
    assert faults([stall], LIMITS) == []


def test_a_run_that_is_too_slow_is_found() -> None:
    assert faults([flat()], Limits(microbatches=3001)) == ["expected at least 3001 microbatches, got 3000"]


def test_every_row_of_every_microbatch_is_another() -> None:
    """Or a row that came to the wrong place would not be seen."""
    one, two = Microbatch(0, (5,) * 6, 4, 2).lane(0, 1), Microbatch(1, (5,) * 6, 4, 2).lane(0, 1)
    assert len({tuple(row.tolist()) for row in torch.cat([one, two])}) == 60
    lanes = [Microbatch(0, (5,) * 6, 4, 2).lane(lane, 3) for lane in range(3)]
    assert torch.equal(torch.cat(lanes), one)


def test_the_layouts_have_every_kind() -> None:
    edges = [edge for edges in LAYOUTS for edge in edges]
    assert {edge.ndim for edge in edges} == {2, 3}
    assert any(edge.static for edge in edges)
    assert any(set(edge.src["ranks"]) & set(edge.dst["ranks"]) for edge in edges)
