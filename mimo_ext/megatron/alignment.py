"""Embeddings of several modalities at the positions of their tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

__all__ = ["align"]


def align(
    modality_embeddings: Mapping[str, torch.Tensor], input_ids: torch.Tensor, special_token_ids: Mapping[str, int]
) -> torch.Tensor:
    """What `MimoModel.align_embeddings_by_token_positions` does; see there."""
    if not modality_embeddings:
        raise ValueError("No modality embeddings provided. At least one modality is required.")
    if input_ids.dim() == 1:
        input_ids = input_ids.unsqueeze(0)
    reference = modality_embeddings.get("text", next(iter(modality_embeddings.values())))
    hidden, device = reference.size(-1), reference.device
    ids = input_ids.to(device, non_blocking=True).reshape(-1)

    masks = {name: ids == token_id for name, token_id in special_token_ids.items()}
    no_modality = torch.ones_like(ids, dtype=torch.bool)
    for mask in masks.values():
        no_modality &= ~mask
    masks["text"] = no_modality

    parts: list[torch.Tensor] = []
    # Row of the stacked embeddings for each position; -1 where there is none.
    rows = torch.full_like(ids, -1, dtype=torch.int64)
    first_row = 0
    for name, embeddings in modality_embeddings.items():
        if name not in masks:
            raise ValueError(
                f"No special token ID defined for modality {name}: expected one of {sorted(special_token_ids)}."
            )
        if embeddings.dim() != 2 or embeddings.size(1) != hidden:
            raise ValueError(f"Embeddings of {name}: expected shape [rows, {hidden}], got {list(embeddings.shape)}.")
        count = embeddings.size(0)
        _check_count(name, masks[name], count)
        rows = torch.where(masks[name], masks[name].cumsum(0) + (first_row - 1), rows)
        parts.append(embeddings.to(reference.dtype))
        first_row += count
    for name in special_token_ids:
        if name not in modality_embeddings:
            _check_count(name, masks[name], 0)

    stacked = torch.cat(parts, dim=0)
    if stacked.size(0) == 0:
        # Keeps the graph: a modality without rows still gets its (empty) gradient.
        combined = stacked.new_zeros((ids.numel(), hidden)) + stacked.sum()
    else:
        combined = stacked.index_select(0, rows.clamp(0, stacked.size(0) - 1))
        if "text" not in modality_embeddings:
            combined = combined.masked_fill((rows < 0).unsqueeze(1), 0.0)
    batch, length = input_ids.shape
    return combined.view(batch, length, hidden).transpose(0, 1).contiguous()


def _check_count(name: str, mask: torch.Tensor, count: int) -> None:
    """The positions of a modality against its rows; without a device synchronization on CUDA."""
    positions = mask.sum()
    if mask.device.type == "cpu":
        if int(positions) != count:
            raise ValueError(
                f"Rank {_rank()}: Number of {name} tokens ({int(positions)}) does not match number of {name} "
                f"embeddings ({count})" + (": embeddings of this modality are missing." if count == 0 else ".")
            )
    else:
        torch._assert_async(
            positions == count, f"number of {name} tokens in input_ids does not match its {count} embeddings"
        )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
