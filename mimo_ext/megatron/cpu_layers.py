"""Layers for sequence and context parallelism without Transformer Engine: a norm, a core attention, a layer spec.

Megatron's local layer spec stops at both: its norm refuses ``sequence_parallel``, its attention asserts a
context-parallel size of 1. These do not, so that models with either train on CPU and gloo:

    from mimo_ext.megatron.cpu_layers import get_gpt_layer_local_spec

    spec.params["transformer_layer_spec"] = get_gpt_layer_local_spec()

The norm behind the last layer is not part of a layer spec: build the model under ``mimo_ext.megatron.cpu()``, which
puts `TorchNorm` there too. The weights have the names and shapes of Megatron's local spec.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention as _DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm

__all__ = ["DotProductAttention", "TorchNorm", "get_gpt_layer_local_spec", "zigzag_positions"]


def get_gpt_layer_local_spec(
    num_experts: int | None = None,
    moe_grouped_gemm: bool = False,
    qk_layernorm: bool = False,
    qk_l2_norm: bool = False,
) -> ModuleSpec:
    """Megatron's local spec of a GPT layer with `TorchNorm` and `DotProductAttention` in it.

    Arguments as in megatron-core's function of this name; ``config.normalization`` chooses the kind of norm.
    """
    from megatron.core.models.gpt import gpt_layer_specs

    # Called without its `normalization`, which would change the norm of every later spec of the process.
    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=num_experts,
        moe_grouped_gemm=moe_grouped_gemm,
        qk_layernorm=qk_layernorm,
        qk_l2_norm=qk_l2_norm,
    )
    attention = spec.submodules.self_attention
    parts = attention.submodules
    qk_norms = {
        name: TorchNorm for name in ("q_layernorm", "k_layernorm") if getattr(parts, name) not in (IdentityOp, L2Norm)
    }
    attention = dataclasses.replace(
        attention, submodules=dataclasses.replace(parts, core_attention=DotProductAttention, **qk_norms)
    )
    layer = dataclasses.replace(
        spec.submodules, self_attention=attention, input_layernorm=TorchNorm, pre_mlp_layernorm=TorchNorm
    )
    return ModuleSpec(module=spec.module, params=dict(spec.params or {}), submodules=layer)


class TorchNorm:
    """``torch.nn.LayerNorm`` or ``RMSNorm``, by ``config.normalization``, also under sequence parallelism.

    With ``config.sequence_parallel`` each rank of the TP group normalizes its own part of the sequence, so its weight
    gradients are partial. The weights are marked ``sequence_parallel``: finalize_model_grads sums them over TP.

    Args:
        config: TransformerConfig.
        hidden_size: size of the last dimension.
        eps: added to the variance.

    Raises:
        ValueError: ``config`` asks for a norm that torch does not have; the message names the field.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> torch.nn.Module:
        kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if config.normalization not in kinds:
            raise ValueError(f"normalization: expected one of {sorted(kinds)}, got {config.normalization!r}")
        for field in ("layernorm_zero_centered_gamma", "persist_layer_norm", "memory_efficient_layer_norm"):
            if getattr(config, field, False):
                raise ValueError(f"{field}: expected False for a norm of torch.nn, got True")
        norm = kinds[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class DotProductAttention(_DotProductAttention):
    """Megatron's local core attention, also under context parallelism: K and V are gathered over the CP group.

    Each rank has its queries and all keys and values; the gradients of K and V are reduce-scattered. Tokens are where
    Megatron puts them (`zigzag_positions`), and the causal mask goes by their true positions. Without CP it *is*
    Megatron's local attention.

    Args:
        config: TransformerConfig; ``cp_comm_type`` makes no difference.
        layer_number, attn_mask_type, attention_type, attention_dropout, softmax_scale: as in megatron-core.
        pg_collection: groups ``tp`` and ``cp``; None takes those of parallel_state.

    Raises:
        ValueError: the CP group has not ``config.context_parallel_size`` ranks.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        # The constructor asserts that there is no context parallelism; what it builds does not depend on it.
        local_config = copy.copy(config)
        local_config.context_parallel_size = 1
        super().__init__(
            local_config,
            layer_number,
            attn_mask_type,
            attention_type,
            attention_dropout=attention_dropout,
            softmax_scale=softmax_scale,
            pg_collection=pg_collection,
        )
        self.config = config
        self.cp_group: Any = getattr(pg_collection, "cp", None)
        cp_size = self.cp_group.size() if self.cp_group is not None else 1
        if cp_size != config.context_parallel_size:
            raise ValueError(
                f"attention of layer {layer_number}: expected a context-parallel group of "
                f"{config.context_parallel_size} ranks (config.context_parallel_size), got {cp_size}"
            )
        self._window_size: tuple[int, int] | None = None
        if cp_size > 1:
            softmax = self.scale_mask_softmax
            # Both build masks for the positions 0, 1, 2, ... that queries do not have here.
            self._window_size, softmax.window_size = softmax.window_size, None
            softmax.scaled_masked_softmax_fusion = False

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attention of this rank's queries.

        Args:
            query: ``[s / cp, b, heads, d]`` of this rank's tokens, heads split over TP.
            key, value: ``[s / cp, b, query groups, d]`` of the same tokens.
            attention_mask: bool, True where masked; None under CP, where the causal mask is made here.
            attn_mask_type: not used, as in megatron-core.
            attention_bias, packed_seq_params: None.

        Returns:
            ``[s / cp, b, heads * d]``.

        Raises:
            ValueError: under CP, a mask was given, or the local length is odd (two chunks of equal length are needed).
        """
        if self.config.context_parallel_size > 1 and packed_seq_params is None:
            rank, size = self.cp_group.rank(), self.cp_group.size()
            if attention_mask is not None:
                raise ValueError(
                    f"context-parallel rank {rank} of {size}: expected attention_mask=None (each rank makes the causal "
                    f"mask for its own positions), got one of shape {tuple(attention_mask.shape)}"
                )
            length = query.size(0)
            if length % 2:
                raise ValueError(
                    f"context-parallel rank {rank} of {size}: expected a sequence length divisible by {2 * size}, got "
                    f"{length * size}"
                )
            key = gather_from_sequence_parallel_region(key, tensor_parallel_output_grad=True, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, tensor_parallel_output_grad=True, group=self.cp_group)
            attention_mask = self._mask(length, rank, size, query.device)
        return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)

    def _mask(self, length: int, rank: int, size: int, device: torch.device) -> torch.Tensor | None:
        """``[s / cp, s]``, True where a query must not see a key; keys are in the order of the ranks."""
        queries = zigzag_positions(length, rank, size, device)
        keys = torch.cat([zigzag_positions(length, other, size, device) for other in range(size)])
        ahead = keys[None, :] - queries[:, None]
        if self._window_size is not None:
            before, after = self._window_size
            return (ahead < -before) | (ahead > after)
        return ahead > 0 if self.attn_mask_type == AttnMaskType.causal else None


def zigzag_positions(
    local_length: int, cp_rank: int, cp_size: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Positions in the whole sequence of a context-parallel rank's tokens, int64 ``[local_length]``.

    Of 2 cp chunks of equal length rank r holds chunk r and chunk 2 cp - 1 - r, in this order: under a causal mask all
    ranks have then equally much to do.
    """
    chunk = local_length // 2
    offsets = torch.arange(chunk, device=device)
    return torch.cat([offsets + cp_rank * chunk, offsets + (2 * cp_size - 1 - cp_rank) * chunk])
