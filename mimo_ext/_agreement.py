"""How the ranks compare what they were given, before a bridge creates anything."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import torch
import torch.distributed as dist

from ._extension import _C

_AGREEMENT_BYTES = 2048


def require_cpu_backend(name: str, group: Any) -> None:
    """The ranks agree over CPU tensors before the bridge makes its own group."""
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError as error:
        raise RuntimeError(
            f"bridge '{name}': expected a process group that takes CPU tensors, got one without ({error}); "
            'use init_process_group("cpu:gloo,cuda:nccl")'
        ) from error


def refuse_bridge(name: str, error: Exception, group: dist.ProcessGroup | None = None) -> None:
    """Collective: what a rank calls in place of the constructor of `Bridge` that the others are in.

    Their constructors raise ValueError with the text of `error`; this rank raises its own error after the call.
    """
    with contextlib.suppress(ValueError):
        agree(name, group, f"refused: {error}", 0)


def agree(name: str, group: dist.ProcessGroup | None, text: str, layouts: int) -> int:
    """Hash of everything that must be equal on all ranks, after comparing it with theirs."""
    exact = f"{text}#{layouts}#{_C.TORCH_VERSION}"
    digest = int.from_bytes(hashlib.sha256(exact.encode()).digest()[:8], "little") >> 1
    count = dist.get_world_size(group)
    mine = torch.tensor([digest], dtype=torch.int64)
    digests = [torch.empty_like(mine) for _ in range(count)]
    dist.all_gather(digests, mine, group=group)
    if all(int(other) == digest for other in digests):
        return digest
    line = torch.zeros(_AGREEMENT_BYTES, dtype=torch.uint8)
    data = text.encode()[:_AGREEMENT_BYTES]
    line[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    lines = [torch.empty_like(line) for _ in range(count)]
    dist.all_gather(lines, line, group=group)
    texts = [bytes(other.numpy()).rstrip(b"\0").decode(errors="replace") for other in lines]
    # All ranks name the same two: the first rank, and the first that differs from it.
    other = next(index for index in range(count) if int(digests[index]) != int(digests[0]))
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    raise ValueError(
        f"bridge '{name}', rank {dist.get_rank()}: the ranks describe different bridges: "
        f"expected (rank {ranks[0]}) {texts[0]!r}, got (rank {ranks[other]}) {texts[other]!r}"
    )
