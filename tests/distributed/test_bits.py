"""Values to the last bit: what is moved is not changed, and what is summed is summed in one order."""

from __future__ import annotations

import itertools
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from launch import launch

from mimo_ext import Bridge, Layout

TIMEOUT = timedelta(seconds=30)
ROWS, HIDDEN = 24, 16
MOVES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"dp": 2}, {"tp": 2}, {"path": "pipelined", "max_chunks": 3, "min_chunk_bytes": 8}),
    ({"tp": 2}, {"dp": 2}, {"path": "direct"}),
    ({"dp": 2}, {"tp": 2}, {"path": "leader"}),
    ({"tp": 2, "sequence_parallel": True}, {"dp": 2}, {}),
    ({"dp": 2}, {"tp": 2}, {"shape": (ROWS, HIDDEN)}),
]
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}


def any_bits(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every pattern of bits: NaNs of all kinds, both zeros, denormals."""
    size = torch.empty(0, dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    read = torch.randint(0, 256, (ROWS, HIDDEN * size), dtype=torch.uint8, generator=generator).view(dtype)
    read[0, :4] = torch.tensor([float("nan"), -0.0, float("inf"), 0.0], dtype=dtype)
    return read


def part(layout: Layout, rank: int, whole: torch.Tensor) -> torch.Tensor:
    ranks = list(layout.ranks)
    if layout.dp > 1 or layout.sequence_parallel:
        return whole.chunk(2)[ranks.index(rank)]
    return whole


def changed_moves(rank: int, world_size: int) -> list[str]:
    changed = []
    for (src, dst, options), dtype in itertools.product(MOVES, INTEGERS):
        source, destination = Layout(range(2), **src), Layout(range(2, 4), **dst)
        with Bridge(source, destination, dtype=dtype, timeout=TIMEOUT, **options) as bridge:
            x, dy = any_bits(dtype, 1), any_bits(dtype, 2)
            if bridge.is_source:
                bridge.send_forward(part(source, rank, x))
                got, expected = bridge.recv_backward(), part(source, rank, dy)
            else:
                got, expected = bridge.recv_forward().detach(), part(destination, rank, x)
                bridge.send_backward(part(destination, rank, dy))
            assert got is not None
            if not torch.equal(got.view(INTEGERS[dtype]), expected.view(INTEGERS[dtype])):
                changed.append(f"{src} -> {dst} {options} {dtype}")
    return changed


def test_moves_keep_every_bit_forward_and_backward() -> None:
    assert [text for rank in launch(changed_moves, 4) for text in rank] == []


def sums_of_late_contributions(rank: int, world_size: int, path: str, ndim: int) -> list[float]:
    """Each order of arrival in turn: the cp copies of the destination send one after the other."""
    sums = []
    options: dict[str, Any] = {"ndim": 3, "batch_dim": 1} if ndim == 3 else {}
    shape = (4, 2, HIDDEN) if ndim == 3 else (4, HIDDEN)
    source, destination = Layout(range(2), tp=2), Layout(range(2, 5), cp=3)
    with Bridge(source, destination, path=path, timeout=TIMEOUT, **options) as bridge:
        for order in itertools.permutations(range(3)):
            if bridge.is_source:
                bridge.send_forward(torch.zeros(shape))
                dx = bridge.recv_backward()
                assert dx is not None
                assert dx.unique().numel() == 1
                sums.append(dx.flatten()[0].item())
            else:
                bridge.recv_forward()
                copy = rank - 2
                time.sleep(0.06 * order.index(copy))
                # In fp32 1e8 + 1 is 1e8: in ascending order of the copies the sum is 0, in others 1.
                bridge.send_backward(torch.full(shape, (1e8, 1.0, -1e8)[copy]))
    return sums


@pytest.mark.parametrize(("path", "ndim"), [("pipelined", 2), ("direct", 2), ("leader", 3)])
def test_partial_gradients_are_summed_in_the_order_of_the_copies_whichever_comes_first(path: str, ndim: int) -> None:
    in_order = float((torch.tensor(1e8) + 1.0) - 1e8)
    other_order = float((torch.tensor(1e8) - 1e8) + 1.0)
    assert in_order != other_order  # or this could not fail
    found = launch(sums_of_late_contributions, 5, path, ndim)
    assert found[:2] == [[in_order] * 6] * 2
