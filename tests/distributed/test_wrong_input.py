"""What is wrong with the arguments of a bridge is refused with rank, module, expected and got, before anything is sent.

One table per occasion. `CONSTRUCTION`: one rank alone gives wrong arguments; it gets its own error, and all others one
that names it, at once. `OPERATIONS`: a call on a bridge that works; the bridge goes on working.
"""

# ruff: noqa: E501 - the tables have a line for each kind
from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch

import mimo_ext
from mimo_ext import Bridge, BridgeError, Layout, RowShards
from mimo_ext.planning.links import Links

TIMEOUT = timedelta(seconds=30)
AT_ONCE_S = 5.0  # far less than any timeout: nobody waits for the one that refuses
HUGE = 2**62


class Broken:
    """Links that another version of the package might have."""

    def core(self) -> Any:
        raise ValueError("links: expected SI units, got furlongs")


@dataclass(frozen=True)
class Wrong:
    """One kind of wrong arguments of the constructor, and what its message must hold besides the bridge and the rank."""

    kind: str
    arguments: Callable[[], dict[str, Any]]
    error: type[Exception]
    pieces: tuple[str, ...] = field(default=())


def wrong(kind: str, error: type[Exception], *pieces: str, **arguments: Any) -> Wrong:
    return Wrong(kind, lambda: arguments, error, pieces)


CONSTRUCTION = [
    Wrong(
        "a rank outside the world",
        lambda: {"dst": Layout([7], name="language")},
        ValueError,
        ("expected ranks of the process group (4 ranks)", "got [7] in the layouts"),
    ),
    wrong("no layout", TypeError, "src: expected a mimo_ext.Layout, got [0, 1] (list)", src=[0, 1]),
    wrong("a layout that is None", TypeError, "dst: expected a mimo_ext.Layout, got None", dst=None),
    wrong("four axes", ValueError, "ndim: expected 2 or 3, got 4", ndim=4),
    wrong("no number of axes", TypeError, "ndim: expected an int, got '2' (str)", ndim="2"),
    wrong("samples along the hidden axis of 2-D tensors", ValueError, "[rows, h]: expected batch_dim=0, got 1", batch_dim=1),
    wrong("one axis for two things", ValueError, "expected two axes", "batch_dim=1, seq_dim=1", ndim=3, batch_dim=1, seq_dim=1),
    wrong("an axis that is not there", ValueError, "got batch_dim=3, seq_dim=0", ndim=3, batch_dim=3),
    wrong("an axis that is half", TypeError, "batch_dim: expected an int, got 0.5 (float)", ndim=3, batch_dim=0.5),
    wrong("a dtype by name", TypeError, "dtype: expected a torch.dtype, got 'float32' (str)", dtype="float32"),
    wrong("a device that is not served", NotImplementedError, "device 'meta' is not supported", device="meta"),
    wrong("no device", TypeError, "device: expected 'cpu' or 'cuda', got 'kitchen'", device="kitchen"),
    wrong("no transport", ValueError, "transport: expected None or one of gloo, staged, groups", transport="pigeon"),
    wrong("too few extents", ValueError, "expected a shape of 2 extents, got (4,)", shape=(4,)),
    wrong("a negative extent", ValueError, "expected a shape of 2 extents, got (4, -8)", shape=(4, -8)),
    wrong("half an extent", TypeError, "shape: expected a list of ints, got (4, 8.5)", shape=(4, 8.5)),
    wrong("an extent beyond 64 bits", ValueError, "shape: expected 64-bit numbers", shape=(4, 2**70)),
    wrong("a shape that no memory holds", ValueError, "elements in all lanes together, got [4, ", shape=(4, HUGE)),
    wrong("rows that do not divide", ValueError, "over 2 source and 1 destination lanes, got 5", shape=(5, 8)),
    wrong("no timeout", TypeError, "timeout: expected a datetime.timedelta, got 30 (int)", timeout=30),
    wrong("a timeout of zero", ValueError, "timeout must be positive (1 ms or more), got 0:00:00", timeout=timedelta(0)),
    wrong("a negative timeout", ValueError, "timeout must be positive", timeout=timedelta(seconds=-1)),
    wrong("a timeout without end", ValueError, "expected at most 1000 days", timeout=timedelta.max),
    wrong("a stage too many", IndexError, "src_stage: layout of module 'images': pipeline stage 1 of 1", src_stage=1),
    wrong("a stage by name", TypeError, "dst_stage: expected an int, got 'first' (str)", dst_stage="first"),
    wrong("nothing in flight", ValueError, "max_in_flight must be positive, got 0", max_in_flight=0),
    wrong("in flight without bound", ValueError, f"max_in_flight: expected 1..2147483647, got {HUGE}", max_in_flight=HUGE),
    wrong("in flight or not", TypeError, "max_in_flight: expected an int, got True (bool)", max_in_flight=True),
    wrong("no chunks", ValueError, "max_chunks must be positive, got 0", max_chunks=0),
    wrong("chunks without bound", ValueError, "max_chunks: expected 1..4096, got 5000", max_chunks=5000),
    wrong("chunks of nothing", ValueError, "min_chunk_bytes must be positive, got -1", min_chunk_bytes=-1),
    wrong("chunks beyond 64 bits", ValueError, "min_chunk_bytes: expected 1..", min_chunk_bytes=2**64),
    wrong("an unknown path", ValueError, "path: expected one of auto, pipelined, direct, leader, got 'fast'", path="fast"),
    wrong("no links", TypeError, "links: expected mimo_ext.planning.links.Links, got 'nvlink'", links="nvlink"),
    Wrong("links without end", lambda: {"links": Links(nic=math.inf)}, ValueError, ("links: bandwidth nic must be at most",)),
    Wrong("links that refuse", lambda: {"links": Broken()}, ValueError, ("links: expected SI units, got furlongs",)),
]  # fmt: skip

LAYOUTS = [
    ("ranks listed twice", {"ranks": [0, 0], "dp": 2}, "rank 0 is listed twice"),
    ("too few ranks", {"ranks": [0], "tp": 2}, "tp=2 * cp=1 * dp=1 * pp=1 needs 2 ranks, got 1"),
    ("lanes that overlap", {"ranks": [0, 1, 1, 2], "dp": 2, "tp": 2}, "rank 1 is listed twice"),
    ("no ranks at all", {"ranks": []}, "needs 1 ranks, got 0"),
    ("a negative rank", {"ranks": [-1]}, "ranks must not be negative, got -1"),
    ("a negative size", {"ranks": [0], "tp": -1}, "size of dim 'tp' must be positive, got -1"),
    ("sizes that overflow", {"ranks": [0], "tp": 2**31 - 1, "cp": 2**31 - 1, "dp": 2**31 - 1}, "ranks, got 1"),
    ("an unknown dim", {"ranks": [0], "order": ("tp", "ep")}, "unknown dim 'ep' in order"),
    ("a dim without a place", {"ranks": [0, 1], "dp": 2, "order": ("tp",)}, "dp=2, but order ('tp',) lacks 'dp'"),
    ("an unknown placement", {"ranks": [0, 1], "cp": 2, "cp_placement": "striped"}, "or 'zigzag', got 'striped'"),
]


def images() -> Layout:
    return Layout([0, 1], dp=2, name="images")


def language() -> Layout:
    return Layout([2], name="language")


def construct(**arguments: Any) -> Bridge:
    layouts = {"src": images(), "dst": language()} | {k: v for k, v in arguments.items() if k in ("src", "dst")}
    options = {k: v for k, v in arguments.items() if k not in ("src", "dst")}
    return Bridge(**layouts, **{"timeout": TIMEOUT, "name": "images -> language", **options})


def constructions(rank: int, world_size: int) -> list[tuple[str, str, float]]:
    outcomes = []
    for index, kind in enumerate(CONSTRUCTION):
        begin = time.monotonic()
        try:
            construct(**(kind.arguments() if rank == index % world_size else {}))
            outcomes.append(("nothing", "", 0.0))
        except Exception as error:
            outcomes.append((type(error).__name__, str(error), time.monotonic() - begin))
    # And nobody is out of step.
    with construct() as bridge:
        if rank < 2:
            bridge.send_forward(torch.full((2, 3), 1.0 + rank))
        elif rank == 2:
            assert bridge.recv_forward()[:, 0].tolist() == [1.0, 1.0, 2.0, 2.0]
        dist.barrier()
    return outcomes


@pytest.fixture(scope="module")
def refused_at_construction() -> list[list[tuple[str, str, float]]]:
    return launch(constructions, 4)


@pytest.mark.parametrize("index", range(len(CONSTRUCTION)), ids=[kind.kind for kind in CONSTRUCTION])
def test_the_constructor_refuses(index: int, refused_at_construction: list[list[tuple[str, str, float]]]) -> None:
    kind, refuses = CONSTRUCTION[index], index % 4
    for rank, outcomes in enumerate(refused_at_construction):
        error, text, seconds = outcomes[index]
        assert seconds < AT_ONCE_S, text
        assert f"bridge 'images -> language', rank {rank}" in text
        for piece in kind.pieces:
            # What one rank says is quoted by the others.
            assert piece in text or repr(piece)[1:-1] in text or piece.replace("'", "\\'") in text, text
        if rank == refuses:
            assert error == kind.error.__name__, text
        else:
            assert error == "ValueError", text
            assert f"(rank {refuses}) " in text
            assert "refused: " in text


@pytest.mark.parametrize(("arguments", "message"), [case[1:] for case in LAYOUTS], ids=[case[0] for case in LAYOUTS])
def test_a_layout_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Layout(**arguments, name="images")
    assert "images" in str(caught.value) or "cp_placement: expected" in str(caught.value)


# --- Operations. Each bridge joins ranks 0 and 1 ("images", two lanes) with rank 2; rank 3 is on neither side.

BRIDGES: dict[str, Callable[[], Bridge]] = {
    "rows": lambda: construct(name="rows"),
    "dense": lambda: construct(name="dense", ndim=3, batch_dim=0),
    "static": lambda: construct(name="static", shape=(4, 3)),
    "halves": lambda: construct(name="halves", dst=Layout([2, 3], tp=2, sequence_parallel=True, name="language")),
    "long": lambda: construct(
        name="long", ndim=3, batch_dim=1, src=Layout([0, 1], cp=2, cp_placement="zigzag", name="images")
    ),
}


@dataclass(frozen=True)
class Refused:
    """A call that is refused on the ranks `on` of a bridge."""

    kind: str
    bridge: str
    on: tuple[int, ...]
    call: Callable[[Bridge], Any]
    error: type[Exception]
    pieces: tuple[str, ...]


def send(kind: str, bridge: str, error: type[Exception], *pieces: str, x: Callable[[], Any], **options: Any) -> Refused:
    def call(b: Bridge) -> Any:
        return b.send_forward(x(), **{name: o() if callable(o) else o for name, o in options.items()})

    return Refused(kind, bridge, (0, 1), call, error, pieces)


def rows(count: int = 2, hidden: int = 3) -> Callable[[], torch.Tensor]:
    return lambda: torch.ones(count, hidden)


def shards(samples: int, first: int = 0, num_shards: int = 1) -> Callable[[], RowShards]:
    return lambda: RowShards([[(0, 1)]] * samples, num_shards, num_samples=samples + first, first_sample=first)


OF_IMAGES = "module 'images': "
OPERATIONS = [
    send("another dtype", "rows", ValueError, OF_IMAGES, "send_forward: expected dtype Float, got Double", x=lambda: rows()().double()),
    send("a third axis", "rows", ValueError, "expected a tensor of 2 axes, got shape [2, 3, 1]", x=lambda: torch.ones(2, 3, 1)),
    send("an axis too few", "dense", ValueError, "expected a tensor of 3 axes, got shape [2, 3]", x=rows()),
    send("a scalar", "rows", ValueError, "expected a tensor of 2 axes, got shape []", x=lambda: torch.ones(())),
    send("another device", "rows", ValueError, "expected a CPU tensor", "got device meta", x=lambda: rows()().to("meta")),
    send("a sparse tensor", "rows", ValueError, "expected a strided tensor, got layout Sparse", x=lambda: rows()().to_sparse()),
    send("an axis without end", "rows", ValueError, "expected axes of at most", x=lambda: torch.ones(1, 1).expand(HUGE, 1)),
    send("more than any memory", "rows", ValueError, "elements in all lanes together, got [", x=lambda: torch.ones(1, 1).expand(2**30, 2**30)),
    send("no tensor", "rows", TypeError, "send_forward: x: expected a tensor, got None", x=lambda: None),
    send("a list of tensors", "rows", TypeError, "send_forward: x: expected a tensor, got [", x=lambda: [rows()()]),
    send("row counts that sum to less", "rows", ValueError, OF_IMAGES, "of 2 samples sum to 1 rows, got a tensor of 2 rows", x=rows(), row_counts=[1, 0]),
    send("negative row counts", "rows", ValueError, "row_counts must not be negative, got -1", x=rows(), row_counts=[3, -1]),
    send("row counts that overflow", "rows", ValueError, "row_counts: expected at most", x=rows(), row_counts=[2**63 - 1, 2**63 - 1]),
    send("row counts beyond 64 bits", "rows", ValueError, "row_counts: expected 64-bit numbers", x=rows(), row_counts=[2**64]),
    send("half rows", "rows", TypeError, "row_counts: expected a list of ints, got [1.5, 0.5]", x=rows(), row_counts=[1.5, 0.5]),
    send("a number as row counts", "rows", TypeError, "row_counts: expected a list of ints, got 2", x=rows(), row_counts=2),
    send("row counts of other samples", "rows", ValueError, "has ", " of 9 samples, got 2 row_counts", x=rows(), row_counts=[1, 1], num_samples=9),
    send("row counts of dense samples", "dense", ValueError, "row_counts are for 2-D tensors [rows, h], got 3-D", x=lambda: torch.ones(2, 3, 4), row_counts=[1, 1]),
    send("rows that do not split", "rows", ValueError, "splits evenly into 2 samples, got 3 rows; pass row_counts", x=rows(3), num_samples=4),
    send("a negative number of samples", "rows", ValueError, "num_samples must not be negative, got -1", x=rows(), num_samples=-1),
    send("samples without end", "rows", ValueError, "expected at most 1099511627776 samples in all lanes, got 4611686018427387904", x=rows(), num_samples=HUGE),
    send("samples by name", "rows", TypeError, "send_forward: num_samples: expected an int, got '4' (str)", x=rows(), num_samples="4"),
    send("samples beyond 64 bits", "rows", ValueError, "send_forward: num_samples: expected 0..9223372036854775807", x=rows(), num_samples=2**64),
    send("samples that lanes cannot share", "dense", ValueError, "of 2 has ", " of 9 samples, got 2 samples along axis 0", x=lambda: torch.ones(2, 3, 4), num_samples=9),
    send("no row shards", "rows", TypeError, "send_forward: row_shards: expected mimo_ext.RowShards, got [0]", x=rows(), row_shards=[0]),
    send("row shards of other samples", "rows", ValueError, "row_shards: expected shards of 9 samples, got 4", x=rows(), row_shards=shards(4), num_samples=9),
    send("row shards against row counts", "rows", ValueError, "row_shards: other row counts than row_counts", x=rows(), row_shards=shards(4), row_counts=[2, 0]),
    send("row shards of the other lane's samples alone", "rows", ValueError, "row_shards: expected those of samples ", x=rows(), row_shards=lambda: RowShards([], 1, num_samples=10)),
    send("row shards for another number of ranks", "rows", ValueError, "expected row shards for its cp ranks or for its tp * cp ranks, got 3 shards", x=rows(), row_shards=shards(4, num_shards=3)),
    send("row shards of dense samples", "dense", ValueError, "row_counts are for 2-D tensors", x=lambda: torch.ones(2, 3, 4), row_shards=shards(4)),
    send("a static shape that changes", "static", ValueError, OF_IMAGES, "static shapes: expected [2, 3], got [3, 3]", x=rows(3)),
    send("a static width that changes", "static", ValueError, "static shapes: expected [2, 3], got [2, 4]", x=rows(2, 4)),
    send("row counts of a static shape", "static", ValueError, "row_counts differ from microbatch to microbatch", x=rows(), row_counts=[2]),
    send("samples of a static shape", "static", ValueError, "num_samples: expected 4 (static shapes), got 2", x=rows(), num_samples=2),
    send("row shards of a static shape", "static", ValueError, "row_shards differ from microbatch to microbatch", x=rows(), row_shards=shards(4)),
    Refused("a receive of what this rank sends", "rows", (0, 1), lambda b: b.recv_forward(), BridgeError, ("recv_forward: expected a rank of the destination", "got rank ")),
    Refused("a gradient of what this rank sends", "rows", (0, 1), lambda b: b.send_backward(torch.ones(2, 3)), BridgeError, ("send_backward: expected a rank of the destination",)),
    Refused("a gradient before anything was sent", "rows", (0, 1), lambda b: b.recv_backward(), BridgeError, ("recv_backward: no sent microbatch waits for its gradient",)),
    Refused("a send of what this rank receives", "rows", (2,), lambda b: b.send_forward(torch.ones(2, 3)), BridgeError, ("rank 2: send_forward: expected a rank of the source", "got rank 2")),
    Refused("a gradient from the receiver", "rows", (2,), lambda b: b.recv_backward(), BridgeError, ("recv_backward: expected a rank of the source",)),
    Refused("a gradient of nothing", "rows", (2,), lambda b: b.send_backward(torch.ones(4, 3)), BridgeError, ("send_backward: no received microbatch waits for its gradient",)),
    Refused("a gradient that is a list", "rows", (2,), lambda b: b.send_backward([torch.ones(4, 3)]), TypeError, ("rank 2: send_backward: dy: expected a tensor, got [",)),
    Refused("a gradient of another dtype", "rows", (2,), lambda b: b.send_backward(torch.ones(4, 3).double()), ValueError, ("module 'language': send_backward: expected dtype Float, got Double",)),
    Refused("row shards for a receive that are none", "rows", (2,), lambda b: b.recv_forward("all"), TypeError, ("rank 2: recv_forward: row_shards: expected mimo_ext.RowShards, got 'all'",)),
    Refused("row shards for a static receive", "static", (2,), lambda b: b.recv_forward(shards(4)()), ValueError, ("recv_forward: row_shards differ from microbatch",)),
    Refused("a trace of negative length", "rows", (0, 1, 2), lambda b: b.start_trace(-1), ValueError, ("start_trace: capacity: expected 0..2147483647, got -1",)),
    Refused("a send from a rank outside", "rows", (3,), lambda b: b.send_forward(torch.ones(2, 3)), BridgeError, ("rank 3: send_forward: expected a rank of the source", "got rank 3")),
    Refused("a receive on a rank outside", "rows", (3,), lambda b: b.irecv_forward(), BridgeError, ("rank 3: recv_forward: expected a rank of the destination",)),
    Refused("the differentiable form without a tensor", "rows", (0, 1), lambda b: mimo_ext.bridge(None, b), ValueError, ("expected a tensor on a source rank, got None",)),
    Refused("the differentiable form of a list", "rows", (0, 1), lambda b: mimo_ext.bridge([1.0], b), TypeError, ("x: expected a tensor, got [1.0]",)),
]  # fmt: skip


def moved(bridge: Bridge) -> tuple[float, ...]:
    return tuple(t[key] for t in bridge.telemetry().values() for key in ("sends", "receives", "bytes_sent"))


def exchange(bridge: Bridge, rank: int) -> None:
    """A microbatch and its gradient: nothing of what was refused is in the way."""
    if bridge.is_source:
        shape = (4, 2, 4) if bridge.name == "long" else (2, 3, 4) if bridge.ndim == 3 else (2, 3)
        x = torch.arange(float(math.prod(shape))).view(shape) + 100 * rank
        bridge.send_forward(x)
        dx = bridge.recv_backward()
        assert dx is not None
        assert torch.equal(dx, 2 * x)
    if bridge.is_destination:
        y = bridge.recv_forward().detach()
        if bridge.name in ("rows", "static"):
            assert torch.equal(y, torch.cat([torch.arange(6.0).view(2, 3) + 100 * lane for lane in range(2)]))
        bridge.send_backward(2 * y)


def operations(rank: int, world_size: int) -> list[list[tuple[str, str]] | None]:
    bridges = {name: make() for name, make in BRIDGES.items()}
    outcomes: list[list[tuple[str, str]] | None] = []
    for case in OPERATIONS:
        if rank not in case.on:
            outcomes.append(None)
            continue
        bridge = bridges[case.bridge]
        before = moved(bridge) if rank < 3 else ()
        try:
            case.call(bridge)
            outcomes.append([("nothing", "")])
        except Exception as error:
            outcomes.append([(type(error).__name__, str(error))])
        assert rank == 3 or moved(bridge) == before, case.kind
    for bridge in bridges.values():
        exchange(bridge, rank)
    for bridge in bridges.values():
        bridge.close()
    return outcomes


@pytest.fixture(scope="module")
def refused_in_operation() -> list[list[list[tuple[str, str]] | None]]:
    return launch(operations, 4)


@pytest.mark.parametrize("index", range(len(OPERATIONS)), ids=[case.kind for case in OPERATIONS])
def test_an_operation_refuses(index: int, refused_in_operation: list[list[list[tuple[str, str]] | None]]) -> None:
    case = OPERATIONS[index]
    for rank in case.on:
        found = refused_in_operation[rank][index]
        assert found is not None
        [(error, text)] = found
        assert error == case.error.__name__, text
        assert f"bridge '{case.bridge}', rank {rank}" in text
        for piece in case.pieces:
            assert piece in text, text
    assert all(outcomes[index] is None for rank, outcomes in enumerate(refused_in_operation) if rank not in case.on)


def test_the_tables_have_at_least_forty_kinds() -> None:
    kinds = [case.kind for case in CONSTRUCTION] + [case[0] for case in LAYOUTS] + [case.kind for case in OPERATIONS]
    assert len(kinds) == len(set(kinds))
    assert len(kinds) >= 40
