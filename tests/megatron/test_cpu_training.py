"""Megatron's own schedules and optimizers on CPU and gloo, under the switch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import tiny_mimo
import torch
from launch import launch

STEPS = 6


def loss_of(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    loss = (output.float() * loss_mask).sum() / loss_mask.sum()
    return loss, {"loss": float(loss.detach())}


def forward_step(iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    data = next(iterator)
    positions = torch.arange(tiny_mimo.SEQ).expand(len(data["ids"]), tiny_mimo.SEQ)
    output = model(data["ids"], positions, tiny_mimo.causal_mask(), labels=data["labels"])
    return output, partial(loss_of, data["loss_mask"])


def train_language_model(
    rank: int, world_size: int, sizes: dict[str, int], bf16: bool, distributed_optimizer: bool
) -> dict[str, Any]:
    """The language model of the tiny model alone, for a few steps on one batch."""
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.mimo.optimizer import get_mimo_optimizer
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.pipeline_parallel.schedules import (
        forward_backward_no_pipelining,
        forward_backward_pipelining_without_interleaving,
    )

    import mimo_ext.megatron as mimo
    from mimo_ext.megatron.parallel_utils import unwrap_megatron_mimo_model

    with mimo.cpu():
        provider = tiny_mimo.provider(None, sizes, bf16=bf16, use_cpu_initialization=False)
        infra = provider.get_or_build_infra()
        groups = infra.pg_collections["language"]
        mimo.cpu.manual_seed(11, groups)
        [wrapped] = provider.provide_distributed_model(
            DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer, grad_reduce_in_fp32=True)
        )
        model = unwrap_megatron_mimo_model(wrapped)
        language = model.language_model
        config = language.config
        config.variable_seq_lengths = False
        config.finalize_model_grads_func = finalize_model_grads
        optimizer = get_mimo_optimizer(
            model,
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                bf16=bf16,
                params_dtype=config.params_dtype,
                clip_grad=0.5,
                use_distributed_optimizer=distributed_optimizer,
                log_num_zeros_in_grad=True,
            ),
        )
        pipelined = sizes.get("pp", 1) > 1
        schedule: Any = forward_backward_no_pipelining
        extra: dict[str, Any] = {}
        if pipelined:
            schedule = forward_backward_pipelining_without_interleaving
            extra = {"p2p_communicator": P2PCommunicator(groups.pp, config)}
        batches = [tiny_mimo.take(tiny_mimo.batch(4, seed=m), 0, 4) for m in range(2)]
        losses, norms = [], []
        for _ in range(STEPS):
            language.zero_grad_buffer()
            optimizer.zero_grad()
            reduced = schedule(
                forward_step_func=forward_step,
                data_iterator=iter(batches),
                model=[language],
                num_microbatches=2,
                seq_length=tiny_mimo.SEQ,
                micro_batch_size=4,
                forward_only=False,
                pg_collection=groups,
                **extra,
            )
            success, norm, zeros = optimizer.step()
            assert success
            assert zeros is not None
            losses.append(sum(entry["loss"] for entry in reduced))
            norms.append(norm)
        weights = {n: p.float() for n, p in language.named_parameters()}
        kinds = {str(p.dtype) for p in language.parameters()}
    assert torch.zeros(1).type() == "torch.FloatTensor"  # the switch is off again
    return {"losses": losses, "norms": norms, "weights": tiny_mimo.arrays(weights), "kinds": kinds}


@pytest.mark.parametrize(
    ("sizes", "bf16", "distributed_optimizer"),
    [
        ({"pp": 2}, False, False),
        ({"pp": 2}, True, True),
        ({"dp": 2}, True, False),
        ({"tp": 2}, False, True),
    ],
)
def test_language_model_learns(sizes: dict[str, int], bf16: bool, distributed_optimizer: bool) -> None:
    results = launch(train_language_model, 2, sizes, bf16, distributed_optimizer, timeout=90)
    first, last = results
    losses = last["losses"]
    assert losses[-1] < losses[0] - 0.5, losses
    assert first["norms"] == pytest.approx(last["norms"])
    assert first["norms"][0] > 0.5  # so that clipping to 0.5 was really done
    assert first["kinds"] == {"torch.bfloat16" if bf16 else "torch.float32"}
    if "dp" in sizes:
        for name, weight in first["weights"].items():
            assert (weight == last["weights"][name]).all(), name
    if "tp" in sizes:
        shard = "decoder.layers.0.mlp.linear_fc1.weight"
        [name] = [n for n in first["weights"] if n.endswith(shard)]
        assert not (first["weights"][name] == last["weights"][name]).any()
