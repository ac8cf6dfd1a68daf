"""What belongs together stays together: headers and row counts of several microbatches, gradients and activations,
tensors that their owner changes as soon as they are received."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from launch import launch

import mimo_ext
from mimo_ext import Layout

SHORT = timedelta(seconds=5)


def bridge_between(src: Layout, dst: Layout, **options) -> mimo_ext.Bridge:
    return mimo_ext.Bridge(src, dst, ndim=2, timeout=SHORT, **options)


def receives_posted_ahead(rank: int, world_size: int) -> None:
    # More samples than row counts fit into a header, and several receives posted before the first is waited for.
    bridge = bridge_between(Layout([0], name="images"), Layout([1], name="language"))
    tensors = [torch.full((80 + k, 2), float(k)) for k in range(4)]
    if bridge.is_source:
        for k, x in enumerate(tensors):
            bridge.send_forward(x, row_counts=[1] * 79 + [1 + k])
    else:
        handles = [bridge.irecv_forward() for _ in tensors]
        for handle, x in zip(handles, tensors, strict=True):
            torch.testing.assert_close(handle.wait().detach(), x)
    bridge.close()


def test_many_row_counts_with_receives_posted_ahead():
    launch(receives_posted_ahead, 2)


def lane_without_samples(rank: int, world_size: int) -> None:
    # One sample over two lanes: the first lane of each side holds none.
    bridge = bridge_between(Layout([0, 1], dp=2, name="images"), Layout([2, 3], dp=2, name="language"))
    rows = 0 if rank % 2 == 0 else 5
    if bridge.is_source:
        x = torch.arange(2.0 * rows).view(rows, 2)
        bridge.send_forward(x, row_counts=[rows] if rows else [], num_samples=1)
        dx = bridge.recv_backward()
        torch.testing.assert_close(dx, x * 2)
    else:
        y = bridge.recv_forward()
        torch.testing.assert_close(y.detach(), torch.arange(2.0 * rows).view(rows, 2))
        bridge.send_backward(y.detach() * 2)
    bridge.close()


def test_lane_without_samples_both_ways():
    launch(lane_without_samples, 4)


def evaluated_on_one_side(rank: int, world_size: int) -> None:
    bridge = bridge_between(Layout([0], name="images"), Layout([1], name="language"))
    if bridge.is_source:
        bridge.send_forward(torch.zeros(4, 2))
        bridge.send_forward(torch.ones(4, 2))
        with pytest.raises(
            mimo_ext.BridgeError, match=r"rank 1 sent the gradient of forward microbatch 1, expected that of 0.*no_grad"
        ):
            bridge.recv_backward()
    else:
        with torch.no_grad():
            bridge.recv_forward()
        y = bridge.recv_forward()
        bridge.send_backward(torch.ones_like(y))
    dist.barrier()  # closing takes back what was not received yet
    bridge.close(abort=True)


def test_gradient_of_another_microbatch_is_refused():
    launch(evaluated_on_one_side, 2)


def evaluated_by_one_lane(rank: int, world_size: int) -> None:
    bridge = bridge_between(Layout([0, 1], dp=2, name="images"), Layout([2], name="language"))
    if bridge.is_source:
        with torch.set_grad_enabled(rank == 0):
            bridge.send_forward(torch.zeros(4, 2))
    else:
        with pytest.raises(mimo_ext.BridgeError, match="ranks 0 and 1 differ on whether they expect a gradient"):
            bridge.recv_forward()
    dist.barrier()
    bridge.close(abort=True)


def test_lanes_that_differ_on_expecting_a_gradient_are_named():
    launch(evaluated_by_one_lane, 3)


def uneven_lanes_into_shards(rank: int, world_size: int) -> None:
    dst = Layout([2, 3], tp=2, sequence_parallel=True, name="language")
    bridge = bridge_between(Layout([0, 1], dp=2, name="images"), dst)
    if bridge.is_source:
        bridge.send_forward(torch.zeros(4 if rank == 0 else 8, 2))
    else:
        with pytest.raises(
            mimo_ext.BridgeError, match=r"'language' holds 2-D .* equal rows per sample in all lanes of module 'images'"
        ):
            bridge.recv_forward()
    dist.barrier()  # closing takes back what was not received yet
    bridge.close(abort=True)


def test_shards_of_lanes_that_differ_are_refused_by_name():
    launch(uneven_lanes_into_shards, 4)


def changed_at_once(rank: int, world_size: int) -> None:
    bridge = bridge_between(Layout([0], name="images"), Layout([1, 2, 3, 4], tp=4, name="language"))
    for step in range(1, 13):
        if bridge.is_source:
            with torch.no_grad():
                bridge.send_forward(torch.full((2048, 1024), float(step)))
        else:
            with torch.no_grad():
                y = bridge.recv_forward()
                y.mul_(-1)  # while replicas may still be reading the parts that this rank forwards
                assert (y == -step).all(), f"step {step}: {int((y != -step).sum())} elements of another tensor"
    bridge.close()


def test_a_received_tensor_may_be_changed_at_once():
    launch(changed_at_once, 5)


def lazily_conjugated(rank: int, world_size: int) -> None:
    bridge = bridge_between(Layout([0], name="images"), Layout([1], name="language"), dtype=torch.complex64)
    x = torch.tensor([[1 + 2j, 3 - 4j]])
    if bridge.is_source:
        bridge.send_forward(x.conj())
    else:
        torch.testing.assert_close(bridge.recv_forward().detach(), x.conj().resolve_conj())
    bridge.close()


def test_lazy_conjugation_is_carried_out():
    launch(lazily_conjugated, 2)
