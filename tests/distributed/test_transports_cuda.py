"""Transports on a real device: one rank, or several that share the GPU. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launch import launch

import mimo_ext
from mimo_ext import Layout

pytestmark = pytest.mark.gpu


def values(rank: int, world_size: int, transport: str | None) -> str:
    src, dst = Layout(range(2), dp=2, name="images"), Layout(range(2, 4), tp=2, name="language")
    with mimo_ext.Bridge(src, dst, device="cuda", transport=transport) as bridge:
        for step in range(20):
            x = torch.full((8, 256), float(rank + step), device="cuda")
            if bridge.is_source:
                x.mul_(2)  # what the copy has to come after
                bridge.send_forward(x)
                x.data = torch.empty(0, device="cuda")
                assert torch.equal(bridge.recv_backward(), torch.full((8, 256), -2.0 * (rank + step), device="cuda"))
            else:
                y = bridge.recv_forward()
                assert y.is_cuda
                bridge.send_backward(-y.detach())
                assert torch.equal(y[:8], torch.full((8, 256), 2.0 * step, device="cuda"))
                assert torch.equal(y[8:], torch.full((8, 256), 2.0 + 2 * step, device="cuda"))
        with pytest.raises(ValueError, match="expected a tensor on cuda:0, got device cpu"):
            (bridge.send_forward if bridge.is_source else bridge.send_backward)(torch.ones(8, 256))
        return bridge.transport


def test_ranks_that_share_a_gpu_choose_staged_and_get_the_values() -> None:
    assert launch(values, 4, None, leaks=True) == ["staged"] * 4


def alone(rank: int, world_size: int) -> None:
    layouts = Layout([0], name="images"), Layout([0], name="language")
    for transport in ("staged", "nccl"):
        if transport == "nccl" and not dist.is_nccl_available():
            continue
        with mimo_ext.Bridge(*layouts, device="cuda", transport=transport) as bridge:
            for step in range(3):
                x = torch.randn(16, 8, device="cuda")
                bridge.send_forward(x)
                y = bridge.recv_forward()
                assert torch.equal(y.detach(), x)
                bridge.send_backward(y.detach() * step)
                assert torch.equal(bridge.recv_backward(), x * step)


def test_one_rank_alone() -> None:
    launch(alone, 1, leaks=True)
