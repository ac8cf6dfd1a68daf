from __future__ import annotations

from unittest.mock import MagicMock, call

import pytest
import torch
import torch.distributed as dist
from launch import launch

from mimo_ext.megatron.builder import (
    EXPERT_VIEW_NAME,
    build_hypercomm_grids,
    is_pp_first_stage,
    is_pp_last_stage,
    populate_embedding_and_position_groups,
)
from mimo_ext.megatron.config import MimoParallelismConfig, ModuleParallelismConfig

LAYOUT = MimoParallelismConfig(
    {
        "images": ModuleParallelismConfig(tensor_model_parallel_size=2, data_parallel_size=2),
        "language": ModuleParallelismConfig(
            pipeline_model_parallel_size=2,
            context_parallel_size=2,
            data_parallel_size=1,
            expert_model_parallel_size=2,
            rank_offset=4,
        ),
    }
)


def test_grids_are_asked_for_as_released_programs_expect(monkeypatch):
    grid_class = MagicMock()
    monkeypatch.setattr("megatron.core.hyper_comm_grid.HyperCommGrid", grid_class)
    grids = build_hypercomm_grids(LAYOUT)
    assert list(grids) == ["images", "language"]
    names = ["tp", "cp", "dp", "pp"]
    assert grid_class.call_args_list == [
        call(shape=[2, 1, 2, 1], dim_names=names, rank_offset=0, backend="nccl"),
        call(shape=[1, 2, 1, 2], dim_names=names, rank_offset=4, backend="nccl"),
    ]
    grid = grid_class.return_value
    assert grid.register_view.call_args_list[1] == call(
        EXPERT_VIEW_NAME, shape=[1, 2, 1, 2], dim_names=["expt_tp", "ep", "expt_dp", "pp"], shared_dims=["pp"]
    )
    base = ["tp", "cp", "pp", "dp", "dp-cp", "tp-cp", "tp-pp", "tp-dp-cp", "tp-cp-dp-pp"]
    expert = ["ep", "expt_tp", "expt_dp", "expt_tp-ep", "expt_tp-ep-pp"]
    expected = [call(dims.split("-")) for dims in base]
    expected += [call(dims.split("-"), view="expert") for dims in expert]
    assert grid.create_pg.call_args_list == expected * 2


def test_backend_can_be_given(monkeypatch):
    grid_class = MagicMock()
    monkeypatch.setattr("megatron.core.hyper_comm_grid.HyperCommGrid", grid_class)
    build_hypercomm_grids(LAYOUT, backend="gloo")
    assert {c.kwargs["backend"] for c in grid_class.call_args_list} == {"gloo"}


def test_released_parameter_names(monkeypatch):
    grid_class = MagicMock()
    monkeypatch.setattr("megatron.core.hyper_comm_grid.HyperCommGrid", grid_class)
    assert list(build_hypercomm_grids(megatron_mimo_parallelism_config=LAYOUT)) == list(LAYOUT.module_parallelisms)
    with pytest.raises(TypeError, match="got both 'mimo_parallelism_config' and 'megatron_mimo_parallelism_config'"):
        build_hypercomm_grids(mimo_parallelism_config=LAYOUT, megatron_mimo_parallelism_config=LAYOUT)
    assert populate_embedding_and_position_groups(pp_rank_groups=None) == (None, None)
    assert populate_embedding_and_position_groups(pp_group=None) == (None, None)


def test_embedding_groups_from_rank_lists(monkeypatch, as_rank):
    new_group = MagicMock(side_effect=lambda ranks: f"group of {ranks}")
    monkeypatch.setattr("torch.distributed.new_group", new_group)
    pipelines = [[0, 2, 4], [1, 3, 5]]
    expected = {
        0: ("group of [0]", "group of [0, 4]"),
        3: (None, None),
        4: (None, "group of [0, 4]"),
        5: (None, "group of [1, 5]"),
    }
    for rank, groups in expected.items():
        as_rank(rank)
        new_group.reset_mock()
        assert populate_embedding_and_position_groups(pipelines) == groups
        # Every rank makes every group, in the same order.
        assert [c.kwargs["ranks"] for c in new_group.call_args_list] == [[0], [0, 4], [1], [1, 5]]


def test_embedding_groups_of_one_stage(monkeypatch, as_rank):
    as_rank(7)
    new_group = MagicMock()
    monkeypatch.setattr("torch.distributed.new_group", new_group)
    populate_embedding_and_position_groups([[7]])
    assert [c.kwargs["ranks"] for c in new_group.call_args_list] == [[7], [7]]


@pytest.mark.parametrize("nothing", [None, [], MagicMock(), dist.GroupMember.NON_GROUP_MEMBER])
def test_no_pipelines_no_groups(monkeypatch, nothing):
    monkeypatch.setattr("torch.distributed.new_group", MagicMock(side_effect=AssertionError("not to be called")))
    assert populate_embedding_and_position_groups(nothing) == (None, None)


@pytest.mark.parametrize(("rank", "first", "last"), [(2, True, False), (4, False, False), (6, False, True)])
def test_stage_by_process_group(monkeypatch, as_rank, rank, first, last):
    as_rank(rank)
    monkeypatch.setattr("torch.distributed.get_process_group_ranks", lambda group: [4, 2, 6])
    assert is_pp_first_stage(object()) is first
    assert is_pp_last_stage(object()) is last
    assert is_pp_first_stage(None) is True
    assert is_pp_last_stage(None) is True


def members(group) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


def build_on_rank(rank: int, world_size: int):
    """What one rank sees of real grids, and of embedding groups made in both ways."""
    grids = build_hypercomm_grids(LAYOUT)
    mine = grids["images" if rank < 4 else "language"]
    pipeline = mine.get_pg(["pp"])
    from_group = populate_embedding_and_position_groups(pipeline)
    again = populate_embedding_and_position_groups(pipeline)
    from_lists = [populate_embedding_and_position_groups(grid.get_rank_enum(["pp"])) for grid in grids.values()]
    # Now the first stages have made more groups than the others.
    try:
        populate_embedding_and_position_groups(pipeline)
        error = ""
    except RuntimeError as caught:
        error = str(caught)
    # The groups really connect: a sum over the word-embedding group made from one process group.
    total = None
    if from_group[1] is not None:
        tensor = torch.tensor([float(rank)])
        dist.all_reduce(tensor, group=from_group[1])
        total = tensor.item()
    return {
        "backend": dist.get_backend(mine.get_pg(["tp"])),
        "groups": {dims: members(mine.get_pg(dims.split("-"))) for dims in ("tp", "dp-cp", "tp-cp-dp-pp")},
        "ep": members(mine.get_pg(["ep"], view=EXPERT_VIEW_NAME)),
        "lists": [tuple(map(members, pair)) for pair in from_lists],
        "group": tuple(map(members, from_group)),
        "again": tuple(map(members, again)),
        "error": error,
        "total": total,
        "stage": (is_pp_first_stage(pipeline), is_pp_last_stage(pipeline)),
    }


def test_real_grids_take_the_default_groups_backend():
    ranks = launch(build_on_rank, 8, timeout=60)
    assert {r["backend"] for r in ranks} == {"gloo"}
    assert ranks[3]["groups"] == {"tp": [2, 3], "dp-cp": [1, 3], "tp-cp-dp-pp": [0, 1, 2, 3]}
    assert ranks[6]["groups"] == {"tp": [6], "dp-cp": [6, 7], "tp-cp-dp-pp": [4, 5, 6, 7]}
    assert ranks[6]["ep"] == [6, 7]
    assert ranks[5]["stage"] == (True, False)
    assert ranks[7]["stage"] == (False, True)
    assert ranks[0]["stage"] == (True, True)
    assert ranks[4]["lists"] == [(None, None), ([4], [4, 6])]
    assert ranks[7]["lists"] == [(None, None), (None, [5, 7])]
    for rank, seen in enumerate(ranks):
        assert seen["group"] == seen["again"] == seen["lists"][0 if rank < 4 else 1]
        assert bool(seen["error"]) is (rank >= 4)  # the encoder's pipelines have one stage
    assert "rank 6: embedding groups cannot be made from the process group of ranks [4, 6]" in ranks[6]["error"]
    assert [ranks[r]["total"] for r in (4, 5, 6, 7)] == [10.0, 12.0, 10.0, 12.0]
