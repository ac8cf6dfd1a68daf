"""The provider on real gloo ranks, with real Megatron modules."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_mimo
import torch
import torch.distributed as dist
from launch import launch


def build_once(rank: int, world_size: int, released: bool) -> dict[str, Any]:
    """How often groups and grids are made while a recipe asks for them in every possible way."""
    from megatron.core.distributed import DistributedDataParallelConfig

    import mimo_ext.megatron as mimo
    from mimo_ext.megatron import provider as provider_module
    from mimo_ext.megatron.provider import MegatronMIMOProvider

    built = []
    original = provider_module.build_hypercomm_grids
    provider_module.build_hypercomm_grids = lambda config: built.append(config) or original(config)
    with mimo.cpu():
        made = tiny_mimo.provider({"tp": 2}, {"dp": 2})
        if released:
            made = MegatronMIMOProvider(
                language_model_spec=made.language_model_spec,
                modality_submodules_spec=made.modality_submodules_spec,
                special_token_ids=made.special_token_ids,
                megatron_mimo_parallelism_config=made.mimo_parallelism_config,
                bf16=False,
            )
            made.build_infra()
        infra = made.get_or_build_infra()
        before = dist.distributed_c10d._world.group_count
        mimo.cpu.manual_seed(rank)  # every rank another seed
        [model] = made.provide_distributed_model(DistributedDataParallelConfig(), data_parallel_random_init=True)
        made.provide()
        after = dist.distributed_c10d._world.group_count
        infra_after = made.build_infra() if released else made.get_or_build_infra()
    weights = dict(model.named_parameters())
    return tiny_mimo.arrays(
        {
            "built": len(built),
            "groups": after - before,
            "same": infra_after is infra,
            "weights": weights,
            "device": str(next(model.parameters()).device),
            "names": infra.participating_modules,
            "seq": model.config.variable_seq_lengths,
        }
    )


@pytest.mark.parametrize("released", [False, True])
def test_groups_are_built_once(released: bool) -> None:
    ranks = launch(build_once, 4, released, timeout=90)
    assert [r["built"] for r in ranks] == [1] * 4
    assert [r["groups"] for r in ranks] == [0] * 4
    assert all(r["same"] for r in ranks)
    assert [r["names"] for r in ranks] == [["images"], ["images"], ["language"], ["language"]]
    assert all(r["seq"] is True for r in ranks)
    # data_parallel_random_init: the replicas on ranks 2 and 3 had different seeds and hold the same weights.
    for name, weight in ranks[2]["weights"].items():
        assert (weight == ranks[3]["weights"][name]).all(), name
    # The encoder's tensor-parallel ranks are no replicas.
    differ = [n for n, w in ranks[0]["weights"].items() if (w != ranks[1]["weights"][n]).any()]
    assert any("linear_qkv.weight" in name for name in differ)


def one_backward(rank: int, world_size: int, precision: dict[str, bool], frozen: bool) -> dict[str, Any]:
    """One rank with both modules: a backward pass, the gradient hooks, and what DDP holds afterwards."""
    from megatron.core.distributed import DistributedDataParallelConfig

    import mimo_ext.megatron as mimo
    from mimo_ext.megatron import parallel_utils as utils

    with mimo.cpu():
        made = tiny_mimo.provider({}, {}, colocated=True)
        made.fp16, made.bf16 = precision.get("fp16", False), precision.get("bf16", False)
        made.freeze_modality_encoders = {"images": frozen}
        made.freeze_modality_projections = {"images": frozen}
        mimo.cpu.manual_seed(3)
        [model] = made.provide_distributed_model(DistributedDataParallelConfig(grad_reduce_in_fp32=True))
        infra = made.get_or_build_infra()
        pairs = utils.get_module_to_grid_tuple(model, infra)
        utils.zero_grad_buffer_for_multimodule(pairs)
        data = tiny_mimo.batch(3)
        if any(precision.values()):
            data["images"] = data["images"].to(torch.float16 if made.fp16 else torch.bfloat16)
        output = tiny_mimo.forward(model, data)
        output.float().mean().backward()
        utils.finalize_model_grads_multimodule([model], infra=infra, module_to_grid_tuple=pairs)
        inner = utils.unwrap_megatron_mimo_model(model)
        norms = {n: float(p.main_grad.norm()) for n, p in inner.named_parameters() if p.requires_grad}
        return {
            "output": str(output.dtype),
            "weights": {str(p.dtype) for p in inner.parameters()},
            "norms": norms,
            "frozen": [n for n, p in inner.named_parameters() if not p.requires_grad],
            "wrapper": type(model).__name__,
            "modules": [type(module).__name__ for module, _ in pairs],
        }


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_ddp_in_every_precision(precision: dict[str, bool], frozen: bool) -> None:
    [seen] = launch(one_backward, 1, precision, frozen, timeout=90)
    dtype = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}.get(next(iter(precision), ""), "torch.float32")
    assert seen["weights"] == {dtype}
    assert seen["output"] == "torch.float32"  # Float16Module gives the loss in fp32
    assert seen["wrapper"] == ("Float16Module" if precision else "MimoModel")
    assert seen["modules"] == ["DistributedDataParallel"] * 2
    # A buffer laid over weights that are cast afterwards would stay zero.
    zero = [name for name, norm in seen["norms"].items() if norm == 0.0]
    assert not [name for name in zero if "qkv.bias" not in name], zero
    assert all(name.startswith("modality_submodules.images") for name in seen["frozen"])
    assert bool(seen["frozen"]) is frozen
    assert [name for name in seen["norms"] if name.startswith("modality_submodules")] == [] or not frozen


def two_encoders(rank: int, world_size: int) -> dict[str, Any]:
    """Two encoders on ranks 0 and 1 (one with DP 2, one with TP 2), the language model on rank 2."""
    import copy

    import mimo_ext.megatron as mimo
    from mimo_ext.megatron.config import MimoParallelismConfig

    with mimo.cpu():
        made = tiny_mimo.provider({"dp": 2}, {"dp": 1})
        made.modality_submodules_spec["video"] = copy.deepcopy(made.modality_submodules_spec["images"])
        made.special_token_ids["video"] = tiny_mimo.IMAGE_TOKEN + 1
        parallelisms = made.mimo_parallelism_config.module_parallelisms
        made.mimo_parallelism_config = MimoParallelismConfig(
            {"images": parallelisms["images"], "video": tiny_mimo.module_sizes({"tp": 2})}
            | {"language": parallelisms["language"]}
        )
        made.finalize()
        mimo.cpu.manual_seed(3)
        model = made.provide()
        if rank == 2:
            return {"modules": list(model.role.modules)}
        ids = torch.full((2, tiny_mimo.SEQ), 1)
        ids[0, :4], ids[1, :8] = tiny_mimo.IMAGE_TOKEN + 1, tiny_mimo.IMAGE_TOKEN
        pictures = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        inputs = {"images": {"clip": {"x": pictures[:2]}}, "video": {"clip": {"x": pictures[2:]}}}
        out, _ = model(ids, modality_inputs=inputs)
        return {
            "modules": list(model.role.modules),
            "shapes": {name: list(t.shape) for name, t in out.items()},
            "counts": {name: list(queue) for name, queue in model.row_counts.items()},
            "qkv": list(model.modality_submodules["video"].encoders["clip"].decoder.layers[0]
                        .self_attention.linear_qkv.weight.shape),
        }  # fmt: skip


def test_encoders_with_different_sizes_on_the_same_ranks() -> None:
    first, second, language = launch(two_encoders, 3, timeout=90)
    assert language["modules"] == ["language"]
    for seen in (first, second):
        assert seen["modules"] == ["images", "video"]
        assert seen["shapes"] == {"images": [8, tiny_mimo.HIDDEN], "video": [4, tiny_mimo.HIDDEN]}
        assert seen["counts"] == {"images": [[0, 8]], "video": [[4, 0]]}
        assert seen["qkv"] == [24, 16]
