"""Plain bytes from rank to rank, over any process group.

torch's object collectives unpickle what the peers send: whoever can send to a rank could run code on it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def all_gather_ints(mine: int, group: dist.ProcessGroup | None = None) -> list[int]:
    """One number of each rank of the group, in their order. Collective."""
    device = _device_of(group)
    found = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, torch.tensor([mine], dtype=torch.int64, device=device), group=group)
    return [int(one) for one in found]


def gather_bytes(mine: bytes, dst: int, group: dist.ProcessGroup | None = None) -> list[bytes] | None:
    """What each rank of the group gives, in their order, on global rank `dst`; None on the others. Collective."""
    device = _device_of(group)
    sizes = all_gather_ints(len(mine), group)
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    if mine:
        padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device)
    if dist.get_rank() != dst:
        dist.gather(padded, dst=dst, group=group)
        return None
    found = [torch.empty_like(padded) for _ in sizes]
    dist.gather(padded, found, dst=dst, group=group)
    return [bytes(one[:size].cpu().numpy()) for one, size in zip(found, sizes, strict=True)]


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where the collectives of the group take their tensors."""
    return torch.device(dist.distributed_c10d._get_object_coll_device(group))
