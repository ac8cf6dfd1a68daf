"""Who sends a gradient has received its microbatch: what was sent for it is let go of when the gradient is here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import mimo_ext

STEPS = 200


@pytest.fixture
def world() -> Iterator[None]:
    """Eight ranks, of which this is the first; every message is complete once it is posted."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


def released_at_once(path: str, backward: bool) -> int:
    """Of `STEPS` microbatches, those whose storage is gone when the next operation after the send has ended.

    Without a gradient nothing tells: a thread looks after the sends a little later.
    """
    found = 0
    source = mimo_ext.Layout(range(4), tp=4, name="images")
    destination = mimo_ext.Layout(range(4, 8), tp=4, name="language")
    with mimo_ext.Bridge(source, destination, ndim=2, shape=(2**14, 4), path=path) as bridge:
        for _ in range(STEPS):
            x = torch.ones(2**14, 4)
            weak = x.untyped_storage()._weak_ref()
            with torch.set_grad_enabled(backward):
                bridge.send_forward(x)
            del x
            if backward:
                assert bridge.recv_backward().shape == (2**14, 4)
            found += torch.UntypedStorage._expired(weak)
            torch.UntypedStorage._free_weak_ref(weak)
    return found


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("path", ["pipelined", "direct"])
def test_the_arrival_of_a_gradient_ends_its_send(path: str) -> None:
    # Not where the thread happens to look after it in this very moment.
    assert released_at_once(path, backward=True) > 0.9 * STEPS


@pytest.mark.usefixtures("world")
def test_without_a_gradient_a_thread_ends_sends_later() -> None:
    assert released_at_once("pipelined", backward=False) < 0.5 * STEPS
