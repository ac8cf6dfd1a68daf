"""The asynchronous path of "staged": copies that take their time, in place of a device's."""

from __future__ import annotations

import gc
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch

import mimo_ext
from mimo_ext import Bridge, BridgeError, BridgeTimeoutError, Layout

SIDES = Layout([0], name="images"), Layout([1], name="language")


class SlowBridge(Bridge):
    """Every copy between device and host takes 250 ms."""

    _copy_delay = timedelta(milliseconds=250)


def slow(**options: Any) -> Bridge:
    return SlowBridge(*SIDES, transport="staged", timeout=timedelta(seconds=20), **options)


def in_order(rank: int, world_size: int, shape: tuple[int, int] | None) -> None:
    x = torch.arange(8.0).view(4, 2)
    with slow(shape=shape) as bridge:
        dist.barrier()
        began = time.monotonic()
        if rank == 0:
            for step in range(3):
                given = x + step
                bridge.send_forward(given)
                given.data = torch.empty(1)  # what deallocate_output_tensor does
                del given
            assert time.monotonic() - began < 0.24  # not even the first copy has ended
            for step in range(3):
                assert torch.equal(bridge.recv_backward(), step * x)
        else:
            received = [bridge.recv_forward().detach() for _ in range(3)]
            assert time.monotonic() - began > 0.7  # three copies at least
            for step, y in enumerate(received):
                assert torch.equal(y, x + step)
                bridge.send_backward(step * x)


@pytest.mark.parametrize("shape", [None, (4, 2)], ids=["varying", "static"])
def test_sends_wait_for_no_copy_and_arrive_in_order(shape: tuple[int, int] | None) -> None:
    launch(in_order, 2, shape)


def headers_first(rank: int, world_size: int) -> None:
    class VerySlow(Bridge):
        _copy_delay = timedelta(milliseconds=800 if rank == 0 else 0)

    with VerySlow(*SIDES, transport="staged", timeout=timedelta(seconds=20)) as bridge:
        dist.barrier()
        if rank == 0:
            bridge.send_forward(torch.ones(2, 2))
            return
        handle = bridge.irecv_forward()
        deadline = time.monotonic() + 0.6
        while bridge.flight()["entries"][-1]["waits_for"] != "payload from" and time.monotonic() < deadline:
            time.sleep(0.01)
        entry = bridge.flight()["entries"][-1]
        assert entry["waits_for"] == "payload from"  # the header has been read: the size is known
        assert entry["bytes"] == 16
        assert not handle.done()
        assert torch.equal(handle.wait().detach(), torch.ones(2, 2))


def test_headers_go_ahead_of_the_copy() -> None:
    launch(headers_first, 2)


def buffers(rank: int, world_size: int) -> int:
    with mimo_ext.Bridge(*SIDES, transport="staged") as bridge:
        for step in range(40):
            x = torch.full((64, 4 + step % 2), float(step))
            if rank == 0:
                bridge.send_forward(x)
                assert torch.equal(bridge.recv_backward(), x * 2)
            else:
                y = bridge.recv_forward()
                assert torch.equal(y.detach(), x)
                bridge.send_backward(y.detach() * 2)
        return bridge._open.host_buffers


def test_host_memory_is_used_again() -> None:
    # Two sizes, and at most one copy that had not ended when the next microbatch came, of each.
    assert max(launch(buffers, 2)) <= 4


def a_copy_that_hangs(rank: int, world_size: int) -> None:
    class Stuck(Bridge):
        _copy_delay = timedelta(seconds=2 if rank == 0 else 0)

    bridge = Stuck(*SIDES, transport="staged", timeout=timedelta(milliseconds=500))
    if rank == 0:
        sent = bridge.isend_forward(torch.ones(2, 2))
        words = r"bridge 'images -> language', rank 0: send_forward of microbatch 0: copy to the host: not complete"
        with pytest.raises(BridgeTimeoutError, match=words + " within 0.5 s"):
            sent.wait()
        with pytest.raises(BridgeTimeoutError, match=words):
            bridge.send_forward(torch.ones(2, 2))
    else:
        with pytest.raises(BridgeTimeoutError, match="rank 1: recv_forward of microbatch 0: payload from rank 0"):
            bridge.recv_forward()
    bridge.close(abort=True)
    dist.barrier()


def test_a_copy_to_the_host_that_never_ends_is_a_timeout() -> None:
    launch(a_copy_that_hangs, 2)


def a_copy_to_the_device_that_hangs(rank: int, world_size: int) -> None:
    class Stuck(Bridge):
        _copy_delay = timedelta(seconds=2.5 if rank == 1 else 0)

    bridge = Stuck(*SIDES, transport="staged", timeout=timedelta(seconds=1))
    if rank == 0:
        bridge.send_forward(torch.ones(2, 2))
    else:
        with pytest.raises(BridgeTimeoutError, match="recv_forward of microbatch 0: copy to the device: not complete"):
            bridge.recv_forward()
    dist.barrier()
    bridge.close(abort=True)


def test_a_copy_to_the_device_that_never_ends_is_a_timeout() -> None:
    launch(a_copy_to_the_device_that_hangs, 2)


def closing(rank: int, world_size: int) -> None:
    bridge = slow()
    if rank == 0:
        for step in range(3):
            bridge.send_forward(torch.full((2, 2), float(step)))
        bridge.close()  # with copies under way: they still arrive
    else:
        received = [bridge.recv_forward() for _ in range(3)]
        assert [float(y.detach().mean()) for y in received] == [0, 1, 2]
        # Handed out, or never asked for: nothing is left behind either way (see launch).
        bridge.close()
    with pytest.raises(BridgeError, match="the bridge is closed"):
        bridge.send_forward(torch.ones(2, 2))


def test_close_waits_for_copies_and_what_follows_them() -> None:
    launch(closing, 2)


def dropped(rank: int, world_size: int) -> None:
    bridge = slow()
    if rank == 0:
        bridge.send_forward(torch.full((2, 2), 7.0))
    else:
        assert float(bridge.recv_forward().detach().sum()) == 28
    del bridge
    gc.collect()
    dist.barrier()
    if rank == 0:
        mimo_ext._extension._C.finish_leftovers(False)


def test_what_a_dropped_bridge_has_sent_still_arrives() -> None:
    launch(dropped, 2)


def unwaited(rank: int, world_size: int) -> None:
    bridge = slow()
    if rank == 0:
        bridge.send_forward(torch.ones(2, 2))
        bridge.close()
    else:
        handle = bridge.irecv_forward()
        deadline = time.monotonic() + 10
        while not handle.done() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert handle.done()  # it has arrived, and is on its way to the device
        bridge.close(abort=True)
        del handle
    dist.barrier()


def test_memory_that_a_copy_still_fills_is_held_until_it_is_full() -> None:
    # launch() fails where a storage, a thread or a bridge is left.
    launch(unwaited, 2)


def wrong_microbatch(rank: int, world_size: int) -> None:
    layouts = Layout(range(2), dp=2, name="images"), Layout([2], name="language")
    bridge = mimo_ext.Bridge(*layouts, transport="staged", timeout=timedelta(seconds=10))
    if rank < 2:
        bridge.send_forward(torch.ones(2, 3 + rank))  # lanes of one microbatch that differ
        dist.barrier()
        bridge.close(abort=True)
        return
    with pytest.raises(BridgeError, match="the lanes of module 'images' sent different microbatches"):
        bridge.recv_forward()
    with pytest.raises(BridgeError, match="the lanes of module 'images' sent different microbatches"):
        bridge.recv_forward()
    dist.barrier()
    bridge.close(abort=True)


def test_what_headers_say_is_checked_before_the_payload_comes() -> None:
    launch(wrong_microbatch, 3)
