"""Bridges that nobody closed: what was sent arrives, and processes end."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import launch

import mimo_ext

PARTS = 5


def make(**options) -> mimo_ext.Bridge:
    return mimo_ext.Bridge(mimo_ext.Layout([0]), mimo_ext.Layout([1]), ndim=2, **options)


def mimo_threads() -> int:
    found = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += "mimo-" in (task / "comm").read_text()
    return found


def dropped_sender(rank: int, world_size: int) -> None:
    bridge = make()
    if rank == 0:
        for part in range(PARTS):
            bridge.send_forward(torch.full((1000, 10), float(part)))
        bridge.irecv_backward()  # given up, silently
        start = time.monotonic()
        del bridge
        assert time.monotonic() - start < 10  # nobody waits in a garbage collection: the receiver has not begun
        dist.barrier()  # only now does the receiver start
        dist.barrier()
        deadline = time.monotonic() + 10
        while mimo_threads() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert mimo_threads() == 0
    else:
        dist.barrier()
        for part in range(PARTS):
            torch.testing.assert_close(bridge.recv_forward().detach(), torch.full((1000, 10), float(part)))
        bridge.close()
        dist.barrier()


def test_what_a_dropped_bridge_has_sent_arrives() -> None:
    launch(dropped_sender, 2)


PROGRAM = """
import os, sys
from datetime import timedelta
import torch, torch.distributed as dist
import mimo_ext
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
bridge = mimo_ext.Bridge(mimo_ext.Layout([0]), mimo_ext.Layout([1]), ndim=2, timeout=timedelta(seconds=60))
if rank == 0:
    bridge.send_forward(torch.arange(200000.0).view(-1, 2))
    if sys.argv[3] == "raise":
        raise KeyError("something else went wrong")
else:
    import time
    time.sleep(1.0)
    if sys.argv[3] == "end":
        torch.testing.assert_close(bridge.recv_forward().detach(), torch.arange(200000.0).view(-1, 2))
    else:
        time.sleep(60)
"""


@pytest.mark.parametrize("how", ["end", "raise"])
def test_a_program_that_ends_waits_for_its_sends_unless_it_failed(tmp_path: Path, how: str) -> None:
    environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    environment["PYTHONPATH"] = str(Path(mimo_ext.__file__).parent.parent)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, str(rank), str(tmp_path / "rendezvous"), how],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        start = time.monotonic()
        _, errors = ranks[0].communicate(timeout=50)
        if how == "end":
            assert ranks[0].returncode == 0, errors
            assert ranks[1].wait(timeout=30) == 0
        else:
            assert ranks[0].returncode == 1
            assert "something else went wrong" in errors.splitlines()[-1]
            assert time.monotonic() - start < 45  # long before the receiver ends
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def dropped_with_posted_receives(rank: int, world_size: int) -> None:
    """Only what was sent matters: a receive that nobody waits for is given up."""
    bridge = make(timeout=timedelta(seconds=30))
    if rank == 1:
        handle = bridge.irecv_forward()
        del bridge
        start = time.monotonic()
        with pytest.raises(mimo_ext.BridgeError, match="the bridge was dropped"):
            handle.wait()
        assert time.monotonic() - start < 15
    dist.barrier()


def test_receives_of_a_dropped_bridge_are_given_up() -> None:
    launch(dropped_with_posted_receives, 2)


def dropped_in_a_thread(rank: int, world_size: int) -> None:
    bridge = make()
    if rank == 0:
        bridge.send_forward(torch.ones(3, 2))
        holder = [bridge]
        del bridge
        thread = threading.Thread(target=holder.clear)
        thread.start()
        thread.join()
    else:
        torch.testing.assert_close(bridge.recv_forward().detach(), torch.ones(3, 2))
        bridge.close()
    dist.barrier()


def test_a_bridge_may_be_dropped_by_another_thread() -> None:
    launch(dropped_in_a_thread, 2)
