"""What carries the tensors of a bridge, and how its ranks choose it alike. See docs/transports.md."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ._agreement import Meeting, ranks_text, wait_for
from ._extension import has_cuda

# Transport -> how the executor moves tensors. "groups" is the executor of "nccl" over gloo, for tensors of the CPU.
CARRIERS = {"gloo": "direct", "staged": "staged", "nccl": "groups", "groups": "groups"}
_ON_CPU = ("gloo", "staged", "groups")
_ON_CUDA = ("nccl", "staged")


def checked_device(where: str, device: Any) -> torch.device:
    """The device, with its index.

    Raises:
        TypeError: no device. NotImplementedError: one that bridges do not know. RuntimeError: CUDA that is not there.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        text = repr(device)
        text = text if len(text) <= 80 else f"{text[:80]}..."
        raise TypeError(f"{where}: device: expected 'cpu' or 'cuda', got {text}") from None
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise NotImplementedError(f"{where}: device {str(device)!r} is not supported: expected 'cpu' or 'cuda'")
    if not torch.cuda.is_available():
        raise RuntimeError(f"{where}: device {str(device)!r}: torch finds no CUDA device here; use device='cpu'")
    if not has_cuda():
        raise RuntimeError(
            f"{where}: device {str(device)!r}: mimo_ext was built without its CUDA kernels; "
            "build it with MIMO_EXT_CUDA=1"
        )
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def check_transport(where: str, transport: Any, device: torch.device) -> None:
    """ValueError or RuntimeError for a transport that cannot carry tensors of `device` here; None is for `choose`."""
    served = _ON_CPU if device.type == "cpu" else _ON_CUDA
    if transport is not None and transport not in served:
        raise ValueError(
            f"{where}: transport: expected None or one of {', '.join(served)} for tensors on {device.type}, "
            f"got {transport!r}"
        )
    if transport == "nccl" and not dist.is_nccl_available():
        raise RuntimeError(f"{where}: transport 'nccl': this PyTorch was built without NCCL")


def identity_of(device: torch.device) -> str:
    """Which GPU this is, of all in the world."""
    return f"{socket.gethostname()}/{torch.cuda.get_device_properties(device).uuid}"


def choose(meeting: Meeting, bridges: Iterable[tuple[str, torch.device, str | None, Sequence[int]]]) -> list[str]:
    """The transport of each bridge. Every rank of the meeting calls this, with the same bridges in the same order.

    Args:
        bridges: name, this rank's device, what was asked for (None: anything), the ranks of both sides.

    Returns:
        "gloo" on the CPU. On CUDA "nccl" where each of the ranks has a GPU of its own and the default process group
        knows NCCL, else "staged"; on every rank the same.

    Raises:
        ValueError: NCCL was asked for, and ranks share a GPU (which it does not serve).
        RuntimeError: ranks that do not come in time.
    """
    chosen: list[str] = []
    told = False
    for name, device, asked, ranks in bridges:
        if device.type == "cpu" or asked == "staged":
            chosen.append(asked or "gloo")
            continue
        if meeting.store is None:  # of torch's "fake" world: there is nobody else
            chosen.append(asked or "staged")
            continue
        store = dist.PrefixStore("devices", meeting.store)
        if not told and meeting.rank in ranks:
            store.set(str(meeting.rank), identity_of(device))
            told = True
        shared = _sharing(store, meeting, name, ranks)
        if asked is None:
            chosen.append("staged" if shared or not _default_knows_nccl() else "nccl")
            continue
        if shared:
            raise ValueError(
                f"bridge '{name}', rank {meeting.rank}: transport 'nccl': expected one GPU per rank, got one for "
                f"{ranks_text(shared)}; use transport='staged'"
            )
        chosen.append(asked)
    return chosen


def _sharing(store: dist.Store, meeting: Meeting, name: str, ranks: Sequence[int]) -> list[int]:
    """Ranks that have one GPU together: the first such; [] where each has its own."""
    if not wait_for(store, [str(rank) for rank in ranks], meeting.limit):
        missing = [rank for rank in ranks if not store.check([str(rank)])]
        raise RuntimeError(
            f"bridge '{name}', rank {meeting.rank}: waited {meeting.limit.total_seconds():g} s for "
            f"{ranks_text(missing)} to tell their devices"
        )
    by_device: dict[bytes, list[int]] = {}
    for rank in ranks:
        by_device.setdefault(store.get(str(rank)), []).append(rank)
    return next((found for found in by_device.values() if len(found) > 1), [])


def _default_knows_nccl() -> bool:
    return "nccl" in dist.get_backend_config()
