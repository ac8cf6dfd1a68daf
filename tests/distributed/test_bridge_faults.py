"""Bad input is refused before anything is sent; a peer that dies or never comes is named, and nothing hangs."""

import os
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from exchange import hear, tell
from launch import launch, run_ranks

import mimo_ext
from mimo_ext import Layout

SHORT = timedelta(seconds=2)
LONG = timedelta(seconds=30)  # where nobody is late


def refused_inputs(rank: int, world_size: int) -> None:
    bridge = mimo_ext.Bridge(Layout([0, 1], dp=2, name="images"), Layout([2], name="language"), ndim=2, timeout=LONG)
    good = torch.arange(6.0).view(3, 2) + rank
    if bridge.is_source:
        bad = [
            (good.double(), {}, r"rank \d, module 'images': send_forward: expected dtype Float, got Double"),
            (good.view(3, 2, 1), {}, r"expected a tensor of 2 axes, got shape \[3, 2, 1\]"),
            (good.to("meta"), {}, "expected a CPU tensor .* got device meta"),
            (good.to_sparse(), {}, "expected a strided tensor, got layout Sparse"),
            (good, {"row_counts": [1, 1]}, "row_counts of 2 samples sum to 2 rows, got a tensor of 3 rows"),
            (good, {"row_counts": [4, -1]}, "row_counts must not be negative, got -1"),
            (good, {"row_counts": [1, 2], "num_samples": 9}, r"lane \d of 2 has \d of 9 samples, got 2 row_counts"),
            (good, {"num_samples": 4}, "splits evenly into 2 samples, got 3 rows; pass row_counts"),
            (good, {"num_samples": -1}, "num_samples must not be negative, got -1"),
        ]
        for tensor, options, message in bad:
            with pytest.raises(ValueError, match=message):
                bridge.send_forward(tensor, **options)
        for nothing in (None, [good]):
            with pytest.raises(TypeError, match=r"rank \d: send_forward: x: expected a tensor, got (None|\[)"):
                bridge.send_forward(nothing)
        with pytest.raises(mimo_ext.BridgeError, match=r"expected a rank of the destination .*, got rank"):
            bridge.recv_forward()
        bridge.send_forward(good)
        torch.testing.assert_close(bridge.recv_backward(), good * 2)
    elif bridge.is_destination:
        with pytest.raises(mimo_ext.BridgeError, match="rank 2: send_forward: expected a rank of the source"):
            bridge.send_forward(good)
        # Nothing of what was refused has arrived.
        y = bridge.recv_forward()
        torch.testing.assert_close(y.detach(), torch.cat([torch.arange(6.0).view(3, 2) + lane for lane in (0, 1)]))
        for bad_gradient, message in [
            (y.detach()[:5], r"expected a gradient of shape \[6, 2\]"),
            (y.double(), "dtype"),
        ]:
            with pytest.raises(ValueError, match=message):
                bridge.send_backward(bad_gradient)
        with pytest.raises(TypeError, match=r"rank 2: send_backward: dy: expected a tensor, got \["):
            bridge.send_backward([y])
        bridge.send_backward(y.detach() * 2)
    else:
        for call in (lambda: bridge.send_forward(good), bridge.recv_forward, bridge.recv_backward):
            with pytest.raises(mimo_ext.BridgeError, match="got rank 3"):
                call()
    bridge.close()
    with pytest.raises(mimo_ext.BridgeError, match="the bridge is closed"):
        bridge.send_forward(good)
    with pytest.raises(mimo_ext.BridgeError, match="the bridge is closed"):
        bridge.recv_forward()


def test_refused_inputs():
    launch(refused_inputs, 4)


def static_shapes(rank: int, world_size: int) -> None:
    layouts = Layout([0], name="images"), Layout([1], name="language")
    bridge = mimo_ext.Bridge(*layouts, ndim=2, shape=(4, 2), timeout=LONG)
    if rank == 0:
        with pytest.raises(ValueError, match=r"static shapes: expected \[4, 2\], got \[5, 2\]"):
            bridge.send_forward(torch.zeros(5, 2))
        bridge.send_forward(torch.ones(4, 2))
        torch.testing.assert_close(bridge.recv_backward(), torch.zeros(4, 2))
    else:
        torch.testing.assert_close(bridge.recv_forward().detach(), torch.ones(4, 2))
        bridge.send_backward(None)
    bridge.close()


def test_static_shape_that_changes_is_refused():
    launch(static_shapes, 2)


def bad_arguments(rank: int, world_size: int) -> None:
    src, dst = Layout([0], name="images"), Layout([1], name="language")
    for options, kind, message in [
        ({"ndim": 4}, ValueError, "ndim: expected 2 or 3, got 4"),
        ({"ndim": 2, "batch_dim": 1}, ValueError, "expected batch_dim=0"),
        ({"ndim": 3, "batch_dim": 1, "seq_dim": 1}, ValueError, "two axes"),
        ({"device": "meta"}, NotImplementedError, "device 'meta' is not supported"),
        ({"max_in_flight": 0}, ValueError, "max_in_flight must be positive, got 0"),
        ({"path": "fast"}, ValueError, "path: expected one of auto, pipelined, direct, leader, got 'fast'"),
        ({"max_chunks": 0}, ValueError, "max_chunks must be positive, got 0"),
        ({"timeout": timedelta(0)}, ValueError, "timeout must be positive"),
        ({"shape": (3,)}, ValueError, r"expected a shape of 2 extents, got \(3,\)"),
        ({"dst_stage": 1}, IndexError, "layout of module 'language': pipeline stage 1 of 1"),
    ]:
        with pytest.raises(kind, match=message):
            mimo_ext.Bridge(src, dst, **{"ndim": 2, **options})
    with pytest.raises(ValueError, match=r"expected ranks of the process group \(2 ranks\), got \[7\]"):
        mimo_ext.Bridge(src, Layout([7], name="language"))


def test_bad_arguments():
    launch(bad_arguments, 2)


def refused_by_one_rank(rank: int, world_size: int) -> str:
    start = time.monotonic()
    with pytest.raises(ValueError, match="ndim") as caught:
        mimo_ext.Bridge(Layout([0], name="images"), Layout([1], name="language"), ndim=4 if rank == 1 else 2)
    assert time.monotonic() - start < 20  # nobody waits for a timeout, which is a minute here
    return str(caught.value)


def test_what_one_rank_refuses_fails_all_at_once():
    first, second = launch(refused_by_one_rank, 2)
    assert "got (rank 1) \"refused: bridge 'images -> language', rank 1: ndim: expected 2 or 3, got 4\"" in first
    assert second == "bridge 'images -> language', rank 1: ndim: expected 2 or 3, got 4"


def different_layouts(rank: int, world_size: int, what: str) -> str:
    dst = Layout([2, 3], tp=2, name="language")
    options = {}
    if rank == 1:
        if what == "layout":
            dst = Layout([2, 3], dp=2, name="language")
        elif what == "dtype":
            options["dtype"] = torch.bfloat16
        else:
            options["shape"] = (8, 2)
    with pytest.raises(ValueError, match="the ranks describe different bridges") as caught:
        mimo_ext.Bridge(Layout([0, 1], dp=2, name="images"), dst, timeout=SHORT, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "expected", "got"),
    [("layout", "tp=2", "2 lanes: [2] [3]"), ("dtype", "float32", "bfloat16"), ("shape", "shape=None", "shape=(8, 2)")],
)
def test_layouts_that_differ_between_ranks(what, expected, got):
    for rank, message in enumerate(launch(different_layouts, 4, what)):
        assert f"rank {rank}: the ranks describe" in message
        before, after = message.split("got (rank 1)")
        assert "expected (rank 0)" in before
        assert expected in before
        assert got in after


def dying_peer(rank: int, world_size: int, dies: int, when: str) -> tuple[str, float]:
    bridge = mimo_ext.Bridge(
        Layout([0, 1], tp=2, name="images"),
        Layout([2, 3], tp=2, name="language"),
        ndim=2,
        timeout=timedelta(seconds=20),
    )
    x = torch.ones(4, 2)
    for step in range(2):
        dist.barrier()  # the death comes neither during construction nor before the first microbatch has arrived
        if rank == dies and step == 1 and when == "forward":
            os._exit(7)
        if bridge.is_source:
            bridge.send_forward(x)
        else:
            try:
                bridge.recv_forward()
            except mimo_ext.BridgeError as error:
                return str(error), time.monotonic()
    if rank == dies:
        os._exit(7)
    start = time.monotonic()
    try:
        for _ in range(2):
            if bridge.is_source:
                bridge.recv_backward()
            else:
                bridge.send_backward(x)
        # A destination learns of a dead source when its sends fail: at the latest when it closes or goes on.
        time.sleep(1.0)
        bridge.send_forward(x) if bridge.is_source else bridge.recv_forward()
    except mimo_ext.BridgeError as error:
        assert time.monotonic() - start < 10
        with pytest.raises(mimo_ext.BridgeError, match=re.escape(str(error)[:60])):
            bridge.send_forward(x) if bridge.is_source else bridge.recv_forward()
        bridge.close(abort=True)
        return str(error), time.monotonic()
    raise AssertionError("the dead peer was not noticed")


@pytest.mark.parametrize("dies", [0, 1, 2, 3])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_peer_that_dies_is_named(dies, when):
    outcome = run_ranks(dying_peer, 4, dies, when, timeout=40)
    assert outcome.exitcodes[dies] == 7
    # Ranks that exchange messages with the dead one notice; when nobody waits for it, later operations still work.
    met = [rank for rank in range(4) if rank != dies and outcome.results[rank] is not None]
    named = [outcome.results[rank][0] for rank in met]
    assert named, outcome.errors
    assert all("bridge 'images -> language', rank" in message and "microbatch" in message for message in named)
    assert any(f"rank {dies}:" in message for message in named), named
    assert not any("did not finish in time" in error for error in outcome.errors.values()), outcome.errors


def dies_behind_a_busy_one(rank: int, world_size: int, kind: str, static: bool) -> tuple[str, float]:
    bridge = mimo_ext.Bridge(
        Layout([0, 1], dp=2, name="images"),
        Layout([2], name="language"),
        ndim=2,
        shape=(8, 2) if static else None,
        timeout=timedelta(seconds=20),
    )
    for _ in range(2):
        bridge.send_forward(torch.ones(4, 2)) if bridge.is_source else bridge.recv_forward()
    dist.barrier()
    start = time.monotonic()
    if rank == 1:
        time.sleep(0.5)
        os._exit(7)
    if rank == 0:
        hear("rank 2 knows", 15)  # computes meanwhile; rank 2 waits for its header or payload first
        bridge.close(abort=True)
        return "", 0.0
    receive = bridge.recv_forward if kind == "blocking" else bridge.irecv_forward().wait
    with pytest.raises(mimo_ext.BridgeError) as caught:
        receive()
    elapsed = time.monotonic() - start
    tell("rank 2 knows")
    bridge.close(abort=True)
    return str(caught.value), elapsed


@pytest.mark.parametrize(("kind", "static"), [("blocking", False), ("blocking", True), ("handle", False)])
def test_a_peer_that_dies_while_another_is_awaited_is_noticed_at_once(kind, static):
    outcome = run_ranks(dies_behind_a_busy_one, 3, kind, static, timeout=40)
    assert outcome.exitcodes[1] == 7
    assert outcome.results[2] is not None, outcome.errors
    message, elapsed = outcome.results[2]
    what = "payload" if static else "header"
    assert f"rank 2: recv_forward of microbatch 2: {what} from rank 1: the peer is gone, " in message
    assert 0.4 < elapsed < 12  # before the busy one says anything, and long before the timeout


def silent_peer(rank: int, world_size: int) -> str | None:
    bridge = mimo_ext.Bridge(
        Layout([0], name="images"), Layout([1], name="language"), ndim=2, timeout=timedelta(seconds=1.5)
    )
    if rank == 0:
        hear("rank 1 gave up")
        bridge.close(abort=True)
        return None
    start = time.monotonic()
    with pytest.raises(mimo_ext.BridgeTimeoutError) as caught:
        bridge.recv_forward()
    assert 1 < time.monotonic() - start < 20
    tell("rank 1 gave up")
    bridge.close(abort=True)
    return str(caught.value)


def test_a_peer_that_never_comes_is_named():
    message = launch(silent_peer, 2)[1]
    assert "bridge 'images -> language', rank 1: recv_forward of microbatch 0: header from rank 0" in message
    assert "nothing within 1.5" in message


def sends_do_not_block(rank: int, world_size: int) -> None:
    bridge = mimo_ext.Bridge(Layout([0], name="a"), Layout([1], name="b"), ndim=2, timeout=timedelta(seconds=30))
    x = torch.randn(1 << 20, 4)  # 16 MiB: far beyond any socket buffer
    if rank == 0:
        for _ in range(4):
            bridge.send_forward(x)
        tell("all sends have returned")
        for _ in range(4):
            bridge.recv_backward()
    else:
        hear("all sends have returned", 20)  # a send that waited for its receiver would wait for ever
        received = [bridge.recv_forward() for _ in range(4)]
        for y in received:
            bridge.send_backward(y.detach())
    bridge.close()


def test_sends_do_not_block():
    launch(sends_do_not_block, 2)


def lane_copies_while_computing(rank: int, world_size: int) -> None:
    bridge = mimo_ext.Bridge(Layout([0], name="a"), Layout([1, 2], tp=2, name="b"), ndim=2)
    if rank == 0:
        bridge.send_forward(torch.ones(1000, 8))
    else:
        handle = bridge.irecv_forward()
        if rank == 1:
            hear("rank 2 has all of it", 20)  # computes, and does not wait: its part must still reach rank 2
        y = handle.wait()
        assert float(y.sum()) == 8000.0
        if rank == 2:
            tell("rank 2 has all of it")
    bridge.close()


def test_a_busy_rank_still_forwards_to_its_lane():
    launch(lane_copies_while_computing, 3)


def forgotten_close(rank: int, world_size: int) -> None:
    bridge = mimo_ext.Bridge(Layout([0], name="a"), Layout([1], name="b"), ndim=2)
    if rank == 0:
        bridge.send_forward(torch.ones(2, 2))
    # No close(), and the destination never receives: the processes must still end.
    dist.barrier()


def test_a_forgotten_bridge_does_not_hang_the_process():
    start = time.monotonic()
    launch(forgotten_close, 2, timeout=30)
    assert time.monotonic() - start < 20
