from __future__ import annotations

import pytest

from mimo_ext.megatron.config import MegatronMIMOParallelismConfig, MimoParallelismConfig, ModuleParallelismConfig

BOTH = pytest.mark.parametrize("kind", [MimoParallelismConfig, MegatronMIMOParallelismConfig])


def module(offset=0, dp: int | None = 1, tp=1, cp=1, pp=1, **kwargs):
    return ModuleParallelismConfig(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        rank_offset=offset,
        **kwargs,
    )


def test_sizes_of_a_module():
    sizes = module(tp=2, cp=3, pp=5, dp=7, expert_model_parallel_size=2)
    assert sizes.dense_model_parallel_size == sizes.total_model_parallel_size == 30
    assert sizes.total_ranks == 210
    assert sizes.expert_data_parallel_size == 21


def test_sizes_before_data_parallel_is_known():
    sizes = module(dp=None)
    for name in ("total_ranks", "expert_data_parallel_size"):
        with pytest.raises(ValueError, match="data_parallel_size must be set"):
            getattr(sizes, name)
    with pytest.raises(ValueError, match="must be divisible"):
        _ = module(dp=3, expert_model_parallel_size=2).expert_data_parallel_size


def test_finalize_fills_in_data_parallel():
    sizes = module(dp=None, tp=2, pp=2)
    sizes.finalize(12)
    assert sizes.data_parallel_size == 3
    with pytest.raises(ValueError, match=r"world_size \(10\) is not divisible"):
        module(dp=None, tp=4).finalize(10)
    for world in (None, 0):
        with pytest.raises(ValueError, match="world_size must be provided"):
            module(dp=None).finalize(world)


@pytest.mark.parametrize(
    "name",
    [
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "data_parallel_size",
    ],
)
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
        ModuleParallelismConfig(**{"data_parallel_size": 1, name: value}).finalize(8)


def test_offset_and_experts_are_checked():
    with pytest.raises(ValueError, match="rank_offset must be non-negative, got -1"):
        module(offset=-1).finalize(8)
    with pytest.raises(ValueError, match=r"TP \* CP \* DP must be divisible .*TP=2, CP=1, DP=3, ETP=1, EP=4"):
        module(tp=2, dp=3, expert_model_parallel_size=4).finalize(8)


@BOTH
def test_tiling_layout_is_accepted(kind):
    config = kind({"images": module(tp=2, dp=2), "language": module(offset=4, tp=2, pp=2)})
    config.finalize(8)
    assert config.module_names == ["images", "language"]
    assert config.total_world_size == 8
    assert config.get_parallelism("language").pipeline_model_parallel_size == 2


@BOTH
def test_language_module_is_required_by_its_key(kind):
    with pytest.raises(ValueError, match=r"Language module 'language' must be in module_parallelisms.*\['llm'\]"):
        kind({"llm": module()}).finalize(1)


@BOTH
@pytest.mark.parametrize(
    ("language", "world", "message"),
    [
        (module(offset=3), 4, "no gaps; expected module 'language' to start at rank 2, got 3"),
        (module(offset=2), 4, r"no gaps; covered ranks \[0, 3\), world_size is 4"),
        (module(offset=1), 2, "overlap"),
        (module(offset=2, dp=None), 4, "world_size must be provided to compute data_parallel_size"),
    ],
)
def test_ranges_that_do_not_tile(kind, language, world, message):
    with pytest.raises(ValueError, match=message):
        kind({"images": module(dp=2), "language": language}).finalize(world)


def test_data_parallel_size_of_a_single_module():
    config = MimoParallelismConfig({"language": module(tp=2, dp=None)})
    config.finalize(6)
    assert config.get_parallelism("language").data_parallel_size == 3
    with pytest.raises(ValueError, match="world_size must be provided to compute data_parallel_size"):
        MegatronMIMOParallelismConfig({"language": module(tp=2, dp=None)}).finalize(6)


@BOTH
def test_encoders_stay_dense(kind):
    with pytest.raises(ValueError, match=r"Encoder modules must remain dense.*'images'.*expert_model_parallel_size=2"):
        kind({"images": module(dp=2, expert_model_parallel_size=2), "language": module(offset=2)}).finalize(3)


def test_wrong_size_names_its_module():
    with pytest.raises(ValueError, match="module 'images': tensor_model_parallel_size must be positive"):
        MimoParallelismConfig({"images": module(tp=0), "language": module(offset=1)}).finalize(2)


def test_identical_ranges_are_for_the_documents_class_only():
    modules = {"images": module(dp=4), "audio": module(tp=4), "language": module(tp=2, dp=2)}
    MimoParallelismConfig(modules).finalize(4)
    with pytest.raises(ValueError, match="overlap in heterogeneous deployment"):
        MegatronMIMOParallelismConfig(modules).finalize(4)


def test_partial_overlap_names_both_modules():
    with pytest.raises(ValueError, match=r"overlap in part: module 'language' .*\[2, 4\).*'images' has \[0, 3\)"):
        MimoParallelismConfig({"images": module(dp=3), "language": module(offset=2, dp=2)}).finalize(4)


def test_limits_of_the_old_bridge_are_for_the_released_class_only():
    odd_tp = {"images": module(tp=3), "language": module(offset=3)}
    odd_dp = {"images": module(dp=3), "language": module(offset=3, dp=2)}
    MimoParallelismConfig(odd_tp).finalize(4)
    MimoParallelismConfig(odd_dp).finalize(5)
    with pytest.raises(ValueError, match="'images' has TP=3, but TP size must be a power of 2"):
        MegatronMIMOParallelismConfig(odd_tp).finalize(4)
    with pytest.raises(ValueError, match=r"DP sizes must be divisible between modules.*DP=3.*DP=2"):
        MegatronMIMOParallelismConfig(odd_dp).finalize(5)


def test_one_module_takes_the_whole_world():
    config = MimoParallelismConfig({"language": module(dp=None, tp=2)})
    config.finalize(6)
    assert config.get_parallelism("language").data_parallel_size == 3


@BOTH
def test_without_a_world_size_all_but_its_cover_is_checked(kind):
    config = kind({"images": module(0, dp=2), "language": module(2, dp=4)})
    config.finalize(None)
    assert config.total_world_size == 6
    with pytest.raises(ValueError, match="no gaps"):
        kind({"images": module(0, dp=2), "language": module(3, dp=4)}).finalize(None)
    with pytest.raises(ValueError, match="data_parallel_size"):
        kind({"images": module(0, dp=2), "language": module(2, dp=None)}).finalize(None)
