"""A vision-language model small enough for tests: CLIP encoder and GPT of megatron-core, local specs."""

from __future__ import annotations

import math
from typing import Any

import torch

IMAGE_TOKEN = 60
VOCAB = 64
HIDDEN = 32
SEQ = 16
ROWS_PER_IMAGE = 4  # an 8x8 picture in patches of 4x4


class Grid:
    """A grid with nothing but the four attributes that every grid has."""

    def __init__(self, rank_offset: int = 0, *, names=("tp", "cp", "dp", "pp"), **sizes: int) -> None:
        self.rank_offset = rank_offset
        self.dim_names = list(names)
        self.shape = [sizes.get(name, 1) for name in names]
        self.size = math.prod(self.shape)


def config(hidden: int, heads: int, dtype: torch.dtype, per_token: bool, **kwargs: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    defaults = {
        "num_layers": 1,
        "use_cpu_initialization": True,
    }
    return TransformerConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=per_token,
        gradient_accumulation_fusion=False,
        **(defaults | kwargs),
    )


def specs(
    dtype: torch.dtype = torch.float32,
    *,
    language_per_token: bool = False,
    encoder_per_token: bool = False,
    **language: Any,
) -> tuple[Any, dict[str, Any]]:
    """``(language spec, {"images": modality spec})``."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.core.models.vision.multimodal_projector import MultimodalProjector
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    language_spec = ModuleSpec(
        module=GPTModel,
        params={
            "config": config(HIDDEN, 4, dtype, language_per_token, **({"num_layers": 2} | language)),
            "transformer_layer_spec": get_gpt_layer_local_spec(),
            "vocab_size": VOCAB,
            "max_sequence_length": SEQ,
            "position_embedding_type": "learned_absolute",
        },
    )
    encoder = ModuleSpec(
        module=CLIPViTModel,
        params={
            "transformer_config": config(16, 2, dtype, encoder_per_token),
            "transformer_layer_spec": get_vit_layer_with_local_spec(),
            "patch_dim": 4,
            "img_h": 8,
            "img_w": 8,
            "ln_pre_impl": WrappedTorchNorm,
            "add_class_token": False,
            "class_token_len": 0,
        },
    )
    projection = ModuleSpec(
        module=MultimodalProjector,
        params={
            "config": config(HIDDEN, 4, dtype, encoder_per_token, ffn_hidden_size=HIDDEN),
            "submodules": MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            "projector_type": "mlp",
            "input_size": 16,
        },
    )
    images = ModuleSpec(
        module=VisionModalitySubmodules,
        params={},
        submodules={"encoders": {"clip": encoder}, "input_projections": [projection]},
    )
    return language_spec, {"images": images}


def provider(
    encoder: dict[str, int] | None,
    language: dict[str, int],
    *,
    bf16: bool = False,
    colocated: bool = False,
    **spec: Any,
) -> Any:
    """Provider of the tiny model. Sizes by dim name. The encoder's ranks come first, or are the language model's.

    ``encoder`` None: a language model alone.
    """
    from mimo_ext.megatron.config import MimoParallelismConfig
    from mimo_ext.megatron.provider import MimoModelProvider

    language_spec, modality_specs = specs(torch.bfloat16 if bf16 else torch.float32, **spec)
    sizes = {}
    if encoder is None:
        modality_specs = {}
    else:
        sizes["images"] = module_sizes(encoder)
    offset = 0 if encoder is None or colocated else math.prod(encoder.values())
    sizes["language"] = module_sizes(language, offset)
    tokens = dict.fromkeys(modality_specs, IMAGE_TOKEN)
    return MimoModelProvider(language_spec, modality_specs, tokens, MimoParallelismConfig(sizes), bf16=bf16)


def module_sizes(sizes: dict[str, int], rank_offset: int = 0) -> Any:
    from mimo_ext.megatron.config import ModuleParallelismConfig

    return ModuleParallelismConfig(
        tensor_model_parallel_size=sizes.get("tp", 1),
        context_parallel_size=sizes.get("cp", 1),
        pipeline_model_parallel_size=sizes.get("pp", 1),
        data_parallel_size=sizes.get("dp", 1),
        rank_offset=rank_offset,
    )


def batch(samples: int, seed: int = 0, max_images: int = 2) -> dict[str, torch.Tensor]:
    """Samples with 0 to ``max_images`` pictures each; ``images[i]`` belongs to sample ``owner[i]``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, IMAGE_TOKEN, (samples, SEQ), generator=generator)
    counts = torch.randint(0, max_images + 1, (samples,), generator=generator)
    counts[0] = max_images  # never a batch without pictures
    for sample, count in enumerate(counts.tolist()):
        ids[sample, 1 : 1 + count * ROWS_PER_IMAGE] = IMAGE_TOKEN
    owner = torch.repeat_interleave(torch.arange(samples), counts)
    return {
        "ids": ids,
        "labels": torch.randint(0, IMAGE_TOKEN, (samples, SEQ), generator=generator),
        "loss_mask": (torch.rand(samples, SEQ, generator=generator) < 0.7).float(),
        "images": torch.randn(int(counts.sum()), 3, 8, 8, generator=generator),
        "owner": owner,
    }


def take(data: dict[str, torch.Tensor], start: int, end: int) -> dict[str, torch.Tensor]:
    """Samples ``[start, end)`` of a batch, with their pictures."""
    mine = (data["owner"] >= start) & (data["owner"] < end)
    part = {name: data[name][start:end] for name in ("ids", "labels", "loss_mask")}
    return part | {"images": data["images"][mine], "owner": data["owner"][mine] - start}


def causal_mask() -> torch.Tensor:
    return torch.triu(torch.ones(SEQ, SEQ), 1).bool()[None, None]


def forward(model: Any, data: dict[str, torch.Tensor], *, with_images: bool = True) -> Any:
    """Run a (wrapped) MimoModel on a batch; returns its output."""
    inputs = {"images": {"clip": {"x": data["images"]}}} if with_images and len(data["images"]) else None
    return model(
        input_ids=data["ids"],
        position_ids=torch.arange(SEQ).expand(len(data["ids"]), SEQ),
        attention_mask=causal_mask(),
        labels=data["labels"],
        modality_inputs=inputs,
    )[0]


def arrays(tree: Any) -> Any:
    """Nested dicts and lists with tensors as numpy arrays, which outlive the process that sends them."""
    if isinstance(tree, dict):
        return {key: arrays(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [arrays(value) for value in tree]
    return tree.detach().clone().numpy() if isinstance(tree, torch.Tensor) else tree
