"""How bridges begin: the meeting of the ranks, connections that bridges share, and what becomes of them."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import launch, run_ranks

import mimo_ext
from mimo_ext import Layout
from mimo_ext._agreement import Meeting
from mimo_ext._groups import Connection, connect
from mimo_ext._setup import Setup

SHORT = timedelta(seconds=3)
LONG = timedelta(seconds=40)


@contextmanager
def world(rank: int, world_size: int, store: str, timeout: timedelta) -> Iterator[None]:
    """A default process group in place of the launcher's."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    yield


def number(bridge: int, microbatch: int, rank: int, backward: bool = False) -> float:
    return 1000.0 * bridge + 100.0 * microbatch + 10.0 * backward + rank


def exchange(bridges: list[mimo_ext.Bridge], rank: int) -> None:
    """Two microbatches on every bridge, all sent before any is received; gradients come back in another order."""
    sources = {0: 2, 1: 3}
    for microbatch in range(2):
        for index, bridge in enumerate(bridges):
            if bridge.is_source:
                bridge.send_forward(torch.full((3, 2), number(index, microbatch, rank)))
    for index, bridge in reversed(list(enumerate(bridges))):
        for microbatch in range(2):
            if bridge.is_destination:
                peer = rank - 2
                assert sources[peer] == rank
                x = bridge.recv_forward()
                assert torch.equal(x, torch.full((3, 2), number(index, microbatch, peer))), (index, microbatch, x)
                bridge.send_backward(torch.full((3, 2), number(index, microbatch, rank, True)))
    for index, bridge in enumerate(bridges):
        for microbatch in range(2):
            if bridge.is_source:
                dx = bridge.recv_backward()
                assert dx is not None
                assert torch.equal(dx, torch.full((3, 2), number(index, microbatch, sources[rank], True)))


def pairs(**options: object) -> mimo_ext.Bridge:
    """Ranks 0 and 1 feed 2 and 3, each its own."""
    return mimo_ext.Bridge(Layout([0, 1], dp=2), Layout([2, 3], dp=2), ndim=2, timeout=LONG, **options)  # type: ignore[arg-type]


def several_at_once(rank: int, world_size: int) -> None:
    with Setup("three") as setup:
        bridges = [pairs(name=f"bridge {index}", setup=setup) for index in range(3)]
        assert bridges[0].is_source == (rank in (0, 1))
        with pytest.raises(mimo_ext.BridgeError, match=r"bridge 'bridge 0': its setup did not finish"):
            bridges[0].send_forward(torch.zeros(3, 2))
    alone = pairs(name="alone")
    if rank == 4:
        assert all(bridge._groups is None for bridge in bridges)
    else:
        held = [bridge._groups for bridge in bridges]
        assert [groups.first_tag for groups in held if groups] == [0, 16, 32]
        assert {groups.forward for groups in held if groups} == {held[0].forward}  # type: ignore[union-attr]
        assert held[0].forward is not held[0].backward  # type: ignore[union-attr]
        assert alone._groups is not None
        assert alone._groups.forward is not held[0].forward  # type: ignore[union-attr]
        # Only ranks that exchange something are connected.
        assert held[0].ranks == ((0, 2) if rank % 2 == 0 else (1, 3))  # type: ignore[union-attr]
    exchange([*bridges, alone], rank)
    bridges[1].close()
    exchange([bridges[0], bridges[2]], rank)
    alone.close(abort=True)
    exchange([bridges[2]], rank)
    bridges[2].close()
    bridges[0].close()
    # Also a bridge of ranks that have failed before begins anew.
    exchange([pairs()], rank)


def test_bridges_between_the_same_ranks_share_connections_and_do_not_mix_their_messages() -> None:
    launch(several_at_once, 5)


def two_setups(rank: int, world_size: int, folder: str) -> None:
    made = []
    for attempt in range(2):
        with world(rank, world_size, f"{folder}/{attempt}", LONG):
            for _ in range(2):
                with Setup() as setup:
                    made.append([pairs(setup=setup), pairs(setup=setup, name="second")])
            exchange([*made[-1], *made[-2]], rank)
            first, second = made[-2:]
            for bridge in (first[1], second[0]) if rank % 2 else (second[0], first[1]):
                bridge.close()
            exchange([first[0], second[1]], rank)
    # The bridges of the first world were never closed.
    for bridge in (bridge for bridges in made for bridge in bridges):
        bridge.close()


def test_a_new_world_begins_anew_whatever_was_left_open(tmp_path: Path) -> None:
    launch(two_setups, 4, str(tmp_path))


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def settled(number: int) -> bool:
    """Whether there are so many threads: one that has ended stays for a moment."""
    deadline = time.monotonic() + 10
    while threads() != number and time.monotonic() < deadline:
        time.sleep(0.01)
    return threads() == number


def counted(rank: int, world_size: int) -> None:
    before = threads()
    meetings = [Meeting("a test") for _ in range(3)]
    held = [groups for meeting in meetings for groups in connect(meeting, [Connection(range(4), "a test")]) if groups]
    assert len(held) == 3
    assert settled(before + 2)  # a device per direction
    for groups in held:
        mine, peers = torch.tensor([rank]), torch.zeros(4, dtype=torch.int64)
        works = [groups.backward.recv([peers[r : r + 1]], r, groups.first_tag) for r in range(4) if r != rank]
        works += [groups.backward.send([mine], r, groups.first_tag) for r in range(4) if r != rank]
        for work in works:
            work.wait(LONG)
        peers[rank] = rank
        assert peers.tolist() == [0, 1, 2, 3]
    dist.barrier()
    del groups, held, works, work
    gc.collect()
    assert settled(before)


def test_connections_take_one_thread_per_direction_and_give_it_back() -> None:
    launch(counted, 4)


def one_is_late(rank: int, world_size: int, folder: str) -> str:
    with world(rank, world_size, f"{folder}/never", SHORT):
        begin = time.monotonic()
        if rank == 2:
            time.sleep(2 * SHORT.total_seconds())
            return ""
        with pytest.raises(RuntimeError) as caught:
            mimo_ext.Bridge(Layout([0]), Layout([1]), ndim=2, name="a -> b", timeout=timedelta(seconds=1))
        assert SHORT.total_seconds() <= time.monotonic() - begin < 20
        return str(caught.value)


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    texts = launch(one_is_late, 4, str(tmp_path))
    for rank in (0, 1, 3):
        assert texts[rank] == f"bridge 'a -> b', rank {rank}: waited 3 s for rank 2 to set it up, too"


def one_ends(rank: int, world_size: int, folder: str) -> str:
    with world(rank, world_size, f"{folder}/ends", SHORT):
        setup = Setup("two bridges")
        layouts = [(Layout([0]), Layout([2])), (Layout([0], name="x"), Layout([1], name="y"))]
        bridges = [mimo_ext.Bridge(*pair, ndim=2, setup=setup) for pair in layouts]
        setup.agree()
        if rank == 1:
            os._exit(7)
        if rank == 2:
            setup.connect()
            return ""
        with pytest.raises(RuntimeError) as caught:
            setup.connect()
        assert all(bridge.closed for bridge in bridges)
        return str(caught.value)


def test_a_rank_that_ends_after_the_agreement_is_named(tmp_path: Path) -> None:
    outcome = run_ranks(one_ends, 3, str(tmp_path))
    assert outcome.exitcodes[1] == 7
    assert outcome.results[0] == "bridge 'x -> y', rank 0: connections for forward traffic: waited 3 s for rank 1"
    assert outcome.results[2] == ""


def two_bridges(*, third: bool = False, **second: object) -> mimo_ext.Bridge:
    with Setup("two bridges") as setup:
        first = pairs(setup=setup)
        pairs(setup=setup, **second)
        if third:
            pairs(setup=setup)
    return first


def disagree(rank: int, world_size: int) -> list[str]:
    texts = []
    for odd, options in ((3, {"dtype": torch.float64}), (3, {"max_in_flight": 0}), (2, {"third": True})):
        with pytest.raises(ValueError, match=r"max_in_flight|two bridges") as caught:
            two_bridges(**(options if rank == odd else {}))  # type: ignore[arg-type]
        texts.append(str(caught.value))
    exchange([two_bridges()], rank)  # and nobody is out of step
    return texts


def test_what_differs_in_one_of_several_bridges_is_named_on_every_rank() -> None:
    for rank, (dtype, refused, number_of) in enumerate(launch(disagree, 4)):
        assert f"two bridges, rank {rank}: the ranks describe different bridges: expected (rank 0) 'source" in dtype
        assert "dtype=torch.float32" in dtype.split("got (rank 3)")[0]
        assert "dtype=torch.float64" in dtype.split("got (rank 3)")[1]
        assert "max_in_flight must be positive, got 0" in refused
        assert "expected (rank 0) 'nothing', got (rank 2) 'source -> destination" in number_of


def of_a_group(rank: int, world_size: int) -> None:
    """Ranks 1 and 3 begin by themselves, twice, while the world meets another number of times."""
    group = dist.new_group([1, 3])
    if rank == 0:
        dist.barrier()  # after the two
    else:
        for shift in range(2):
            if rank in (1, 3):
                bridge = mimo_ext.Bridge(Layout([1]), Layout([3]), ndim=2, group=group, timeout=LONG)
                x = torch.arange(6.0).reshape(3, 2) + shift
                if rank == 1:
                    bridge.send_forward(x)
                else:
                    assert torch.equal(bridge.recv_forward(), x)
                bridge.close()
        dist.barrier()
    exchange([pairs()], rank)
    if rank in (1, 3):
        with pytest.raises(ValueError, match=r"expected ranks of the process group \(2 ranks\), got \[0\]"):
            mimo_ext.Bridge(Layout([0]), Layout([3]), ndim=2, group=group)


def test_a_bridge_of_a_group_needs_its_ranks_alone() -> None:
    launch(of_a_group, 4)
