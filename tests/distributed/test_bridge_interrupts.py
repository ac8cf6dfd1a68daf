"""Ctrl-C ends every wait at once, and what it has interrupted can be gone on with. Receives: test_bridge_driving.py."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from exchange import hear, tell
from launch import launch

import mimo_ext
from mimo_ext import Layout
from mimo_ext._setup import Setup

TIMEOUT = timedelta(seconds=30)
SHORT = timedelta(seconds=2)
AFTER_S = 0.5
ROWS = 1 << 18  # 2 MiB: more than a socket takes without a receiver


def make(**options) -> mimo_ext.Bridge:
    return mimo_ext.Bridge(
        Layout([0], name="images"), Layout([1], name="language"), ndim=2, **{"timeout": TIMEOUT, **options}
    )


def tensor_of(step: int) -> torch.Tensor:
    return torch.full((ROWS, 2), float(step))


def interrupted(call: Callable[[], object]) -> None:
    """`call` is interrupted after half a second, and ends soon after that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    threading.Timer(AFTER_S, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        call()
    assert AFTER_S - 0.1 < time.monotonic() - start < AFTER_S + 20  # timeouts are longer


def in_handles(rank: int, world_size: int) -> None:
    bridge = make()
    if rank == 0:
        handle = bridge.isend_forward(tensor_of(1))
        interrupted(handle.wait)
        dist.barrier()
        assert handle.wait() is None
        handle = bridge.irecv_backward()
        interrupted(handle.wait)
        dist.barrier()
        assert torch.equal(handle.wait(), tensor_of(2))
    else:
        dist.barrier()
        handle = bridge.irecv_forward()
        assert torch.equal(handle.wait().detach(), tensor_of(1))
        dist.barrier()
        bridge.send_backward(tensor_of(2))
    bridge.close()


def test_in_the_wait_of_a_handle() -> None:
    launch(in_handles, 2)


def in_a_crowd(rank: int, world_size: int) -> None:
    """What was not sent because of the interrupt is not sent: the next microbatch is the next one."""
    bridge = make(max_in_flight=1)
    if rank == 0:
        bridge.send_forward(tensor_of(1))
        interrupted(lambda: bridge.send_forward(tensor_of(2)))
        dist.barrier()
        bridge.send_forward(tensor_of(3))
    else:
        dist.barrier()
        assert torch.equal(bridge.recv_forward().detach(), tensor_of(1))
        assert torch.equal(bridge.recv_forward().detach(), tensor_of(3))
    bridge.close()


def test_in_a_send_that_waits_for_earlier_ones() -> None:
    launch(in_a_crowd, 2)


def in_close(rank: int, world_size: int) -> None:
    """The bridge is closed then, without waiting: its peer hears of it."""
    bridge = make()
    if rank == 0:
        bridge.send_forward(tensor_of(1))
        interrupted(bridge.close)
        assert bridge.closed
        dist.barrier()
    else:
        dist.barrier()
        with pytest.raises(
            mimo_ext.BridgeError, match=r"rank 1: recv_forward of microbatch 0: .* rank 0: the peer is gone"
        ):
            bridge.recv_forward()
        bridge.close()


def test_in_close() -> None:
    launch(in_close, 2)


def in_the_function(rank: int, world_size: int) -> None:
    """The differentiable form, forwards and backwards."""
    bridge = make()
    if rank == 1:
        interrupted(lambda: mimo_ext.bridge(None, bridge))
        dist.barrier()
        dist.barrier()
    else:
        dist.barrier()
        start = mimo_ext.bridge(tensor_of(1), bridge)
        interrupted(start.backward)
        dist.barrier()
    bridge.close(abort=True)


def test_in_the_differentiable_form() -> None:
    launch(in_the_function, 2)


@contextmanager
def short_world(rank: int, world_size: int, folder: str, timeout: timedelta = SHORT) -> Iterator[None]:
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/world", rank=rank, world_size=world_size, timeout=timeout
    )
    yield


def in_the_meeting(rank: int, world_size: int, folder: str) -> str:
    with short_world(rank, world_size, folder):
        if rank == 0:
            interrupted(lambda: make(timeout=SHORT))
            tell("rank 0 has left")
            return ""
        hear("rank 0 has left")
        with pytest.raises(RuntimeError) as caught:
            make(timeout=SHORT)
        return str(caught.value)


def test_while_the_constructor_waits_for_other_ranks(tmp_path: Path) -> None:
    # Rank 0 has said what it wants, and then never connects.
    text = launch(in_the_meeting, 2, str(tmp_path))[1]
    assert text == "bridge 'images -> language', rank 1: connections for forward traffic: waited 2 s for rank 0"


def while_connecting(rank: int, world_size: int, folder: str) -> float:
    with short_world(rank, world_size, folder, TIMEOUT):
        setup = Setup("one bridge")
        bridge = make(setup=setup)
        setup.agree()
        if rank == 1:
            hear("rank 0 has left")
            return 0.0
        interrupted(setup.connect)
        assert bridge.closed
        tell("rank 0 has left")
    return time.monotonic()


def test_while_the_constructor_connects(tmp_path: Path) -> None:
    # The thread that still waits for the connection, for half a minute, does not keep the process from ending.
    ended = launch(while_connecting, 2, str(tmp_path), leaks=True)[0]
    assert time.monotonic() - ended < 15.0
