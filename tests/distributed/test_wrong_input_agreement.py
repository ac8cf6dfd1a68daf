"""What differs between ranks is found when a bridge is made: both values and who gave them are in every rank's error."""

# ruff: noqa: E501 - the tables have a line for each kind
from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch

import mimo_ext
from mimo_ext import Bridge, Layout, _version
from mimo_ext.planning.links import Links

TIMEOUT = timedelta(seconds=30)
ODD = 2  # the rank that differs
LAST = Layout([2, 3], tp=2, name="language")


def older(name: str, value: Any) -> Callable[[], None]:
    """This rank runs other code than the others."""

    def patch() -> None:
        setattr(_version, name, value)

    return patch


# Kind -> arguments of the one rank (or what it runs), what the others say, what it says.
DIFFERENCES: dict[str, tuple[dict[str, Any] | Callable[[], None], str, str]] = {
    "ranks": ({"src": Layout([1, 0], dp=2, name="images")}, "2 lanes: [0] [1] |", "2 lanes: [1] [0] |"),
    "lanes": ({"dst": Layout([2, 3], dp=2, name="language")}, "tp=2 cp=1, 1 lane: [2 3]", "tp=1 cp=1, 2 lanes: [2] [3]"),
    "copies": ({"dst": Layout([2, 3], cp=2, name="language")}, "tp=2 cp=1,", "tp=1 cp=2 (replicated)"),
    "placement": ({"dst": Layout([2, 3], tp=2, sequence_parallel=True, name="language")}, "tp=2 cp=1, 1", "tp=2 cp=1 sequence parallel, 1"),
    "stage": ({"src": Layout([0, 1], pp=2, name="images")}, "2 lanes: [0] [1]", "1 lane: [1]"),
    "name": ({"name": "sounds"}, "'images -> language: ", "'sounds: "),
    "axes": ({"ndim": 3}, "ndim=2", "ndim=3 batch_dim=0 seq_dim=1"),
    "batch axis": ({"ndim": 3, "batch_dim": 1}, "batch_dim=0", "batch_dim=1 seq_dim=0"),
    "dtype": ({"dtype": torch.bfloat16}, "dtype=torch.float32", "dtype=torch.bfloat16"),
    "static or not": ({"shape": (4, 8)}, "shape=None", "shape=(4, 8)"),
    "chunks": ({"max_chunks": 3}, "chunks=8x65536", "chunks=3x65536"),
    "bytes of a chunk": ({"min_chunk_bytes": 1}, "chunks=8x65536", "chunks=8x1"),
    "path": ({"path": "leader"}, "path=auto", "path=leader"),
    "links": ({"links": Links(nic=1e9)}, "links=None", "links=Links(nic=1000000000.0"),
    "unpaired gradients": ({"unpaired_backward": True}, "transport=None layouts=", "transport=None unpaired_backward layouts="),
    "version of the package": (older("__version__", "0.0.7"), f"mimo_ext={mimo_ext.__version__} ", "mimo_ext=0.0.7 "),
    "planner": (older("_planner", lambda: "0123456789abcdef"), f"planner={_version._planner()}", "planner=0123456789abcdef"),
    "version of torch": (older("torch", type("torch", (), {"__version__": "2.1.0"})), f"torch={torch.__version__.split('+')[0]}", "torch=2.1.0"),
}  # fmt: skip


def make(**arguments: Any) -> Bridge:
    sides = {"src": Layout([0, 1], dp=2, name="images"), "dst": LAST}
    return Bridge(**{**sides, "timeout": TIMEOUT, "name": "images -> language", **arguments})


def differ(rank: int, world_size: int) -> list[tuple[str, float]]:
    found = []
    for odd, _, _ in DIFFERENCES.values():
        before = {name: getattr(_version, name) for name in ("__version__", "_planner", "torch")}
        if rank == ODD and not isinstance(odd, dict):
            odd()
        begin = time.monotonic()
        with pytest.raises(ValueError, match="the ranks describe different bridges") as caught:
            make(**(odd if rank == ODD and isinstance(odd, dict) else {}))
        found.append((str(caught.value), time.monotonic() - begin))
        for name, value in before.items():
            setattr(_version, name, value)
    with make() as bridge:  # and nobody is out of step
        if bridge.is_source:
            bridge.send_forward(torch.full((1, 2), 1.0 + rank))
        else:
            assert bridge.recv_forward().tolist() == [[1.0, 1.0], [2.0, 2.0]]
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def messages() -> list[list[tuple[str, float]]]:
    return launch(differ, 4)


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_what_differs_is_found_at_construction(kind: str, messages: list[list[tuple[str, float]]]) -> None:
    _, expected, got = DIFFERENCES[kind]
    for rank, of_rank in enumerate(messages):
        text, seconds = of_rank[list(DIFFERENCES).index(kind)]
        assert seconds < 5.0
        # The odd one goes by the name of its own bridge.
        assert f", rank {rank}: the ranks describe different bridges: expected (rank 0) " in text
        before, after = text.split(f"got (rank {ODD}) ")
        assert expected in before, text
        assert got in after, text


def test_the_library_tells_its_versions() -> None:
    text = _version.library_text()
    assert text.startswith(f"mimo_ext={mimo_ext.__version__} wire={mimo_ext._extension._C.WIRE_VERSION} planner=")
    assert len(_version._planner()) == 16
    assert "+" not in text


def timeouts(rank: int, world_size: int) -> None:
    """What each rank may choose for itself."""
    with make(timeout=timedelta(seconds=20 + rank), max_in_flight=2 + rank) as bridge:
        if bridge.is_source:
            bridge.send_forward(torch.full((1, 2), 1.0 + rank))
        else:
            assert bridge.recv_forward().tolist() == [[1.0, 1.0], [2.0, 2.0]]
        dist.barrier()


def test_timeouts_and_microbatches_in_flight_may_differ() -> None:
    launch(timeouts, 4)
