"""The rank's side: both communicators on one case, every value checked once, then timed one after the other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import busy
import released
import torch
from cases import SHARDED, STATIC, Case, Side

import mimo_ext
from mimo_ext.planning import Links

TIMEOUT = timedelta(seconds=60)
AXES = {"s": 0, "b": 1, "h": 2}
RELEASED = "released"


class Meet(Protocol):
    """Where all ranks wait for one another, without using the links."""

    def wait(self) -> Any: ...


@dataclass(frozen=True)
class Times:
    """What a rank saw of a case: begin and end of every timed run (one clock for all ranks), its processor time."""

    runs: dict[str, list[tuple[float, float]]]
    usage: busy.Usage


class WrongValues(AssertionError):
    """What arrived is not what was sent."""


@dataclass
class Data:
    """A rank's part of the tensors: what it sends, and what has to arrive."""

    sends: torch.Tensor
    expects: torch.Tensor


def data_of(case: Case, rank: int, sharded: bool) -> Data:
    """On the source side an activation and its gradient, on the destination side a gradient and its activation."""
    activation, gradient = (_whole(case, seed) for seed in (1, 2))
    is_source = rank < case.source.size
    side, index = (case.source, rank) if is_source else (case.destination, rank - case.source.size)
    parts = [_part(side, index, whole, sharded) for whole in (activation, gradient)]
    return Data(*(parts if is_source else reversed(parts)))


def _whole(case: Case, seed: int) -> torch.Tensor:
    """Whole numbers, exact in bfloat16; equal on all ranks."""
    values = torch.randint(-128, 128, case.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int16)
    return values.to(torch.bfloat16)


def _part(side: Side, index: int, whole: torch.Tensor, sharded: bool) -> torch.Tensor:
    """The lane's samples, and of these the sequence shard."""
    lane = whole.tensor_split(side.dp, dim=AXES["b"])[index // side.tp]
    if sharded:
        lane = lane.tensor_split(side.tp, dim=AXES["s"])[index % side.tp]
    return lane.contiguous()


@dataclass
class Operations:
    """The six operations of either communicator, as the pipeline schedule uses them."""

    send_forward: Callable[[torch.Tensor], Any]
    recv_forward: Callable[[], Any]
    send_backward: Callable[[torch.Tensor], Any]
    recv_backward: Callable[[], Any]
    send_forward_recv_backward: Callable[[torch.Tensor], Any]
    send_backward_recv_forward: Callable[[torch.Tensor], Any]


def links_of(case: Case) -> Links:
    """What somebody who runs on these links tells the bridge, so that it chooses by them.

    A message takes gloo some 20 us of a core, and the ranks share two.
    """
    in_order = [len(host) for host in case.hosts]
    return Links(
        nic=case.rates.nic_bytes_per_s,
        host=case.rates.nvl_bytes_per_s,
        latency=30e-6,
        overhead=20e-6 * case.world_size / 2,
        ranks_per_host=in_order[0] if len(set(in_order)) == 1 else 0,
    )


@contextlib.contextmanager
def ours(case: Case, method: str) -> Iterator[Operations]:
    """Our bridge; where it is sharded, the tensor-parallel ranks of both sides hold shards of the sequence."""
    sharded = method.startswith(SHARDED)
    ranks = range(case.world_size)
    sides = [
        mimo_ext.Layout(part, tp=side.tp, dp=side.dp, sequence_parallel=sharded and side.tp > 1, name=name)
        for name, side, part in (
            ("source", case.source, ranks[: case.source.size]),
            ("destination", case.destination, ranks[case.source.size :]),
        )
    ]
    with mimo_ext.Bridge(
        *sides,
        ndim=3,
        batch_dim=AXES["b"],
        seq_dim=AXES["s"],
        dtype=torch.bfloat16,
        shape=case.shape if method.endswith(STATIC) else None,
        timeout=TIMEOUT,
        links=links_of(case),
    ) as bridge:
        yield Operations(
            bridge.send_forward,
            bridge.recv_forward,
            bridge.send_backward,
            bridge.recv_backward,
            bridge.send_forward_recv_backward,
            bridge.send_backward_recv_forward,
        )


@contextlib.contextmanager
def theirs(case: Case, backend: str = "gloo", **torch_names: Any) -> Iterator[Operations]:
    """The released class on the same ranks; options as `released.on_gloo` has them."""
    with released.on_gloo(TIMEOUT, backend, **torch_names) as kind:
        communicator = kind(
            released.grid_of(case.source.tp, case.source.dp, 0),
            released.grid_of(case.destination.tp, case.destination.dp, case.source.size),
            dim_mapping=AXES,
            comm_dtype=torch.bfloat16,
        )
        yield Operations(
            communicator.send_forward,
            communicator.recv_forward,
            communicator.send_backward,
            communicator.recv_backward,
            communicator.send_forward_recv_backward,
            communicator.send_backward_recv_forward,
        )


def one_after_the_other(ops: Operations, data: Data, is_source: bool, count: int) -> list[Any]:
    """Forward and backward of a microbatch, then the next. Returns what the last one brought."""
    arrived = None
    for _ in range(count):
        if is_source:
            ops.send_forward(data.sends)
            arrived = ops.recv_backward()
        else:
            arrived = ops.recv_forward()
            ops.send_backward(data.sends)
    return [arrived]


def steady(ops: Operations, data: Data, is_source: bool, count: int) -> list[Any]:
    """1F1B: while a microbatch's activation goes forward, the gradient of the one before it comes back."""
    if is_source:
        ops.send_forward(data.sends)
        arrived = [ops.send_forward_recv_backward(data.sends) for _ in range(count - 1)]
        return [*arrived, ops.recv_backward()]
    arrived = [ops.recv_forward()]
    for _ in range(count - 1):
        arrived.append(ops.send_backward_recv_forward(data.sends))
    ops.send_backward(data.sends)
    return arrived


def run_case(rank: int, meet: Meet, case: Case, repeats: int) -> Times:
    """Collective over all ranks of the cluster, which are the ranks of the case.

    Raises:
        WrongValues: an activation or a gradient that is not what was sent; nothing is timed then.
    """
    is_source = rank < case.source.size
    schedule = steady if case.family == "steady-1f1b" else one_after_the_other
    before = busy.process_usage()
    runs: dict[str, list[tuple[float, float]]] = {}
    with contextlib.ExitStack() as stack:
        entries: list[tuple[str, Operations, Data]] = []
        for method in (RELEASED, *case.methods):
            ops = stack.enter_context(theirs(case) if method == RELEASED else ours(case, method))
            entries.append((method, ops, data_of(case, rank, method.startswith(SHARDED))))
        for method, ops, data in entries:
            meet.wait()
            arrived = schedule(ops, data, is_source, 2)
            if any(tensor is None or not torch.equal(tensor, data.expects) for tensor in arrived):
                raise WrongValues(
                    f"{case.layout}, {case.num_bytes} bytes, {method}, rank {rank}: "
                    f"{'the gradient' if is_source else 'the activation'} is not what was sent"
                )
            del arrived
            runs[method] = []
        for repeat in range(repeats):
            # A different one first every time: none is always behind the same other one.
            shift = repeat % len(entries)
            for method, ops, data in entries[shift:] + entries[:shift]:
                meet.wait()
                begin = time.monotonic()
                schedule(ops, data, is_source, case.microbatches)
                runs[method].append((begin, time.monotonic()))
        meet.wait()
    return Times(runs, busy.process_usage() - before)
