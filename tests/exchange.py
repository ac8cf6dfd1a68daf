"""What ranks of a test tell one another: as JSON, for nothing that comes from a peer is unpickled, not even here."""

from __future__ import annotations

import json
import time
from typing import Any

import torch
import torch.distributed as dist


def all_gather_json(mine: Any) -> list[Any]:
    """What each rank gives, in their order, on all of them. Collective over the default (gloo) group.

    None, numbers, texts, lists and dicts of them; tuples come back as lists. Numbers are the same to the last bit.
    """
    text = json.dumps(mine).encode()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(text)]))
    padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    texts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(one[: int(size)].numpy())) for one, size in zip(texts, sizes, strict=True)]


def tell(what: str) -> None:
    """Let the other ranks go on that `hear` of it: instead of sleeping for as long as it may take."""
    dist.distributed_c10d._get_default_store().set(f"tests/{what}", "")


def hear(what: str, seconds: float = 30.0) -> None:
    """Wait until a rank has told it. AssertionError where none does."""
    store, deadline = dist.distributed_c10d._get_default_store(), time.monotonic() + seconds
    while not store.check([f"tests/{what}"]):
        assert time.monotonic() < deadline, f"no rank told within {seconds:g} s: {what}"
        time.sleep(0.02)
