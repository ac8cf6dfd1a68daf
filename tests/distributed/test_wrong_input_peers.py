"""Where one rank refuses an input and gives up, the ranks that wait for it hear of it at once, and why."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch

from mimo_ext import Bridge, BridgeError, Layout

TIMEOUT = timedelta(seconds=40)
AT_ONCE_S = 10.0  # far less than the timeout, and room for a busy machine


def make(static: bool) -> Bridge:
    sides = Layout([0, 1], dp=2, name="images"), Layout([2, 3], tp=2, name="language")
    return Bridge(*sides, shape=(4, 3) if static else None, timeout=TIMEOUT)


def train(bridge: Bridge, rank: int, wrong: int, operation: str) -> None:
    """Microbatches, until all are stopped; in the second one `wrong` hands in what is refused."""
    for step in range(8):
        bad = rank == wrong and step == 1
        if bridge.is_source:
            x = torch.full((2, 3), 1.0 + rank)
            bridge.send_forward(x.double() if bad and operation == "send_forward" else x)
            bridge.recv_backward()
        else:
            y = bridge.recv_forward()
            assert torch.equal(y.detach()[:, 0], torch.tensor([1.0, 1.0, 2.0, 2.0]))
            dy = y.detach()
            bridge.send_backward(dy[:3] if bad and operation == "send_backward" else dy)


def refusals(rank: int, world_size: int, wrong: int, operation: str, static: bool) -> tuple[str, str, float]:
    begin = time.monotonic()
    try:
        with make(static) as bridge:
            train(bridge, rank, wrong, operation)
    except (ValueError, BridgeError) as error:
        found = type(error).__name__, str(error), time.monotonic() - begin
    dist.barrier()  # all are still here: it is no process that has ended
    return found


@pytest.mark.parametrize("static", [False, True], ids=["varying", "static"])
@pytest.mark.parametrize(("operation", "wrong"), [("send_forward", 0), ("send_forward", 1), ("send_backward", 3)])
def test_all_ranks_hear_of_a_refusal_at_once(operation: str, wrong: int, static: bool) -> None:
    found = launch(refusals, 4, wrong, operation, static)
    error, reason, _ = found[wrong]
    assert error == "ValueError"
    assert f"rank {wrong}" in reason
    assert "expected dtype Float, got Double" in reason or "expected a gradient of shape [4, 3], got [3, 3]" in reason
    for rank, (error, text, seconds) in enumerate(found):
        if rank == wrong:
            continue
        assert error == "BridgeError", text
        assert f"bridge 'images -> language', rank {rank}: " in text
        assert re.search(r"of microbatch [0-7]: ", text), text
        assert re.search(r"rank \d( gave up: |: the peer is gone)", text), text
        assert seconds < AT_ONCE_S + found[wrong][2], text
        # With static shapes all that exchange something hear it from the rank itself, or from one that has heard it.
        assert not static or f"rank {wrong} gave up: ValueError: " in text, text
    # Who waits for the refusing rank itself names it and tells why.
    waiting = [text for rank, (_, text, _) in enumerate(found) if (rank < 2) != (wrong < 2)]
    named = [
        f"rank {wrong}: the peer is gone" in text or f"rank {wrong} gave up: ValueError: " in text for text in waiting
    ]
    assert all(named) if operation == "send_forward" else any(named), waiting


def shared(rank: int, world_size: int, static: bool) -> tuple[str, float]:
    """Two bridges over the same connections; one rank gives up one of them."""
    from mimo_ext._setup import Setup

    shape = (2, 3) if static else None
    with Setup("two") as setup:
        first, second = (
            Bridge(Layout([0]), Layout([1]), setup=setup, name=name, timeout=TIMEOUT, shape=shape) for name in "ab"
        )
    text, seconds = "", 0.0
    if rank == 0:
        with pytest.raises(ValueError, match="out of samples"), first:
            raise ValueError("out of samples")
        second.send_forward(torch.ones(2, 3))
    else:
        begin = time.monotonic()
        with pytest.raises(BridgeError) as caught:
            first.recv_forward()
        text, seconds = str(caught.value), time.monotonic() - begin
        assert torch.equal(second.recv_forward().detach(), torch.ones(2, 3))
        first.close(abort=True)
    second.close()
    return text, seconds


@pytest.mark.parametrize("static", [False, True], ids=["varying", "static"])
def test_a_bridge_is_given_up_by_name_and_others_over_its_connections_go_on(static: bool) -> None:
    for _ in range(3):
        text, seconds = launch(shared, 2, static)[1]
        assert text == "bridge 'a', rank 1: recv_forward of microbatch 0: rank 0 gave up: ValueError: out of samples"
        assert seconds < AT_ONCE_S


def left_posted(rank: int, world_size: int, static: bool) -> None:
    """One bridge is given up with receives that are posted; what is sent for them comes before the other's."""
    from mimo_ext._setup import Setup

    sides: Any = Layout([0]), Layout([1])
    options: dict[str, Any] = {"timeout": timedelta(seconds=15), "shape": (1024, 64) if static else None}
    with Setup("two") as setup:
        first, second = (Bridge(*sides, setup=setup, name=name, **options) for name in "ab")
    x = torch.arange(1024.0 * 64).view(1024, 64)
    if rank == 1:
        for _ in range(3):
            first.irecv_forward()
        first.close(abort=True)
    dist.barrier()
    if rank == 0:
        for _ in range(3):
            first.send_forward(x)
        first.close(abort=True)
        second.send_forward(x)
        assert torch.equal(second.recv_backward(), 2 * x)  # type: ignore[arg-type]
    else:
        y = second.recv_forward().detach()
        assert torch.equal(y, x)
        second.send_backward(2 * y)
    second.close()


@pytest.mark.parametrize("static", [False, True], ids=["varying", "static"])
def test_messages_for_receives_that_were_dropped_do_not_stand_in_the_way_of_another_bridge(static: bool) -> None:
    launch(left_posted, 2, static)


def full(rank: int, world_size: int) -> tuple[str, float]:
    """A sender waits for room; its receiver gives up, over connections that stay."""
    from mimo_ext._setup import Setup

    sides: Any = Layout([0]), Layout([1])
    options: dict[str, Any] = {"timeout": TIMEOUT, "shape": (1024, 1024), "max_in_flight": 2}
    with Setup("two") as setup:
        first, second = (Bridge(*sides, setup=setup, name=name, **options) for name in "ab")
    x, text, seconds = torch.ones(1024, 1024), "", 0.0
    if rank == 0:
        begin = time.monotonic()
        first.send_forward(x)
        first.send_forward(x)
        with pytest.raises(BridgeError) as caught:
            first.send_forward(x)
        text, seconds = str(caught.value), time.monotonic() - begin
        first.close(abort=True)
        second.send_forward(x)
    else:
        time.sleep(0.3)
        with pytest.raises(ValueError, match="no room"), first:
            raise ValueError("no room")
        assert torch.equal(second.recv_forward().detach(), x)
    second.close()
    return text, seconds


def test_a_sender_that_waits_for_room_hears_that_the_receiver_gave_up() -> None:
    text, seconds = launch(full, 2)[0]
    assert text == "bridge 'a', rank 0: send_forward of microbatch 0: rank 1 gave up: ValueError: no room"
    assert seconds < AT_ONCE_S


def chained(rank: int, world_size: int, close: str, static: bool) -> str:
    """0 -> 1 -> 2: what stops rank 0 is known to rank 2, that has nothing to do with it."""
    sides = [Layout([number], name=name) for number, name in enumerate(("audio", "images", "language"))]
    shape = (2, 3) if static else None
    bridges = [Bridge(*sides[begin : begin + 2], shape=shape, timeout=TIMEOUT) for begin in range(2)]

    def give_up(bridge: Bridge) -> None:
        if close == "with":
            bridge.__exit__(*_exception())
        else:
            bridge.close(abort=True)

    try:
        if rank == 0:
            raise RuntimeError("no more audio")
        x = bridges[rank - 1].recv_forward()
        bridges[1].send_forward(x)
    except (BridgeError, RuntimeError) as error:
        for bridge in bridges:
            give_up(bridge)
        found = str(error)
    dist.barrier()
    return found


def _exception() -> tuple[type[BaseException] | None, BaseException | None, None]:
    import sys

    error = sys.exc_info()[1]
    return (type(error) if error else None), error, None


@pytest.mark.parametrize("static", [False, True], ids=["varying", "static"])
@pytest.mark.parametrize("close", ["with", "abort"])
def test_the_first_cause_goes_from_bridge_to_bridge(close: str, static: bool) -> None:
    _, second, third = launch(chained, 3, close, static)
    cause = "rank 0 gave up: RuntimeError: no more audio"
    assert second == f"bridge 'audio -> images', rank 1: recv_forward of microbatch 0: {cause}"
    assert third.startswith("bridge 'images -> language', rank 2: recv_forward of microbatch 0: rank 1 gave up: ")
    assert third.endswith(cause)


def latecomer(rank: int, world_size: int) -> float:
    """Nobody waits for the rank that gives up: it does not stay for long."""
    bridge = Bridge(Layout([0]), Layout([1]), timeout=TIMEOUT)
    begin = time.monotonic()
    if rank == 0:
        bridge.close(abort=True)
    seconds = time.monotonic() - begin
    dist.barrier()
    if rank == 1:
        with pytest.raises(BridgeError, match="rank 0 gave up: the bridge was closed with abort=True"):
            bridge.recv_forward()
        bridge.close(abort=True)
    return seconds


def test_a_rank_that_gives_up_does_not_wait_for_those_who_do_not_listen() -> None:
    assert launch(latecomer, 2)[0] < AT_ONCE_S
