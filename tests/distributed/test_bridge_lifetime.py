"""How bridges begin and end: groups that go first, close(), garbage collection, forked processes, errors in between."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import launch, run_ranks

import mimo_ext
from mimo_ext import Layout, _groups
from mimo_ext._extension import _C

TIMEOUT = timedelta(seconds=20)
ROWS = 1 << 18  # 2 MiB: more than a socket takes without a receiver


def make(**options) -> mimo_ext.Bridge:
    return mimo_ext.Bridge(
        Layout([0], name="images"), Layout([1], name="language"), ndim=2, **{"timeout": TIMEOUT, **options}
    )


def tensor_of(step: int, rows: int = ROWS) -> torch.Tensor:
    return torch.full((rows, 2), float(step))


def there_and_back(bridge: mimo_ext.Bridge, step: int) -> None:
    if bridge.is_source:
        bridge.send_forward(tensor_of(step))
        dx = bridge.recv_backward()
        assert dx is not None
        assert torch.equal(dx, tensor_of(10 * step))
    else:
        y = bridge.recv_forward()
        assert torch.equal(y.detach(), tensor_of(step))
        bridge.send_backward(10 * y.detach())


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def settled(function: Callable[[], int], level: int) -> bool:
    """Whether `function()` comes back to `level`: threads that have ended stay for a moment."""
    deadline = time.monotonic() + 10
    while function() > level and time.monotonic() < deadline:
        time.sleep(0.01)
    return function() <= level


# Process groups


def groups_go_first(rank: int, world_size: int) -> None:
    group = dist.new_group([0, 1])
    bridges = [make(), make(group=group)]
    handle = bridges[0].isend_forward(tensor_of(1)) if rank == 0 else bridges[0].irecv_forward()
    dist.barrier()
    dist.destroy_process_group(group)
    dist.destroy_process_group()
    if rank == 0:
        assert handle.wait() is None
        assert torch.equal(bridges[0].recv_backward(), tensor_of(2))
    else:
        assert torch.equal(handle.wait().detach(), tensor_of(1))
        bridges[0].send_backward(tensor_of(2))
    for bridge in bridges:
        there_and_back(bridge, 3)
    for bridge in bridges:
        bridge.close()


def test_a_bridge_goes_on_when_the_process_groups_are_destroyed_under_it() -> None:
    launch(groups_go_first, 2)


# close()


def closed_twice(rank: int, world_size: int) -> None:
    bridge = make()
    there_and_back(bridge, 1)
    handle = bridge.isend_forward(tensor_of(2)) if rank == 0 else bridge.irecv_forward()
    unread = handle.wait() if rank == 0 else None
    bridge.close()
    assert bridge.closed
    bridge.close()
    bridge.close(abort=True)
    # What has arrived is still there, and nothing else can be done.
    assert unread is None if rank == 0 else torch.equal(handle.wait().detach(), tensor_of(2))
    x = tensor_of(1)
    for name, arguments in [
        ("send_forward", [x]),
        ("isend_forward", [x]),
        ("recv_forward", []),
        ("irecv_forward", []),
        ("send_backward", [x]),
        ("isend_backward", [x]),
        ("recv_backward", []),
        ("irecv_backward", []),
        ("send_forward_recv_backward", [x]),
        ("send_backward_recv_forward", [x]),
    ]:
        with pytest.raises(mimo_ext.BridgeError, match=rf"rank {rank}: (send|recv)_\w+: the bridge is closed"):
            getattr(bridge, name)(*arguments)
    with bridge:  # leaving closes it once more
        pass
    dist.barrier()


def test_close_may_be_repeated_and_ends_every_operation() -> None:
    launch(closed_twice, 2)


def peer_dies(rank: int, world_size: int, how: str) -> str:
    bridge = make()
    dist.barrier()
    if rank == 1:
        time.sleep(0.5)
        os._exit(7)
    if how == "with":
        with pytest.raises(mimo_ext.BridgeError) as caught, bridge:
            bridge.send_forward(tensor_of(1))
    elif how == "close":
        bridge.send_forward(tensor_of(1))
        with pytest.raises(mimo_ext.BridgeError) as caught:
            bridge.close()
    else:
        handle = bridge.isend_forward(tensor_of(1))
        with pytest.raises(mimo_ext.BridgeError) as caught:
            handle.wait() if how == "told by a handle" else bridge.recv_backward()
        bridge.close()
    assert bridge.closed
    bridge.close()
    return str(caught.value)


@pytest.mark.parametrize("how", ["with", "close", "told by a handle", "told by an operation"])
def test_close_tells_once_of_what_did_not_arrive(how: str) -> None:
    outcome = run_ranks(peer_dies, 2, how)
    assert outcome.exitcodes[1] == 7
    assert outcome.results[0] is not None, outcome.errors
    expected = r"bridge 'images -> language', rank 0: .* of microbatch 0: \w+ (to|from) rank 1: the peer is gone, "
    assert re.match(expected, outcome.results[0]), outcome.results[0]


# Garbage collection


class Cycle:
    def __init__(self, *held: object) -> None:
        self.held = (self, *held)


def collected(rank: int, world_size: int) -> None:
    gc.freeze()  # what was imported is not looked through each time
    dist.barrier()
    threads, files = tasks(), descriptors()
    kinds = ("bridge", "handle", "tensor")
    for step, order in enumerate([*itertools.permutations(kinds)] * 2):
        held: dict[str, object] = {"bridge": make()}
        bridge = held["bridge"]
        assert isinstance(bridge, mimo_ext.Bridge)
        if rank == 0:
            x = tensor_of(step)
            held["handle"] = bridge.isend_forward(x)
            held["tensor"] = x
            weak = x.untyped_storage()._weak_ref()
            del x
        else:
            handle = bridge.irecv_forward()
            held["handle"] = handle
            held["tensor"] = y = handle.wait()
            assert torch.equal(y.detach(), tensor_of(step))
            weak = y.untyped_storage()._weak_ref()
            del handle, y
        del bridge
        for kind in order:
            if step >= 6:
                cycle = Cycle(held.pop(kind))
                del cycle
            else:
                del held[kind]
            gc.collect()
        assert settled(lambda weak=weak: int(not torch.UntypedStorage._expired(weak)), 0), order
        torch.UntypedStorage._free_weak_ref(weak)
        assert settled(tasks, threads), order
        assert settled(descriptors, files), order


def test_garbage_collection_in_any_order_leaves_nothing_behind() -> None:
    launch(collected, 2, timeout=90)


# fork


def child_of(bridge: mimo_ext.Bridge, handle: mimo_ext.bridge.Handle) -> None:
    """Everything that a program might do with what it has inherited."""
    x = tensor_of(1)
    message = r"bridge 'images -> language', rank \d: .*: the bridge belongs to the process that this one was forked"
    for call in (
        lambda: bridge.send_forward(x),
        bridge.recv_forward,
        bridge.irecv_forward,
        lambda: bridge.send_backward(x),
        bridge.recv_backward,
        bridge.irecv_backward,
        handle.wait,
    ):
        with pytest.raises(mimo_ext.BridgeError, match=message):
            call()
    bridge.close()
    assert bridge.closed


def forked(rank: int, world_size: int) -> None:
    bridge, dropped, inherited, left = make(), make(), make(), make()
    there_and_back(bridge, 1)
    # Threads of the bridge are at work, on both sides.
    handle = bridge.isend_forward(tensor_of(2)) if rank == 0 else bridge.irecv_forward()
    if rank == 0:
        left.send_forward(tensor_of(3))  # a leftover of the parent
    dist.barrier()
    kept = left if rank == 1 else None
    del left
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            child_of(bridge, handle)
            del dropped
            del bridge, handle
            gc.collect()
            _C.finish_leftovers(abort=False)  # as at the end of the interpreter; those of the parent are not awaited
            assert not inherited.closed
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with {status}"
    if rank == 1:
        assert torch.equal(handle.wait().detach(), tensor_of(2))
        bridge.send_backward(tensor_of(20))
        assert kept is not None
        assert torch.equal(kept.recv_forward().detach(), tensor_of(3))
        kept.close()
    else:
        assert handle.wait() is None
        assert torch.equal(bridge.recv_backward(), tensor_of(20))
    for one in (bridge, dropped, inherited):
        there_and_back(one, 4)
        one.close()


def test_a_forked_child_can_neither_use_nor_harm_the_bridges_of_its_parent() -> None:
    launch(forked, 2)


def worker_of(rank: int) -> None:
    assert rank in (0, 1)


def forked_workers(rank: int, world_size: int) -> None:
    bridge = make()
    there_and_back(bridge, 1)
    # As a DataLoader does.
    workers = [multiprocessing.get_context("fork").Process(target=worker_of, args=(rank,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    there_and_back(bridge, 2)
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0
    there_and_back(bridge, 3)
    bridge.close()


def test_worker_processes_that_are_forked_during_training_end_by_themselves() -> None:
    launch(forked_workers, 2)


# Errors of the program itself


def error_in_between(rank: int, world_size: int) -> None:
    """An error that the program survives is none of the bridge's business."""
    bridge = make()
    for step in range(1, 4):
        try:
            if rank == 0:
                bridge.send_forward(tensor_of(step))
                raise KeyError("user code")
            handle = bridge.irecv_forward()
            raise KeyError("user code")
        except KeyError:
            pass
        if rank == 0:
            assert torch.equal(bridge.recv_backward(), tensor_of(10 * step))
        else:
            y = handle.wait()
            assert torch.equal(y.detach(), tensor_of(step))
            bridge.send_backward(10 * y.detach())
    bridge.close()


def test_an_error_between_two_operations_disturbs_neither_side() -> None:
    launch(error_in_between, 2)


# Construction


def closes_at_once(rank: int, world_size: int) -> float:
    """Rank 2 is a second behind the others with its connections; they all close at once."""
    before = time.monotonic()
    if rank == 2:
        original = _groups._say_connected

        def late(*args) -> None:
            time.sleep(1.0)
            original(*args)

        _groups._say_connected = late
    bridge = mimo_ext.Bridge(Layout([0, 1], tp=2), Layout([2, 3], tp=2), ndim=2, timeout=TIMEOUT)
    made = time.monotonic() - before
    bridge.close()
    return made


def test_no_rank_leaves_the_constructor_before_all_have_their_connections() -> None:
    assert min(launch(closes_at_once, 4)) > 0.8


def many_short_lives(rank: int, world_size: int) -> None:
    for _ in range(15):
        mimo_ext.Bridge(Layout([0, 1, 2], tp=3), Layout([3, 4, 5], tp=3), ndim=2, timeout=TIMEOUT).close()


def test_bridges_that_are_closed_at_once_do_not_break_those_that_still_connect() -> None:
    launch(many_short_lives, 6)


def one_never_connects(rank: int, world_size: int, folder: str) -> str:
    """It dies when it has its connections, before it has said so."""
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/w", rank=rank, world_size=world_size, timeout=timedelta(seconds=4)
    )
    made = []

    def die(*args) -> None:
        made.append(args)
        if len(made) == 2:  # both directions
            time.sleep(0.5)  # the other rank has them as well
            os._exit(7)

    if rank == 1:
        _groups._say_connected = die
    with pytest.raises(RuntimeError) as caught:
        make(timeout=timedelta(seconds=1))
    return str(caught.value)


def test_a_rank_that_dies_at_the_end_of_the_constructor_is_named(tmp_path: Path) -> None:
    outcome = run_ranks(one_never_connects, 2, str(tmp_path))
    assert outcome.exitcodes[1] == 7
    expected = "bridge 'images -> language', rank 0: connections: waited 4 s for rank 1 to make theirs"
    assert outcome.results[0] == expected, outcome.errors
