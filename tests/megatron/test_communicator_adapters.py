"""The 2-D/3-D adapters of the transfers between pipeline stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mimo_ext.megatron.communicator import (
    _prepare_tensor_for_comm,
    _restore_tensor_from_comm,
)


@pytest.mark.parametrize("shape", [(3, 4), (3, 1), (0, 4), (1, 1), (2, 3, 4), (0, 3, 4), (2, 3, 0)])
def test_adapters_undo_one_another(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    there = _prepare_tensor_for_comm(x)
    assert there.shape == ((*shape, 1) if len(shape) == 2 else shape)
    assert there.data_ptr() == x.data_ptr()
    back = _restore_tensor_from_comm(there)
    assert torch.equal(back, x)
    assert back.data_ptr() == x.data_ptr()


def test_adapters_on_lists_and_none() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3, 4)
    there = _prepare_tensor_for_comm([x, None, y])
    assert [None if t is None else tuple(t.shape) for t in there] == [(2, 3, 1), None, (2, 3, 4)]
    back = _restore_tensor_from_comm(there)
    assert torch.equal(back[0], x)
    assert back[1] is None
    assert back[2] is y
    assert _prepare_tensor_for_comm(None) is None
    assert _restore_tensor_from_comm(None) is None


def test_adapters_keep_autograd() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    (_restore_tensor_from_comm(_prepare_tensor_for_comm(x)) * torch.arange(6.0).reshape(2, 3)).sum().backward()
    assert torch.equal(x.grad, torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (torch.zeros(2, 3, 1), ValueError, r"c != 1, got shape \(2, 3, 1\)"),
        ([torch.zeros(2, 3), torch.zeros(5, 1, 1)], ValueError, r"got shape \(5, 1, 1\)"),
        (torch.zeros(3), ValueError, r"2 or 3 dimensions, got shape \(3,\)"),
        (torch.zeros(1, 2, 3, 4), ValueError, r"got shape \(1, 2, 3, 4\)"),
        ("x", TypeError, r"expected a tensor.*got str"),
    ],
)
def test_adapters_refuse(bad: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        _prepare_tensor_for_comm(bad)
