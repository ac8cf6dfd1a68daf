"""The watch over what ranks and tests leave behind can find something."""

from __future__ import annotations

import os
import threading
from typing import Any

import leaks
import pytest
import torch
import torch.distributed as dist
from launch import launch, run_ranks

import mimo_ext
from mimo_ext import Layout

KEPT: list[Any] = []
# How gloo calls its threads. Before torch 2.13 they keep the name of the thread that made them.
GLOO_THREAD = "python" if torch.__version__.startswith(("2.11.", "2.12.")) else "gloo_tcp_loop"


def leaking(rank: int, world_size: int) -> None:
    """Each rank keeps something else."""
    leaks.PATIENCE_S = 0.3
    bridge = mimo_ext.Bridge(Layout([0, 1], dp=2, name="images"), Layout([2, 3], tp=2, name="language"), ndim=2)
    if bridge.is_source:
        x = torch.ones(3, 5) * rank
        bridge.send_forward(x)
        gradient = bridge.recv_backward()
        if rank == 0:
            KEPT.append(x.data[1:])  # any tensor of the storage that was sent
        if rank == 1:
            KEPT.append(gradient)
    elif bridge.is_destination:
        bridge.send_backward(bridge.recv_forward().detach())
    if rank == 2:
        KEPT.append(os.pipe())
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    if rank == 3:
        KEPT.append(bridge)
    dist.barrier()
    bridge.close()


def test_what_a_rank_leaves_behind_is_found() -> None:
    outcome = run_ranks(leaking, 5, timeout=60)
    left = {
        rank: error.strip().splitlines()[-1].partition("left behind: ")[2] for rank, error in outcome.errors.items()
    }
    edge = "storage of bridge 'images -> language'"
    assert left == {
        0: f"1 x {edge} send_forward: [3, 5] torch.float32",
        1: f"1 x {edge} recv_backward: [3, 5] torch.float32",
        2: "2 x descriptor pipe; 1 x thread python",
        3: "1 x bridge",
    }
    launch(leaking, 4, leaks=True)


def unclosed(rank: int, world_size: int) -> None:
    leaks.PATIENCE_S = 0.3
    bridge = mimo_ext.Bridge(Layout([0]), Layout([1]), ndim=2)
    bridge.send_forward(torch.ones(1, 1)) if rank == 0 else bridge.recv_forward()
    dist.barrier()
    KEPT.append(bridge._communicator)  # as a handle that somebody keeps does


def test_connections_of_a_bridge_that_somebody_keeps_are_found() -> None:
    errors = run_ranks(unclosed, 2, timeout=60).errors
    assert len(errors) == 2
    for error in errors.values():
        left = error.strip().splitlines()[-1]
        assert f"2 x thread {GLOO_THREAD}" in left
        assert "descriptor socket" in left


def group_kept(rank: int, world_size: int) -> None:
    leaks.PATIENCE_S = 0.3
    KEPT.append(dist.group.WORLD)


def test_a_process_group_that_somebody_keeps_is_found() -> None:
    errors = run_ranks(group_kept, 2, timeout=60).errors
    assert len(errors) == 2
    assert all(f"thread {GLOO_THREAD}" in error for error in errors.values())


def test_a_level_is_growth_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "PATIENCE_S", 0.2)
    unused = os.pipe()
    before = leaks.Level.now()
    assert before.growth() == []
    event = threading.Event()
    thread = threading.Thread(target=event.wait)
    thread.start()
    more = os.dup(unused[0])
    assert before.growth() == ["1 x descriptor pipe", "1 x thread python"]
    for descriptor in (*unused, more):
        os.close(descriptor)
    event.set()
    assert before.growth() == []
    thread.join()


def test_a_thread_that_is_about_to_end_is_waited_for() -> None:
    before = leaks.Level.now()
    threading.Timer(0.3, lambda: None).start()
    assert before.growth() == []
