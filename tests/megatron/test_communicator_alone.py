"""Transfers that come alone or in another order than the schedule's: Megatron's own classes allow them."""

from __future__ import annotations

from typing import Any

import torch
from launch import launch
from megatron.core.model_parallel_config import ModelParallelConfig
from pipeline_model import grid

from mimo_ext.megatron.communicator import MultiModulePipelineCommunicator

GRIDS = {
    "images": grid(0),
    "audio": grid(1),
    "language": grid(2, tp=2, pp=2),
    "generator": grid(6, dp=2),
}
TOPOLOGY = {"images": ["language"], "audio": ["language"], "language": ["generator"], "generator": []}


def tensor(name: str, length: int, seed: int = 0, batch: int = 2) -> torch.Tensor:
    """[b, s, h], the same on every rank."""
    generator = torch.Generator().manual_seed(sum(name.encode()) + 1000 * seed)
    return torch.randn(batch, length, 6, generator=generator)


IMAGES, AUDIO, HIDDEN, LAST = tensor("images", 3), tensor("audio", 5), tensor("hidden", 8), tensor("last", 8)


def mine(rank: int, x: torch.Tensor) -> torch.Tensor:
    """The generator's lane of a batch."""
    return x[rank - 6 : rank - 5] if rank >= 6 else x


def make() -> Any:
    config = ModelParallelConfig(pipeline_dtype=torch.float)
    return MultiModulePipelineCommunicator(GRIDS, TOPOLOGY, config, dim_mapping={"b": 0, "s": 1, "h": 2})


def check(got: dict[str, Any], **expected: torch.Tensor) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name].detach(), value, rtol=0, atol=0)


def backward_alone(communicator: Any, rank: int, seed: int) -> None:
    """A sweep of gradients without any forward."""
    last, hidden = tensor("last", 8, seed), tensor("hidden", 8, seed)
    if rank >= 6:
        communicator.send_backward({"language": mine(rank, last)})
    elif rank >= 4:
        check(communicator.recv_backward(), language=last)
        communicator.send_backward({"language": hidden})
    elif rank >= 2:
        check(communicator.recv_backward(tensor_shape=(2, 8, 6)), language=hidden)
        communicator.send_backward({"images": IMAGES + seed, "audio": AUDIO + seed})
    else:
        name, value = (("images", IMAGES), ("audio", AUDIO))[rank]
        check(communicator.recv_backward(), **{name: value + seed})


def gradient_first(communicator: Any, rank: int) -> None:
    """Each pair of neighbours in turn: one sends and waits for a gradient, the other sends that before it receives."""
    if rank < 2:
        name, value = (("images", IMAGES), ("audio", AUDIO))[rank]
        check(communicator.send_forward_recv_backward({name: value}), **{name: 2 * value})
    if rank in (2, 3):
        got = communicator.send_backward_recv_forward({"images": 2 * IMAGES, "audio": 2 * AUDIO})
        check(got, images=IMAGES, audio=AUDIO)
        got = communicator.send_forward_recv_backward({"language": HIDDEN}, tensor_shape=(2, 8, 6))
        check(got, language=3 * HIDDEN)
    if rank in (4, 5):
        got = communicator.send_backward_recv_forward({"language": 3 * HIDDEN}, tensor_shape=(2, 8, 6))
        check(got, language=HIDDEN)
        check(communicator.send_forward_recv_backward({"language": LAST}), language=4 * LAST)
    if rank >= 6:
        got = communicator.send_backward_recv_forward({"language": 4 * mine(rank, LAST)})
        check(got, language=mine(rank, LAST))


def usual_order(communicator: Any, rank: int, seed: int) -> None:
    """A whole forward sweep, then a whole backward one."""
    last, hidden = tensor("last", 8, seed), tensor("hidden", 8, seed)
    if rank < 2:
        name, value = (("images", IMAGES), ("audio", AUDIO))[rank]
        communicator.send_forward({name: value + seed})
    elif rank < 4:
        check(communicator.recv_forward(), images=IMAGES + seed, audio=AUDIO + seed)
        communicator.send_forward({"language": hidden})
    elif rank < 6:
        check(communicator.recv_forward((2, 8, 6)), language=hidden)
        communicator.send_forward({"language": last})
    else:
        check(communicator.recv_forward(), language=mine(rank, last))
    backward_alone(communicator, rank, seed + 1)


def run(rank: int, world_size: int) -> None:
    with make() as communicator:
        for seed in range(2):
            backward_alone(communicator, rank, seed)
        gradient_first(communicator, rank)
        for seed in range(4):
            usual_order(communicator, rank, seed)


def test_gradients_alone_before_and_after_their_microbatch() -> None:
    launch(run, 8, timeout=90)


def abandoned(rank: int, world_size: int) -> None:
    """Programs drop communicators with microbatches whose gradients nobody asked for."""
    for _ in range(3):
        communicator = make()
        if rank < 2:
            communicator.send_forward({"images": IMAGES} if rank == 0 else {"audio": AUDIO})
        elif rank < 4:
            check(communicator.recv_forward(), images=IMAGES, audio=AUDIO)
        del communicator


def test_communicators_can_be_dropped_with_gradients_outstanding() -> None:
    launch(abandoned, 8, timeout=90)
