"""BridgeCommunicator on threads, without transfers: its names, and what it says about leaders and lanes."""

from __future__ import annotations

import inspect
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from communicator_fakes import install, make
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.pipeline_parallel import bridge_communicator as released
from megatron.core.pipeline_parallel.bridge_communicator import CommRole, RankCommInfo
from pipeline_cases import CASES
from pipeline_model import Grid, grid

import mimo_ext.megatron
from mimo_ext.megatron.bridge_communicator import BridgeCommunicator


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`worlds(size)`: a world of threads on which the communicator runs."""
    return partial(install, monkeypatch)


def made(rank: int, src: Any, dest: Any, **options: Any) -> BridgeCommunicator:
    return BridgeCommunicator(src, dest, **options)


def hyper_comm_grid(shape: dict[str, int], rank_offset: int) -> Any:
    return HyperCommGrid(list(shape.values()), list(shape), rank_offset)


DIVIDING = [
    ({"tp": 2, "cp": 1, "pp": 1, "dp": 2}, {"tp": 2, "cp": 1, "pp": 1, "dp": 2}),
    ({"tp": 2, "cp": 1, "pp": 2, "dp": 2}, {"tp": 4, "cp": 1, "pp": 2, "dp": 1}),
    ({"tp": 1, "cp": 1, "dp": 4, "pp": 2}, {"tp": 2, "cp": 1, "dp": 2, "pp": 2}),
    ({"tp": 4, "cp": 1, "pp": 2, "dp": 1}, {"tp": 1, "cp": 1, "pp": 2, "dp": 4}),
    ({"tp": 2, "cp": 1, "pp": 4, "dp": 1}, {"cp": 1, "dp": 4, "tp": 2, "pp": 1}),
    ({"dp": 2, "tp": 2, "cp": 1, "pp": 2}, {"pp": 2, "tp": 1, "dp": 4, "cp": 1}),
]


@pytest.mark.parametrize(("src", "dest"), DIVIDING)
def test_leaders_lanes_and_roles_are_those_of_megatrons_class(
    src: dict[str, int], dest: dict[str, int], worlds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "17")
    src_grid, dest_grid = hyper_comm_grid(src, 0), hyper_comm_grid(dest, 8)
    for rank, ours in enumerate(worlds(17).run(partial(made, src=src_grid, dest=dest_grid))):
        theirs = object.__new__(released.BridgeCommunicator)  # its constructor makes NCCL groups
        theirs.current_rank, theirs.src_grid, theirs.dest_grid, theirs.comm_map = rank, src_grid, dest_grid, {}
        for side, is_src in itertools.product((src_grid, dest_grid), (True, False)):
            expected = theirs.get_boundary_pp_stage_ranks(side, is_src)
            assert ours.get_boundary_pp_stage_ranks(side, is_src) == expected
            assert ours.get_leader_rank(side, is_src) == theirs.get_leader_rank(side, is_src)
            if (side, is_src) in ((src_grid, True), (dest_grid, False)):
                mine = next((lane for lane in expected if rank in lane), [])
                assert (ours.src_grid_broadcast_ranks if is_src else ours.dest_grid_broadcast_ranks) == mine
        theirs.build_comm_map(theirs.get_leader_rank(src_grid, True)[0], theirs.get_leader_rank(dest_grid, False)[0])
        assert ours.comm_map == theirs.comm_map
        assert (ours.src_tp_leaders, ours.src_local_leader_rank) == theirs.get_leader_rank(src_grid, True)
        assert (ours.dest_tp_leaders, ours.dest_local_leader_rank) == theirs.get_leader_rank(dest_grid, False)


def test_a_sender_lists_every_leader_whose_samples_it_shares(worlds: Any) -> None:
    """Three lanes of two samples each to two lanes of three: the middle one goes to both."""
    communicator = worlds(7).run(partial(made, src=grid(0, dp=3), dest=grid(3, tp=2, dp=2)))[0]
    assert communicator.comm_map == {
        0: RankCommInfo(CommRole.SENDER, [3], []),
        1: RankCommInfo(CommRole.SENDER, [3, 5], []),
        2: RankCommInfo(CommRole.SENDER, [5], []),
        3: RankCommInfo(CommRole.RECEIVER, [], [0, 1]),
        4: RankCommInfo(CommRole.MEMBER, [], []),
        5: RankCommInfo(CommRole.RECEIVER, [], [1, 2]),
        6: RankCommInfo(CommRole.MEMBER, [], []),
    }
    assert communicator.comm_map[1].role is CommRole.SENDER


@pytest.mark.parametrize(
    ("side", "boundary", "first", "local"),
    [
        # No cp and no pp in the grid.
        (grid(0, tp=2, dp=2), [[0, 1], [2, 3]], [[0, 1], [2, 3]], [1, 1, 3, 3, None]),
        (grid(0, dp=4), [[0], [1], [2], [3]], [[0], [1], [2], [3]], [0, 1, 2, 3, None]),
        # Context-parallel ranks share the samples of their lane.
        (grid(0, tp=1, cp=2, dp=2), [[0, 1], [2, 3]], [[0, 1], [2, 3]], [1, 1, 3, 3, None]),
        # Ranks of earlier stages have their lane's leader, too.
        (grid(0, dp=2, pp=2), [[2], [3]], [[0], [1]], [2, 3, 2, 3, None]),
        # A further dim that divides the data makes lanes of its own: leaders stay within them.
        (grid(0, tp=1, gtp_remat=2, dp=2), [[0], [1], [2], [3]], [[0], [1], [2], [3]], [0, 1, 2, 3, None]),
        (grid(0, gtp_remat=2, tp=2), [[0, 2], [1, 3]], [[0, 2], [1, 3]], [2, 3, 2, 3, None]),
    ],
)
def test_leaders_stay_within_their_lanes(
    side: Grid, boundary: list[list[int]], first: list[list[int]], local: list[int | None], worlds: Any
) -> None:
    for rank, communicator in enumerate(worlds(5).run(partial(made, src=side, dest=grid(4, tp=1)))):
        assert communicator.get_boundary_pp_stage_ranks(side, is_src=True) == boundary
        assert communicator.get_boundary_pp_stage_ranks(side, is_src=False) == first
        assert communicator.src_tp_leaders == [lane[-1] for lane in boundary]
        assert communicator.src_local_leader_rank == local[rank]
        assert communicator.get_leader_rank(side, is_src=False)[0] == [lane[0] for lane in first]
        senders = {r for r, info in communicator.comm_map.items() if info.role is CommRole.SENDER}
        assert senders == set(communicator.src_tp_leaders)


def test_attributes_defaults_and_positions(worlds: Any) -> None:
    src, dest = grid(0, dp=2), grid(2, dp=1)
    axes = {"s": 0, "b": 1, "h": 2}

    def body(rank: int) -> None:
        default = BridgeCommunicator(src, dest)
        assert (default.src_grid, default.dest_grid) == (src, dest)
        assert (default.dim_mapping, default.tensor_ndim) == ({"s": 1, "b": 0, "h": 2}, 3)
        assert (default.comm_dtype, default.current_rank) == (torch.float32, rank)
        assert (default.src_module_name, default.dest_module_name) == (None, None)
        assert default.bridge.batch_dim == default._batch_dim == 0
        assert [default.is_current_rank_in_grid(side) for side in (src, dest)] == [rank < 2, rank == 2]
        given = BridgeCommunicator(src, dest, axes, torch.bfloat16, "images", "language", 3)
        assert given.dim_mapping is axes
        assert (given.comm_dtype, given.bridge.dtype) == (torch.bfloat16, torch.bfloat16)
        assert (given.src_module_name, given.dest_module_name) == ("images", "language")
        assert given.bridge.batch_dim == given._batch_dim == 1
        assert given.bridge.name == "images -> language"
        flat = BridgeCommunicator(src, dest, axes, tensor_ndim=2)
        assert (flat.tensor_ndim, flat.bridge.ndim, flat._batch_dim) == (2, 2, 0)

    worlds(3).run(body)


def test_is_megatrons_class_and_runs_none_of_its_code(worlds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = released.BridgeCommunicator
    assert issubclass(BridgeCommunicator, parent)
    assert mimo_ext.megatron.BridgeCommunicator is BridgeCommunicator
    assert mimo_ext.megatron.communicator.BridgeCommunicator is BridgeCommunicator
    plain = (property, classmethod, staticmethod)
    members = [name for name, value in vars(parent).items() if inspect.isfunction(value) or isinstance(value, plain)]
    assert len(members) > 15
    assert [name for name in members if name not in vars(BridgeCommunicator)] == []
    for name in members:
        theirs = inspect.signature(getattr(parent, name)) if callable(getattr(parent, name)) else None
        if theirs is not None and not name.startswith("_"):
            mine = inspect.signature(getattr(BridgeCommunicator, name))
            assert list(mine.parameters)[: len(theirs.parameters)] == list(theirs.parameters), name
    constructors = [list(inspect.signature(kind).parameters) for kind in (parent, BridgeCommunicator)]
    assert constructors[1][: len(constructors[0])] == constructors[0]
    # What it keeps per class is not Megatron's.
    assert BridgeCommunicator._broadcast_pg_cache is not parent._broadcast_pg_cache
    assert BridgeCommunicator._bridge_pg_cache is not parent._bridge_pg_cache


def test_edges_of_a_pipeline_are_of_this_class(worlds: Any) -> None:
    case = CASES[2]

    def body(rank: int) -> None:
        communicator = make(case)
        assert [type(edge) for edge in communicator.bridge_comms] == [BridgeCommunicator] * 2
        for edge in communicator.bridge_comms:
            assert edge.src_grid is case.grids[edge.src_module_name]
            assert edge.dest_grid is case.grids["language"]
            assert edge.comm_map[edge.dest_tp_leaders[0]].recv_from_ranks == edge.src_tp_leaders
            assert edge.tensor_ndim == 2
        (info,) = communicator.rank_module_map.values()
        for edge in [*(info.bridge_comms_as_src_module or []), *(info.bridge_comms_as_dest_module or [])]:
            assert any(edge is other for other in communicator.bridge_comms)

    worlds(case.world_size).run(body)


def test_marks_of_unequal_parts_on_a_three_dimensional_tensor_are_refused(worlds: Any) -> None:
    """The batch axis is cut by samples: marks that say otherwise cannot be honoured, others say nothing new."""
    sent: dict[int, torch.Tensor] = {}

    def body(rank: int) -> None:
        communicator = BridgeCommunicator(grid(0, dp=1), grid(1, dp=2), comm_dtype=torch.float32)
        if rank > 0:
            sent[rank] = communicator.recv_forward()
            return
        x = torch.arange(24.0).reshape(4, 3, 2)
        x._mimo_bridge_split_sizes = [1, 3]
        with pytest.raises(ValueError, match=r"rank 0: send_forward: expected a batch axis of equal parts .*\[1, 3\]"):
            communicator.send_forward(x)
        x._mimo_bridge_split_sizes = [2, 2]
        communicator.send_forward(x)

    worlds(3).run(body)
    whole = torch.arange(24.0).reshape(4, 3, 2)
    assert torch.equal(sent[1].detach(), whole[:2])
    assert torch.equal(sent[2].detach(), whole[2:])


def test_steps_through_leaders_say_that_they_do_not_exist(worlds: Any) -> None:
    (communicator,) = worlds(1).run(partial(made, src=grid(0, dp=1), dest=grid(0, dp=1)))
    for name in ("_communicate_shapes", "_split_tensor_at_batch_dim", "_get_or_create_bridge_pg"):
        with pytest.raises(NotImplementedError, match=r"bridge\.plan"):
            getattr(communicator, name)(torch.zeros(2), 2)
