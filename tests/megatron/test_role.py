from __future__ import annotations

from unittest.mock import Mock

import pytest
from megatron.core.models.mimo.config.role import ModuleLayout as ReleasedLayout
from tiny_mimo import Grid

from mimo_ext.megatron.role import MIMO_LANGUAGE_MODULE_KEY, ModuleLayout, ModuleStageInfo, RankRole, logger


def test_names_of_the_document():
    assert MIMO_LANGUAGE_MODULE_KEY == "language"
    assert logger.name == "mimo_ext.megatron.role"
    assert [layout.value for layout in ModuleLayout] == ["unified", "non_colocated", "colocated"]


def test_unified_runs_every_module_whole():
    role = RankRole.unified(["images", "audio", "language"])
    assert role.mode is ModuleLayout.UNIFIED
    assert role.modules == {name: ModuleStageInfo(True, True) for name in ("images", "audio", "language")}
    assert role.modality_module_names == ["images", "audio"]
    assert role.has_modality_modules is True
    assert role.has_language_module is True


def test_default_role_is_empty():
    role = RankRole()
    assert role.mode is ModuleLayout.UNIFIED
    assert role.has_modality_modules is False
    assert role.has_language_module is False
    assert role.is_first_stage("language") is False
    assert role.is_last_stage("language") is False


@pytest.mark.parametrize(
    ("rank", "modules"),
    [
        (0, {"images": (True, True)}),
        (3, {"images": (True, True)}),
        (4, {"language": (True, False)}),
        (5, {"language": (True, False)}),
        (6, {"language": (False, True)}),
        (7, {"language": (False, True)}),
    ],
)
def test_stage_of_each_rank_needs_no_process_group(as_rank, two_grids, rank, modules):
    as_rank(rank)
    role = RankRole.from_grid_map(two_grids, ["images"])
    assert role.mode is ModuleLayout.NON_COLOCATED
    assert {name: (s.is_first_stage, s.is_last_stage) for name, s in role.modules.items()} == modules
    assert role.has_language_module is ("language" in modules)


def test_middle_stage_is_neither_first_nor_last(as_rank):
    as_rank(3)
    role = RankRole.from_grid_map({"language": Grid(0, tp=2, pp=3)}, [])
    assert role.modules == {"language": ModuleStageInfo(False, False)}
    assert role.mode is ModuleLayout.NON_COLOCATED


def test_pp_need_not_be_the_last_dim(as_rank):
    grid = Grid(0, names=("tp", "pp", "dp"), tp=2, pp=2, dp=2)
    stages = []
    for rank in range(8):
        as_rank(rank)
        stages.append(RankRole.from_grid_map({"language": grid}, []).is_last_stage("language"))
    assert stages == [False, False, True, True] * 2


def test_grid_without_pp_is_one_stage(as_rank):
    as_rank(1)
    role = RankRole.from_grid_map({"language": Grid(0, names=("tp", "dp"), tp=2)}, [])
    assert role.modules == {"language": ModuleStageInfo(True, True)}


def test_grid_without_shape_is_asked_for_its_group(as_rank):
    as_rank(1)
    grid = Mock(spec=["rank_offset", "size", "dim_names", "get_pg"])
    grid.rank_offset, grid.size, grid.dim_names = 0, 4, ["pp"]
    grid.get_pg.return_value.rank.return_value = 3
    grid.get_pg.return_value.size.return_value = 4
    assert RankRole.from_grid_map({"language": grid}, []).modules["language"] == ModuleStageInfo(False, True)
    grid.get_pg.assert_called_once_with("pp")


def test_identical_ranges_are_colocated_with_their_true_stages(as_rank):
    as_rank(3)
    role = RankRole.from_grid_map({"images": Grid(0, dp=4), "language": Grid(0, tp=2, pp=2)}, ["images"])
    assert role.mode is ModuleLayout.COLOCATED
    assert role.modules == {"images": ModuleStageInfo(True, True), "language": ModuleStageInfo(False, True)}


def test_partial_overlap_is_colocated(as_rank):
    as_rank(0)
    role = RankRole.from_grid_map({"images": Grid(0, dp=3), "language": Grid(2, dp=2)}, ["images"])
    assert role.mode is ModuleLayout.COLOCATED
    assert list(role.modules) == ["images"]


def test_encoders_may_share_ranks_with_each_other(as_rank):
    as_rank(1)
    grids = {"images": Grid(0, dp=2), "audio": Grid(0, tp=2), "language": Grid(2, dp=2)}
    role = RankRole.from_grid_map(grids, ["images", "audio"])
    assert role.mode is ModuleLayout.NON_COLOCATED
    assert role.modality_module_names == ["images", "audio"]
    assert RankRole.build(["images", "audio"], grids).mode is ReleasedLayout.NON_COLOCATED


@pytest.mark.parametrize(
    ("keys", "names"), [(["images"], ["images"]), (["images", "language", "audio"], ["images"]), ([], [])]
)
def test_wrong_keys_name_both_sets(as_rank, keys, names):
    as_rank(0)
    with pytest.raises(ValueError, match=r"expected .*language.*got") as error:
        RankRole.from_grid_map({key: Grid(0) for key in keys}, names)
    assert str(sorted(keys)) in str(error.value)
    missing, extra = set(names) | {"language"}, set(keys)
    assert f"Missing: {sorted(missing - extra)}, extra: {sorted(extra - missing)}" in str(error.value)


def test_rank_in_no_grid(as_rank, two_grids):
    as_rank(8)
    with pytest.raises(RuntimeError, match=r"Rank 8 is not in any module grid.*'language': \(4, 8\)"):
        RankRole.from_grid_map(two_grids, ["images"])
    with pytest.raises(RuntimeError, match="not in any module grid"):
        RankRole.build(["images"], two_grids)


@pytest.mark.parametrize("grids", [None, {}])
def test_released_role_without_grids(grids):
    role = RankRole.build(["images"], grids)
    assert role.mode is ReleasedLayout.COLOCATED
    assert role.modules == {"images": ModuleStageInfo(True, True), "language": ModuleStageInfo(True, True)}


def test_released_role_of_disjoint_grids(as_rank, two_grids):
    as_rank(6)
    role = RankRole.build(["images"], two_grids)
    assert role.mode is ReleasedLayout.NON_COLOCATED
    assert role.modules == {"language": ModuleStageInfo(False, True)}


def test_released_role_of_shared_ranks(as_rank):
    as_rank(0)
    shared = RankRole.build(["images"], {"images": Grid(0, dp=2), "language": Grid(0, tp=2)})
    assert shared.mode is ReleasedLayout.COLOCATED
    assert RankRole.build([], {"language": Grid(0, tp=2)}).mode is ReleasedLayout.COLOCATED
    # A pipeline alone is no colocated layout: its stages differ.
    pipeline = RankRole.build([], {"language": Grid(0, pp=2)})
    assert pipeline.mode is ReleasedLayout.NON_COLOCATED
    assert pipeline.modules == {"language": ModuleStageInfo(True, False)}


def test_released_role_of_a_checked_map(as_rank, two_grids):
    as_rank(6)
    assert RankRole._from_grid_map(two_grids) == RankRole.build(["images"], two_grids)


@pytest.mark.parametrize(
    ("mode", "released"),
    [
        (ModuleLayout.UNIFIED, ReleasedLayout.COLOCATED),
        (ModuleLayout.COLOCATED, ReleasedLayout.COLOCATED),
        (ModuleLayout.NON_COLOCATED, ReleasedLayout.NON_COLOCATED),
        (ReleasedLayout.NON_COLOCATED, ReleasedLayout.NON_COLOCATED),
    ],
)
def test_role_as_released(mode, released):
    role = RankRole({"images": ModuleStageInfo(True, False)}, mode)
    assert role.as_released().mode is released
    assert role.as_released().modules == role.modules


def test_layouts_of_both_generations_compare_by_name():
    assert ModuleLayout.COLOCATED == ReleasedLayout.COLOCATED
    assert ReleasedLayout.NON_COLOCATED == ModuleLayout.NON_COLOCATED
    assert ModuleLayout.COLOCATED != ReleasedLayout.NON_COLOCATED
    assert ModuleLayout.UNIFIED not in {ReleasedLayout.COLOCATED, ReleasedLayout.NON_COLOCATED}
    assert ModuleLayout.COLOCATED in {ReleasedLayout.COLOCATED}
