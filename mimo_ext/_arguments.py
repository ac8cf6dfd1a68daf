"""What the constructor of a bridge checks on its own rank."""

from __future__ import annotations

import hashlib


def digest_of(text: str) -> int:
    """63 bits of a hash that headers carry: of all that is equal on every rank of the bridge."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def axes_of(name: str, ndim: int, batch_dim: int, seq_dim: int | None) -> tuple[int, int]:
    if ndim not in (2, 3):
        raise ValueError(f"bridge '{name}': ndim: expected 2 or 3, got {ndim}")
    if ndim == 2:
        if batch_dim != 0 or seq_dim not in (None, 0):
            raise ValueError(
                f"bridge '{name}': 2-D tensors are [rows, h]: expected batch_dim=0, got {batch_dim}, {seq_dim}"
            )
        return 0, 0
    if seq_dim is None:
        seq_dim = 1 if batch_dim == 0 else 0
    if not 0 <= batch_dim < 3 or not 0 <= seq_dim < 3 or batch_dim == seq_dim:
        raise ValueError(
            f"bridge '{name}': expected two axes of a 3-D tensor, got batch_dim={batch_dim}, seq_dim={seq_dim}"
        )
    return batch_dim, seq_dim
