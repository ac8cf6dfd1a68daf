"""The leader + broadcast that `python -m mimo_ext plan` compares with is what Megatron-Core's released class does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.pipeline_parallel import bridge_communicator as released

from mimo_ext import Layout
from mimo_ext.planning import Edge, Links, leader_broadcast

CASES = [
    ({"tp": 2, "cp": 1, "dp": 2, "pp": 1}, {"tp": 2, "cp": 1, "dp": 2, "pp": 1}),
    ({"tp": 2, "cp": 1, "pp": 2, "dp": 2}, {"tp": 4, "cp": 1, "pp": 2, "dp": 1}),
    ({"tp": 1, "cp": 1, "dp": 4, "pp": 2}, {"tp": 2, "cp": 1, "dp": 2, "pp": 2}),
    ({"tp": 4, "cp": 1, "pp": 2, "dp": 1}, {"tp": 1, "cp": 1, "pp": 2, "dp": 4}),
    ({"dp": 2, "tp": 2, "cp": 1, "pp": 2}, {"pp": 2, "tp": 1, "dp": 4, "cp": 1}),
]


def released_class(rank: int, src: Any, dest: Any) -> Any:
    """What its constructor works out, without the process groups that it makes."""
    theirs = object.__new__(released.BridgeCommunicator)
    theirs.current_rank, theirs.src_grid, theirs.dest_grid, theirs.comm_map = rank, src, dest, {}
    theirs.tensor_ndim, theirs.dim_mapping = 3, {"b": 0, "s": 1, "h": 2}
    theirs.build_comm_map(theirs.get_leader_rank(src, True)[0], theirs.get_leader_rank(dest, False)[0])
    return theirs


@pytest.mark.parametrize(("source", "destination"), CASES)
def test_leaders_sizes_and_receivers_are_those_of_the_released_class(
    source: dict[str, int], destination: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    sides = [
        Layout(range(first, first + math.prod(sizes.values())), order=tuple(sizes), name=name, **sizes)
        for first, sizes, name in ((0, source, "images"), (8, destination, "language"))
    ]
    src, dest = (
        HyperCommGrid(list(sizes.values()), list(sizes), layout.ranks[0])
        for sizes, layout in zip((source, destination), sides, strict=True)
    )
    edge = Edge(*sides, samples=8, rows=3, hidden=5, dtype=torch.float32, ndim=3)
    forward, backward = (
        {phase.name: phase.transfers for phase in leader_broadcast(edge, Links(), way, "ring").phases}
        for way in (False, True)
    )

    theirs = released_class(0, src, dest)
    expected = {}
    for rank, info in theirs.comm_map.items():
        if info.role is released.CommRole.SENDER:
            lane = torch.zeros(8 // source["dp"], 3, 5)
            parts = theirs._split_tensor_at_batch_dim(lane, len(info.send_to_ranks))
            expected |= {(rank, to): part.nbytes for to, part in zip(info.send_to_ranks, parts, strict=True)}
    assert {(t.sender, t.receiver): t.size for t in forward["payload"]} == expected
    assert {(t.receiver, t.sender): t.size for t in backward["payload"]} == expected
    assert {(t.sender, t.receiver): t.size for t in forward["shape"]} == dict.fromkeys(expected, 3 * 8)

    # A broadcast reaches all others of the lane, beginning with its leader.
    for way, grid, is_src in ((forward, dest, False), (backward, src, True)):
        leaders = theirs.get_leader_rank(grid, is_src)[0]
        groups = theirs.get_boundary_pp_stage_ranks(grid, is_src)
        reached = {t.receiver for t in way.get("payload in the lane", ())}
        assert reached == {rank for group in groups for rank in group} - set(leaders)
