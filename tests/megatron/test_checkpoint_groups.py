"""What a checkpoint of the provider's model asks of it: shards and replicas by the grids, without global groups."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_mimo
from launch import launch

QKV = "modality_submodules.images.module.encoders.clip.decoder.layers.0.self_attention.linear_qkv.weight"
NORM = "modality_submodules.images.module.encoders.clip.ln_pre.weight"
PROJECTION = "modality_submodules.images.module.input_projections.0.encoder.linear_fc2.weight"
EMBEDDING = "language_model.module.embedding.word_embeddings.weight"


def shards(rank: int, world_size: int, released: bool) -> dict[str, Any]:
    """Shape, place and replica of each parameter, of an encoder with TP 2 and a language model with DP 2."""
    from megatron.core.distributed import DistributedDataParallelConfig

    import mimo_ext.megatron as mimo
    from mimo_ext.megatron.provider import MegatronMIMOProvider

    with mimo.cpu():
        made = tiny_mimo.provider({"tp": 2}, {"dp": 2})
        if released:
            made = MegatronMIMOProvider(
                language_model_spec=made.language_model_spec,
                modality_submodules_spec=copy.copy(made.modality_submodules_spec),
                special_token_ids=made.special_token_ids,
                megatron_mimo_parallelism_config=made.mimo_parallelism_config,
                bf16=False,
            )
        mimo.cpu.manual_seed(3)
        [model] = made.provide_distributed_model(DistributedDataParallelConfig())
        sharded = model.sharded_state_dict()
        parameters = {name for name, _ in model.named_parameters()}
    return {
        "absent": sorted(parameters - set(sharded)),
        "shards": {
            name: (tuple(sharded[name].global_shape), tuple(sharded[name].global_offset), sharded[name].replica_id)
            for name in (QKV, NORM, PROJECTION, EMBEDDING)
            if name in sharded
        },
    }


@pytest.mark.parametrize("released", [False, True])
def test_each_module_is_sharded_by_its_own_grid(released: bool) -> None:
    ranks = launch(shards, 4, released, timeout=90)
    assert [rank["absent"] for rank in ranks] == [[]] * 4
    # The encoder: a half each of what TP splits, a second copy of what it does not. The leading dim counts layers.
    for tp, rank in enumerate(ranks[:2]):
        assert rank["shards"] == {
            QKV: ((1, 48, 16), (0, 24 * tp, 0), (0, 0, 0)),
            NORM: ((16,), (0,), (0, tp, 0)),
            PROJECTION: ((32, 32), (0, 16 * tp), (0, 0, 0)),
        }
    # The language model: two copies of the whole.
    for dp, rank in enumerate(ranks[2:]):
        assert rank["shards"] == {EMBEDDING: ((64, 32), (0, 0), (0, 0, dp))}
