"""Payload that is sent before the receiver asks for it: with the header where it is small, else its beginning.

What was announced and what was not takes turns here: receives that were posted for nothing must serve a later
microbatch.
"""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from bridge_reference import Case, find, global_gradients, lane_samples, lane_slice, local_tensor
from exchange import hear, tell
from launch import launch

import mimo_ext

KIB = 1024
# Rows of 1 KiB. In turns: with the header, none of it eager, all of it, a part of it, a little, none at all.
SMALL, EAGER, LARGE, NONE = 1, 40, 700, 0
SEQUENCE = (SMALL, LARGE, SMALL, EAGER, NONE, LARGE, LARGE, SMALL)
WITHOUT_GRADIENT = (3, 5)  # microbatches
CASES = [
    Case({"ranks": range(1)}, {"ranks": range(1, 2)}, samples=2, hidden=256, name="one to one"),
    Case({"ranks": range(2), "tp": 2}, {"ranks": range(2, 4), "tp": 2}, samples=2, hidden=256, name="replicas"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "tp": 2}, samples=2, hidden=256, name="fan-in"),
    Case({"ranks": range(2), "tp": 2}, {"ranks": range(2, 5), "dp": 3}, samples=3, hidden=256, name="fan-out"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(1, 3), "tp": 2}, samples=2, hidden=256, name="shared rank"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "cp": 2}, samples=2, hidden=256, name="cp copies"),
    Case(
        {"ranks": range(2), "tp": 2, "sequence_parallel": True},
        {"ranks": range(2, 4), "tp": 2, "sequence_parallel": True},
        samples=2,
        hidden=256,
        name="shards",
    ),
]


def exchange(rank: int, world: int, case: Case, ahead: int) -> None:
    """Every microbatch forward and backward; `ahead` receives are posted before they are needed."""
    src, dst = case.layouts()
    bridge = mimo_ext.Bridge(src, dst, ndim=2, dtype=case.dtype, timeout=timedelta(seconds=40))
    here_src, here_dst = find(src, rank, -1), find(dst, rank, 0)
    cases = [
        replace(case, rows=tuple(rows * 2 if index == 0 else rows for index in range(case.samples)))
        for rows in SEQUENCE
    ]
    outgoing = {}
    posted = []

    def post() -> None:
        if here_dst is not None and len(posted) < len(cases):
            posted.append(bridge.irecv_forward())

    for _ in range(ahead):
        post()
    for number, now in enumerate(cases):
        whole = now.global_tensor(number)
        if here_src is not None:
            lane, member = here_src
            x = local_tensor(now, src, whole, lane, member).requires_grad_()
            first, last = lane_samples(now.samples, lane, len(src.lanes()))
            bridge.send_forward(x, row_counts=now.row_counts()[first:last])
            outgoing[number] = x
        if here_dst is not None:
            while len(posted) <= number:
                post()
            post()
            got = posted[number].wait()
            lane, member = here_dst
            expected = local_tensor(now, dst, whole, lane, member)
            assert torch.equal(got, expected), f"microbatch {number}, forward"
            if number in WITHOUT_GRADIENT:
                bridge.send_backward(None)
            else:
                copies = global_gradients(now, dst, number)
                cp_index = member // dst.tp if len(copies) > 1 else 0
                bridge.send_backward(local_tensor(now, dst, copies[cp_index], lane, member))
        if here_src is not None:
            gradient = bridge.recv_backward()
            lane, member = here_src
            if number in WITHOUT_GRADIENT:
                assert gradient is None
            else:
                total = torch.stack(global_gradients(now, dst, number)).sum(0)
                mine = lane_slice(now, total, lane, len(src.lanes()))
                expected = local_tensor(now, src, total, lane, member)
                assert mine.shape[1] == expected.shape[1]
                assert torch.equal(gradient, expected), f"microbatch {number}, backward"
    bridge.close()


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_sent_unasked_belongs_to_its_microbatch(case: Case, ahead: int) -> None:
    launch(exchange, 5, case, ahead, timeout=60)


def sends_before_it_is_asked_for(rank: int, world_size: int) -> None:
    """gloo's sends end when their receive is posted: the second one's is, once the first one has arrived."""
    bridge = mimo_ext.Bridge(mimo_ext.Layout([0]), mimo_ext.Layout([1]), ndim=2, timeout=timedelta(seconds=10))
    mine = {"forward": torch.full((2, 4), 1.0), "backward": torch.full((2, 4), 2.0)}
    if rank == 0:
        bridge.send_forward(mine["forward"])
        assert torch.equal(bridge.recv_backward(), mine["backward"])
        bridge.isend_forward(mine["forward"]).wait()
        tell("forward")
        hear("asked")
        assert torch.equal(bridge.recv_backward(), mine["backward"])
        tell("answered")
    else:
        assert torch.equal(bridge.recv_forward(), mine["forward"])
        bridge.send_backward(mine["backward"])
        hear("forward")  # nobody here has asked for it yet
        assert torch.equal(bridge.recv_forward(), mine["forward"])
        bridge.isend_backward(mine["backward"]).wait()  # likewise
        tell("asked")
        hear("answered")
    bridge.close()


def test_the_next_header_is_received_before_anybody_asks_for_it() -> None:
    launch(sends_before_it_is_asked_for, 2)


def last_one_then_gone(rank: int, world_size: int) -> None:
    """The receives that were posted for one more microbatch hurt nobody."""
    if rank == 0:
        with mimo_ext.Bridge(mimo_ext.Layout([0]), mimo_ext.Layout([1]), ndim=2) as bridge, torch.no_grad():
            bridge.send_forward(torch.ones(2, 4))
        tell("gone")
        return
    bridge = mimo_ext.Bridge(mimo_ext.Layout([0]), mimo_ext.Layout([1]), ndim=2, timeout=timedelta(milliseconds=500))
    assert torch.equal(bridge.recv_forward(), torch.ones(2, 4))
    hear("gone")
    with pytest.raises(mimo_ext.BridgeError, match="rank 0"):
        bridge.recv_forward()
    bridge.close(abort=True)


def test_a_sender_may_be_gone_after_its_last_microbatch() -> None:
    launch(last_one_then_gone, 2)


def one_more_than_is_received(rank: int, world_size: int, rows: int) -> str:
    """What the sender is told."""
    bridge = mimo_ext.Bridge(mimo_ext.Layout([0]), mimo_ext.Layout([1]), ndim=2, timeout=timedelta(seconds=2))
    x = torch.ones(rows, 256)
    told = ""
    with torch.no_grad():
        if rank == 0:
            bridge.send_forward(x)
            bridge.send_forward(2 * x)
            try:
                bridge.close()
            except mimo_ext.BridgeError as error:
                told = str(error)
            tell("closed")
        else:
            assert torch.equal(bridge.recv_forward(), x)
            hear("closed")
            bridge.close()
    return told


@pytest.mark.parametrize("rows", [SMALL, EAGER, LARGE])
def test_a_send_that_nobody_asks_for_is_noticed_where_it_is_larger_than_what_travels_unasked(rows: int) -> None:
    told, _ = launch(one_more_than_is_received, 2, rows)
    if rows == LARGE:
        assert "send_forward of microbatch 1: message to rank 1: nothing within 2 s" in told
    else:
        assert told == ""
