"""Who carries a receive out: the caller that waits for it, or a thread of the bridge. The values are the same."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from exchange import hear, tell
from launch import launch

import mimo_ext
from mimo_ext import Layout

TIMEOUT = timedelta(seconds=30)


def make(lanes: int = 1, **options: object) -> mimo_ext.Bridge:
    return mimo_ext.Bridge(
        Layout([0], name="images"), Layout([1, 2], tp=2, name="language"), ndim=2, timeout=TIMEOUT, **options
    )


def tensor_of(step: int) -> torch.Tensor:
    return torch.arange(64 * 8, dtype=torch.float32).reshape(64, 8) + 1000 * step


def mixed_receives(rank: int, world_size: int, static: bool) -> None:
    """Blocking receives, receives posted ahead, and ones whose wait comes at once, in every order."""
    bridge = make(shape=(64, 8) if static else None)
    kinds = ["now", "ahead", "soon", "now", "soon", "ahead", "ahead", "now"]
    if rank == 0:
        for step in range(len(kinds)):
            bridge.send_forward(tensor_of(step))
        for step, kind in enumerate(kinds):
            handle = None if kind == "now" else bridge.irecv_backward(waits_soon=kind == "soon")
            dx = handle.wait() if handle else bridge.recv_backward()
            assert torch.equal(dx, 2 * tensor_of(step)), (kind, step)
    else:
        handles = {}
        received = []
        for step, kind in enumerate(kinds):
            if kind == "now":
                received.append(bridge.recv_forward())
                continue
            handles[step] = bridge.irecv_forward(waits_soon=kind == "soon")
            received.append(None)
        for step, handle in handles.items():
            received[step] = handle.wait()
            assert handle.done()
        for step, y in enumerate(received):
            assert y.is_leaf
            assert y.requires_grad
            assert torch.equal(y.detach(), tensor_of(step)), step
            bridge.send_backward(2 * y.detach())
    bridge.close()


@pytest.mark.parametrize("static", [False, True])
def test_receives_of_all_kinds_take_turns(static: bool) -> None:
    launch(mixed_receives, 3, static)


def steady(rank: int, world_size: int, handles: bool) -> None:
    """1F1B with one microbatch of warm-up, in the combined operations."""
    bridge = make()
    count = 4
    if rank == 0:
        bridge.send_forward(tensor_of(0))
        for step in range(1, count):
            if handles:
                dx = bridge.isend_forward_recv_backward(tensor_of(step)).wait()
            else:
                dx = bridge.send_forward_recv_backward(tensor_of(step))
            assert torch.equal(dx, 3 * tensor_of(step - 1))
        assert torch.equal(bridge.recv_backward(), 3 * tensor_of(count - 1))
    else:
        y = bridge.recv_forward()
        for step in range(1, count):
            assert torch.equal(y.detach(), tensor_of(step - 1))
            dy = 3 * y.detach()
            y = bridge.isend_backward_recv_forward(dy).wait() if handles else bridge.send_backward_recv_forward(dy)
            assert y.requires_grad
        bridge.send_backward(3 * y.detach())
    bridge.close()


@pytest.mark.parametrize("handles", [False, True])
def test_the_combined_operations(handles: bool) -> None:
    launch(steady, 3, handles)


def soon_but_late(rank: int, world_size: int) -> None:
    """The caller said that it would wait at once, and did not: the lane's other rank gets its part all the same."""
    bridge = make()
    if rank == 0:
        bridge.send_forward(tensor_of(0))
    else:
        handle = bridge.irecv_forward(waits_soon=True)
        if rank == 1:
            hear("rank 2 has all of it", 20)
        assert torch.equal(handle.wait().detach(), tensor_of(0))
        if rank == 2:
            tell("rank 2 has all of it")
    bridge.close()


def test_a_receive_that_nobody_takes_over_goes_on_by_itself() -> None:
    launch(soon_but_late, 3)


def interrupted(rank: int, world_size: int) -> None:
    """Ctrl-C in a blocking receive reaches the program at once; the receive itself goes on."""
    bridge = make()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if rank == 0:
        hear("rank 1 was interrupted")
        hear("rank 2 was interrupted")
        for step in range(2):
            bridge.send_forward(tensor_of(step))
    else:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            bridge.recv_forward()
        assert 0.8 < time.monotonic() - start < 20  # the timeout is longer, and nothing has been sent
        tell(f"rank {rank} was interrupted")
        # The first microbatch arrives in the background; the next one is the second.
        assert torch.equal(bridge.recv_forward().detach(), tensor_of(1))
        assert bridge._open.outstanding == (0, 2)
    dist.barrier()
    bridge.close()


def test_ctrl_c_interrupts_a_blocking_receive() -> None:
    launch(interrupted, 3)


def storage_of_sends(rank: int, world_size: int) -> None:
    """A tensor that was sent is let go of although nobody asks."""
    bridge = make()
    if rank == 0:
        x = tensor_of(0)
        weak = x.untyped_storage()._weak_ref()
        bridge.send_forward(x)
        del x
        deadline = time.monotonic() + 5
        while not torch.UntypedStorage._expired(weak) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert torch.UntypedStorage._expired(weak), "the bridge still holds what it has sent"
        torch.UntypedStorage._free_weak_ref(weak)
    else:
        assert torch.equal(bridge.recv_forward().detach(), tensor_of(0))
    dist.barrier()
    bridge.close()


def test_what_was_sent_is_released() -> None:
    launch(storage_of_sends, 3)


def counted(rank: int, world_size: int) -> dict[str, dict[str, float]]:
    bridge = make()
    bridge.start_trace()
    for step in range(3):
        if rank == 0:
            bridge.send_forward(tensor_of(step))
            bridge.recv_backward()
        else:
            if rank == 1:
                time.sleep(0.2)  # its peer is kept waiting, and says so
            bridge.send_backward(bridge.recv_forward().detach())
    dist.barrier()
    bridge.close()
    events = bridge.trace_events()
    receives = [event for event in events if event["operation"].startswith("recv")]
    assert [event["microbatch"] for event in receives] == [0, 1, 2]
    for event in receives:
        assert event["posted_ns"] <= event["started_ns"] <= event["done_ns"]
        assert event["wait_begin_ns"] <= event["done_ns"] <= event["wait_end_ns"]
    assert sum(event["operation"].startswith("send") for event in events) == 3
    assert all(event["bytes"] > 0 for event in receives)
    return bridge.telemetry()


def profiled(rank: int, world_size: int) -> list[str]:
    bridge = make()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        if rank == 0:
            bridge.send_forward(tensor_of(0))
            bridge.recv_backward()
        else:
            y = bridge.irecv_forward().wait() if rank == 1 else bridge.recv_forward()
            bridge.send_backward(y.detach())
        bridge.close()  # a profile that ends while gloo still sends cannot be evaluated
    return sorted({event.key for event in profile.key_averages() if event.key.startswith("mimo_ext::")})


def test_a_profile_names_the_operations() -> None:
    found = launch(profiled, 3, leaks=True)  # the profiler keeps the default group
    assert found[0] == ["mimo_ext::recv_backward.wait", "mimo_ext::send_forward"]
    assert found[1] == ["mimo_ext::recv_forward", "mimo_ext::recv_forward.wait", "mimo_ext::send_backward"]
    assert found[2] == ["mimo_ext::recv_forward.wait", "mimo_ext::send_backward"]


def profiled_in_between(rank: int, world_size: int) -> list[int]:
    """How many receives of gloo each of two profiles has, between which the bridge stays open."""
    found = []
    with make() as bridge, torch.no_grad():
        for step in range(2):
            if rank == 0:
                bridge.isend_forward(tensor_of(step)).wait()
                continue
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                assert torch.equal(bridge.recv_forward(), tensor_of(step))
            names = [event.key for event in profile.key_averages()]
            assert "mimo_ext::recv_forward.wait" in names
            found.append(sum("recv" in name and not name.startswith("mimo_ext") for name in names))
    return found


def test_a_profile_may_end_while_the_bridge_goes_on() -> None:
    """What is received ahead of its microbatch is part of none: it ends after the profile in which it begins."""
    _, first, second = launch(profiled_in_between, 3, leaks=True)  # the profiler keeps the default group
    assert first == second == [0, 0]


def test_what_a_bridge_counts() -> None:
    payload = 64 * 8 * 4
    found = launch(counted, 3)
    source, first, second = found[0], found[1], found[2]
    assert (source["forward"]["sends"], source["forward"]["receives"]) == (3, 0)
    assert 3 * payload <= source["forward"]["bytes_sent"] <= 6 * payload  # once, or once per rank: the plan's path
    # Each rank of the lane ends up with everything; what did not come from the source came from the other.
    for side in (first, second):
        assert side["forward"]["bytes_received"] == 3 * payload
        assert (side["forward"]["receives"], side["backward"]["sends"]) == (3, 3)
    assert source["backward"]["bytes_received"] == 3 * payload
    assert first["backward"]["bytes_sent"] + second["backward"]["bytes_sent"] == 3 * payload
    assert source["backward"]["exposed_s"] > 0.5  # three times 0.2 s
    assert source["backward"]["exposed_s"] >= source["backward"]["transfer_s"]
