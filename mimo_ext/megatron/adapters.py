"""Shapes and marks of tensors on their way: the adapters of Megatron's pipeline communicator for 2-D tensors."""

from __future__ import annotations

from typing import Any

import torch

SPLIT_SIZES_ATTRIBUTE = "_mimo_bridge_split_sizes"  # rows per sample, which Megatron's MimoModel hangs on an output


def is_single_shape(shapes: Any) -> bool:
    """True for one shape of ints, False for None, for a list of shapes and for an unknown shape `()`."""
    return isinstance(shapes, torch.Size) or (
        isinstance(shapes, list | tuple) and len(shapes) > 0 and all(isinstance(extent, int) for extent in shapes)
    )


def _prepare_tensor_for_comm(tensor: Any) -> Any:
    """Give a 2-D tensor a third dimension of size 1; the inverse of `_restore_tensor_from_comm`.

    Args:
        tensor: `[a, b]` (returned as a view `[a, b, 1]`), `[a, b, c]` with c != 1 (returned as it is), a list of such
            tensors, or None.

    Raises:
        ValueError: `[a, b, 1]`, which the receiver could not tell from an expanded `[a, b]`; or other than 2 or 3
            dims.
        TypeError: neither a tensor, a list nor None.
    """
    if tensor is None:
        return None
    if isinstance(tensor, list):
        return [_prepare_tensor_for_comm(item) for item in tensor]
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"expected a tensor, a list of tensors or None, got {type(tensor).__name__}")
    if tensor.ndim == 2:
        return tensor.unsqueeze(-1)
    if tensor.ndim != 3:
        raise ValueError(f"expected a tensor of 2 or 3 dimensions, got shape {tuple(tensor.shape)}")
    if tensor.shape[-1] == 1:
        raise ValueError(
            f"expected [a, b] or [a, b, c] with c != 1, got shape {tuple(tensor.shape)}: between pipeline stages it "
            "could not be told from an expanded 2-D tensor; squeeze its last dimension"
        )
    return tensor


def _restore_tensor_from_comm(tensor: Any) -> Any:
    """Undo `_prepare_tensor_for_comm`: `[a, b, 1]` becomes a view `[a, b]`; other tensors and None stay; lists by
    item.
    """
    if isinstance(tensor, list):
        return [_restore_tensor_from_comm(item) for item in tensor]
    if isinstance(tensor, torch.Tensor) and tensor.ndim == 3 and tensor.shape[-1] == 1:
        return tensor.squeeze(-1)
    return tensor
