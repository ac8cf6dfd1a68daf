"""Precision of a model: which, and where it is written down."""

from __future__ import annotations

from typing import Any

import torch


def resolve_dtype(fp16: bool | None, bf16: bool | None, default_fp16: bool, default_bf16: bool) -> torch.dtype:
    """Precision from two flags; None means the default, unless the other flag was set.

    Of the defaults fp16 goes first: a provider with ``fp16=True`` has ``bf16=True`` from its class.

    Raises:
        ValueError: both flags are True.
    """
    if fp16 is None and bf16 is None:
        fp16, bf16 = default_fp16, default_bf16 and not default_fp16
    elif fp16 is None:
        fp16 = default_fp16 and not bf16
    elif bf16 is None:
        bf16 = default_bf16 and not fp16
    if fp16 and bf16:
        raise ValueError("expected at most one of fp16 and bf16, got both True")
    if fp16:
        return torch.float16
    return torch.bfloat16 if bf16 else torch.float32


def set_precision(config: Any, dtype: torch.dtype) -> None:
    """Write the precision into a model's config: Float16Module, DDP and the communicator read it there."""
    config.fp16 = dtype is torch.float16
    config.bf16 = dtype is torch.bfloat16
    config.params_dtype = dtype
    if getattr(config, "pipeline_dtype", None) is None:
        config.pipeline_dtype = dtype


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model in half or bfloat16; fp32 leaves it as it is."""
    if dtype is torch.float16:
        return model.half()
    return model.bfloat16() if dtype is torch.bfloat16 else model
