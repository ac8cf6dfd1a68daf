"""`mimo_ext.bridge`: a transfer as an operation that autograd knows."""

from __future__ import annotations

from typing import Any

import torch

from ._arguments import checked_type
from .bridge import Bridge
from .row_shards import RowShards

__all__ = ["bridge"]


class _BridgeFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, bridge: Bridge, x: torch.Tensor, options: dict[str, Any], row_shards: RowShards | None
    ) -> torch.Tensor:
        ctx.bridge = bridge
        ctx.x_meta = (x.shape, x.dtype, x.device) if bridge.is_source else None
        # Whether gradients are wanted was decided outside: forward() always runs under no_grad.
        with torch.enable_grad():
            if bridge.is_source:
                bridge.send_forward(x.detach(), **options)
            if bridge.is_destination:
                return bridge.recv_forward(row_shards).detach()
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[None, torch.Tensor | None, None, None]:
        bridge: Bridge = ctx.bridge
        if bridge.is_destination:
            bridge.send_backward(dy.contiguous())
        if not bridge.is_source:
            return None, None, None, None
        dx = bridge.recv_backward()
        if dx is None:
            shape, dtype, device = ctx.x_meta
            dx = torch.zeros(shape, dtype=dtype, device=device)
        return None, dx, None, None


def bridge(
    x: torch.Tensor | None, bridge: Bridge, *, recv_row_shards: RowShards | None = None, **options: Any
) -> torch.Tensor:
    """Differentiable form, called by every rank of both sides: `y = mimo_ext.bridge(x, b)`.

    On destination ranks it returns the received tensor; its backward sends the gradient. On ranks that are only a
    source it returns a zero scalar that stands for the transfer: call `backward()` on it (or add it to the loss) to
    receive `x`'s gradient. On ranks that are only a destination `x` is None. Under `torch.no_grad()` nothing travels
    back.

    Args:
        x: as in `Bridge.send_forward`; None on ranks that only receive.
        options: `row_counts`, `num_samples` and `row_shards` of `Bridge.send_forward`.
        recv_row_shards: `row_shards` of `Bridge.recv_forward`; default those of `options`. A rank that is on both sides
            has other samples on either.

    Raises:
        ValueError: a source rank without `x`; otherwise as the bridge's operations.
    """
    where = f"bridge '{bridge.name}', rank {bridge.rank}"
    if bridge.is_source and x is None:
        raise ValueError(f"{where}: expected a tensor on a source rank, got None")
    if x is not None:
        checked_type(where, "x", x, torch.Tensor, "a tensor")
    row_shards = options.get("row_shards") if recv_row_shards is None else recv_row_shards
    if not torch.is_grad_enabled():
        if bridge.is_source:
            assert x is not None
            bridge.send_forward(x, **options)
        if bridge.is_destination:
            return bridge.recv_forward(row_shards)
        return torch.zeros((), dtype=bridge.dtype, device=bridge.device)
    # A leaf that requires grad keeps the node in the graph also where x is absent or frozen: the peers wait for its
    # backward.
    anchor = torch.zeros((), dtype=bridge.dtype, device=bridge.device, requires_grad=True)
    start = anchor if x is None else x if x.requires_grad else x.detach().requires_grad_()
    return _BridgeFunction.apply(bridge, start, options, row_shards)
