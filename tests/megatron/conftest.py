"""Shared by the tests of the Megatron layer. They need megatron-core: where it is missing they fail, loudly."""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver

import pytest
from tiny_mimo import Grid

# Ranks are forked from a server that has imported Megatron: 0.3 s instead of several seconds of a core for each rank.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch", "torch.distributed", "torch._dynamo", "megatron.core.models.mimo", "megatron.core.optimizer"]
)
forkserver.ensure_running()


@pytest.fixture
def as_rank(monkeypatch):
    """``as_rank(3)`` makes torch.distributed say that this is rank 3, without a process group."""

    def set_rank(rank: int) -> None:
        monkeypatch.setattr("torch.distributed.get_rank", lambda group=None: rank)

    return set_rank


@pytest.fixture
def two_grids():
    """An encoder with tp 2, dp 2 on ranks 0-3 and a language model with tp 2, pp 2 on ranks 4-7."""
    return {"images": Grid(0, tp=2, dp=2), "language": Grid(4, tp=2, pp=2)}
