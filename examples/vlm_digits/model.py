"""The vision-language model: a small vision transformer and a small GPT, both of Megatron-Core's parallel layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.vision_module.vision_module import VisionModule
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from .data import IMAGE, IMAGE_SIZE, PATCH_SIZE, SEQUENCE_LENGTH, TOKENS_PER_IMAGE, VOCAB_SIZE
from .layout import HEADS, LAYERS

IMAGES, LANGUAGE = "images", "language"
ENCODER = "vit"
VISION_HIDDEN, LANGUAGE_HIDDEN = 64, 96
SPECIAL_TOKEN_IDS = {IMAGES: IMAGE}


class DigitViT(VisionModule):
    """Vision transformer over the patches of each image on its own.

    The patch embedding is replicated over the tensor-parallel ranks; the transformer layers are sharded.

    Args:
        transformer_config: configuration of the transformer layers.
        transformer_layer_spec: layer specification without a causal mask.
        pg_collection: process groups of the module this encoder is part of.
    """

    def __init__(
        self,
        transformer_config: TransformerConfig,
        transformer_layer_spec: ModuleSpec,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=transformer_config)
        hidden = transformer_config.hidden_size
        self.patch_embedding = torch.nn.Linear(PATCH_SIZE * PATCH_SIZE, hidden)
        self.position_embedding = torch.nn.Parameter(torch.empty(TOKENS_PER_IMAGE, hidden))
        torch.nn.init.normal_(self.position_embedding, std=0.02)
        self.decoder = TransformerBlock(
            config=transformer_config,
            spec=transformer_layer_spec,
            pre_process=True,
            post_process=True,
            post_layer_norm=True,
            pg_collection=pg_collection,
        )

    def set_input_tensor(self, input_tensor: torch.Tensor) -> None:
        """Hand the hidden states of an earlier pipeline stage to the transformer layers."""
        self.decoder.set_input_tensor(input_tensor)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode ``[N, 8, 8]`` images to ``[N, 4, 64]`` token features, in the precision of the weights."""
        images = images.to(self.position_embedding.dtype)
        side = IMAGE_SIZE // PATCH_SIZE
        patches = images.reshape(-1, side, PATCH_SIZE, side, PATCH_SIZE).transpose(2, 3).flatten(1, 2).flatten(2)
        tokens = self.patch_embedding(patches) + self.position_embedding  # [N, 4, 64]
        hidden = self.decoder(tokens.transpose(0, 1).contiguous(), attention_mask=None)  # [4, N, 64]
        return hidden.transpose(0, 1).contiguous()


def transformer_config(
    hidden_size: int, tp: int = 1, pp: int = 1, dtype: torch.dtype = torch.float32, **overrides: Any
) -> TransformerConfig:
    """Configuration of two layers without dropout whose loss is taken per token."""
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=hidden_size,
        num_attention_heads=HEADS,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        init_method_std=0.06,  # Megatron's default is for hidden sizes of thousands
        use_cpu_initialization=True,  # every rank draws the whole weight and keeps its part: the same for every tp
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
        **overrides,
    )


def language_spec(tp: int = 1, pp: int = 1, dtype: torch.dtype = torch.float32) -> ModuleSpec:
    """The language model. Rotary positions, because image tokens never pass through the word embedding."""
    return ModuleSpec(
        module=GPTModel,
        params={
            "config": transformer_config(LANGUAGE_HIDDEN, tp, pp, dtype),
            "transformer_layer_spec": get_gpt_layer_local_spec(),
            "vocab_size": VOCAB_SIZE,
            "max_sequence_length": SEQUENCE_LENGTH,
            "position_embedding_type": "rope",
        },
    )


def vision_spec(tp: int = 1, dtype: torch.dtype = torch.float32) -> ModuleSpec:
    """The vision encoder and its projection to the language model's width."""
    return ModuleSpec(
        module=VisionModalitySubmodules,
        params={},
        submodules={
            "encoders": {
                ENCODER: ModuleSpec(
                    module=DigitViT,
                    params={
                        "transformer_config": transformer_config(VISION_HIDDEN, tp, dtype=dtype),
                        "transformer_layer_spec": get_vit_layer_with_local_spec(),
                    },
                )
            },
            "input_projections": [
                ModuleSpec(
                    module=MultimodalProjector,
                    params={
                        "config": transformer_config(LANGUAGE_HIDDEN, tp, dtype=dtype, ffn_hidden_size=LANGUAGE_HIDDEN),
                        "submodules": MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
                        "projector_type": "mlp",
                        "input_size": VISION_HIDDEN,
                    },
                )
            ],
        },
    )
