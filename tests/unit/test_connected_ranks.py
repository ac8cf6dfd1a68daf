"""Which ranks a bridge connects: against a search over all pairs of lanes, and against the plan's messages."""

from __future__ import annotations

import random

import pytest

import mimo_ext
from mimo_ext import _C, Layout
from mimo_ext._agreement import ranks_text
from mimo_ext._groups import connected_ranks


def by_search(source: _C.Boundary, destination: _C.Boundary, rank: int) -> list[int]:
    n, m = len(source.lanes), len(destination.lanes)
    sets = [{rank}]
    for i, sender in enumerate(source.lanes):
        for j, receiver in enumerate(destination.lanes):
            if max(i * m, j * n) < min((i + 1) * m, (j + 1) * n):
                sets.append({*sender, *receiver})
    found = sets[0]
    for _ in range(n + m):
        for one in sets:
            if found & one:
                found |= one
    member = any(rank in lane for lane in (*source.lanes, *destination.lanes))
    return sorted(found) if member else []


def layouts(seed: int) -> tuple[Layout, Layout]:
    pick = random.Random(seed)
    sizes = [{"tp": pick.choice([1, 2, 3]), "dp": pick.choice([1, 2, 3, 4, 6])} for _ in range(2)]
    ranks = [size["tp"] * size["dp"] for size in sizes]
    first = 0 if pick.random() < 0.3 else ranks[0]  # on shared ranks, or behind one another
    return Layout(range(ranks[0]), **sizes[0]), Layout(range(first, first + ranks[1]), **sizes[1])


@pytest.mark.parametrize("seed", range(60))
def test_exactly_the_ranks_that_share_samples_are_connected(seed: int) -> None:
    source, destination = (layout.boundary(stage) for layout, stage in zip(layouts(seed), (-1, 0), strict=True))
    for rank in range(40):
        assert connected_ranks(source, destination, rank) == by_search(source, destination, rank), rank


@pytest.mark.parametrize("seed", range(20))
def test_no_message_of_a_plan_leaves_its_connected_ranks(seed: int) -> None:
    source, destination = (layout.boundary(stage) for layout, stage in zip(layouts(seed), (-1, 0), strict=True))
    for samples in (1, 5, 12):
        microbatch = _C.Microbatch(
            ndim=3, batch_dim=0, seq_dim=1, samples=samples, shape=[samples, 12, 4], element_size=4
        )
        count = 0
        for backward in (False, True):
            plan = mimo_ext.Plan(source, destination, microbatch, backward)
            for rank in range(40):
                mine, connected = plan.for_rank(rank), connected_ranks(source, destination, rank)
                for message in [one for messages in mine.values() for one in messages]:
                    assert {message["sender"], message["receiver"]} <= {*connected}
                    count += 1
        assert count


def test_many_ranks_are_named_in_part() -> None:
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([1, 2]) == "ranks 1, 2"
    assert ranks_text(range(20)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 and 4 more"
