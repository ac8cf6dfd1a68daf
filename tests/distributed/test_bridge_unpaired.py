"""Gradients that travel before the microbatch that they belong to, or without one (`unpaired_backward`)."""

import pytest
import torch
import torch.distributed as dist
from bridge_reference import Case, find, local_tensor
from launch import launch

import mimo_ext

CASES = [
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "tp": 2}, name="fan-in"),
    Case({"ranks": range(2), "tp": 2}, {"ranks": range(2, 4), "dp": 2}, ndim=3, batch_dim=0, name="fan-out"),
    Case({"ranks": range(3), "dp": 3}, {"ranks": range(3, 5), "dp": 2}, name="non-dividing"),
    Case({"ranks": range(3), "dp": 3}, {"ranks": range(3, 5), "dp": 2}, ndim=3, batch_dim=1, name="3-D non-dividing"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "tp": 2}, static=True, name="static"),
]


def run_case(rank: int, case: Case) -> None:
    src, dst = case.layouts()
    shape = case.global_shape() if case.static else None
    bridge = mimo_ext.Bridge(src, dst, ndim=case.ndim, batch_dim=case.batch_dim, shape=shape, unpaired_backward=True)
    here_src, here_dst = find(src, rank, -1), find(dst, rank, 0)
    # Three gradients and no microbatch at all; three microbatches whose gradients came first; three in the usual order.
    for step in range(3):
        whole = case.global_tensor(step)
        if here_dst is not None:
            bridge.send_backward(local_tensor(case, dst, whole, *here_dst))
        if here_src is not None:
            torch.testing.assert_close(bridge.recv_backward(), local_tensor(case, src, whole, *here_src))
    for step in range(6):
        whole, gradient = case.global_tensor(step), case.global_tensor(step + 100)
        if here_src is not None:
            bridge.send_forward(local_tensor(case, src, whole, *here_src))
        if here_dst is not None:
            y = bridge.recv_forward()
            torch.testing.assert_close(y.detach(), local_tensor(case, dst, whole, *here_dst))
            if step >= 3:
                bridge.send_backward(local_tensor(case, dst, gradient, *here_dst))
        if here_src is not None and step >= 3:
            torch.testing.assert_close(bridge.recv_backward(), local_tensor(case, src, gradient, *here_src))
    # The receiver of a gradient has sent its microbatch, the sender has not yet received it.
    for step in range(3):
        whole, gradient = case.global_tensor(step), case.global_tensor(step + 200)
        if here_src is not None:
            bridge.send_forward(local_tensor(case, src, whole, *here_src))
            torch.testing.assert_close(bridge.recv_backward(), local_tensor(case, src, gradient, *here_src))
        if here_dst is not None:
            bridge.send_backward(local_tensor(case, dst, gradient, *here_dst))
            torch.testing.assert_close(bridge.recv_forward().detach(), local_tensor(case, dst, whole, *here_dst))
    bridge.close()


def run_cases(rank: int, world_size: int) -> None:
    for case in CASES:
        try:
            run_case(rank, case)
        except BaseException as error:
            raise AssertionError(f"case {case.name!r}") from error


def test_values():
    launch(run_cases, 5, timeout=60)


def absent(rank: int, world_size: int) -> None:
    bridge = mimo_ext.Bridge(mimo_ext.Layout([0, 1], dp=2), mimo_ext.Layout([2]), unpaired_backward=True)
    if bridge.is_destination:
        bridge.send_backward(None)
    else:
        assert bridge.recv_backward() is None
    bridge.close()


def test_absent_gradient():
    launch(absent, 3)


def ragged(rank: int, world_size: int) -> None:
    """The rows of a gradient that came first are split evenly, which those of its microbatch are not."""
    bridge = mimo_ext.Bridge(mimo_ext.Layout([0, 1], dp=2), mimo_ext.Layout([2]), unpaired_backward=True)
    if bridge.is_source:
        bridge.send_forward(torch.zeros(rank + 2, 3), row_counts=[rank + 2])
        with pytest.raises(mimo_ext.BridgeError, match="evenly split rows, expected those of a microbatch with row"):
            bridge.recv_backward()
    else:
        with pytest.raises(ValueError, match=r"before its microbatch was received: .*splits evenly into 2 parts"):
            bridge.send_backward(torch.zeros(5, 3))
        bridge.send_backward(torch.zeros(6, 3))
    dist.barrier()  # an aborted bridge breaks those of its peers
    bridge.close(abort=True)


def test_rows_that_do_not_split_evenly_are_refused():
    launch(ragged, 3)
