"""Values over every transport that the CPU can run, and how the ranks choose one."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bridge_reference import Case
from launch import launch
from test_bridge_values import CASES, WORLD, run_cases

import mimo_ext
from mimo_ext import Layout, _transports
from mimo_ext._agreement import Meeting

# Of the kinds of test_bridge_values: fan-in, fan-out, non-dividing, unequal TP, CP copies, shards, both sides, chunks.
NAMES = [
    "fan-in",
    "fan-out",
    "non-dividing dp",
    "ragged fan-in",
    "tp 3 to 5",
    "cp copies",
    "3-D zigzag and sequence parallel",
    "static 2-D",
    "same ranks",
    "overlapping ranks",
    "ranks in any order",
    "chunks",
    "chunks cp",
    "chunks, overlapping ranks",
    "row counts beyond the header",
    "even lanes that differ",
    "pipelined, cp copies",
]


@pytest.mark.parametrize("transport", ["staged", "groups"])
def test_values_are_those_of_gloo(transport: str) -> None:
    cases = [case for case in CASES if case.name in NAMES]
    assert len(cases) == len(NAMES)
    launch(
        run_cases, WORLD, [replace(case, extra={**case.extra, "transport": transport}) for case in cases], timeout=90
    )


def one_forward_one_backward(rank: int, world_size: int, case: Case, transport: str, ahead: int) -> list[torch.Tensor]:
    """A schedule with `ahead` forward microbatches under way; everything that this rank received."""
    src, dst = case.layouts()
    generator = torch.Generator().manual_seed(7 + rank // 2)
    received: list[torch.Tensor] = []
    count = 6
    with mimo_ext.Bridge(src, dst, ndim=2, transport=transport, max_in_flight=ahead + 1, **case.extra) as bridge:
        assert bridge.transport == transport

        def forward(step: int) -> None:
            if bridge.is_source:
                bridge.send_forward(torch.randn(6, 5, generator=generator))
            if bridge.is_destination:
                received.append(bridge.recv_forward().detach())

        def backward(step: int) -> None:
            if bridge.is_destination:
                bridge.send_backward(torch.sin(received[step]) if step != 2 else None)
            if bridge.is_source:
                gradient = bridge.recv_backward()
                received.append(torch.zeros(0) if gradient is None else gradient)

        for step in range(ahead):
            forward(step)
        for step in range(count):
            if step + ahead < count:
                forward(step + ahead)
            backward(step)
    return received


@pytest.mark.parametrize("ahead", [1, 4])
def test_a_pipeline_schedule_has_the_same_bits_over_every_transport(ahead: int) -> None:
    case = Case({"ranks": range(2), "tp": 2}, {"ranks": range(2, 4), "tp": 2}, extra={"path": "pipelined"})
    expected, *others = [
        launch(one_forward_one_backward, 4, case, transport, ahead) for transport in ("gloo", "staged", "groups")
    ]
    assert len(expected[0]) == 6
    assert expected[0][2].numel() == 0
    assert expected[0][3].abs().sum() > 0
    for found in others:
        for mine, theirs in zip(expected, found, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def differentiable(rank: int, world_size: int, transport: str) -> None:
    layouts = Layout(range(4), dp=4, name="images"), Layout(range(2), tp=2, name="language")
    with mimo_ext.Bridge(*layouts, transport=transport) as bridge:
        x = torch.full((3, 2), float(rank), requires_grad=True)
        y = mimo_ext.bridge(x, bridge)
        (y * 5).sum().backward()
        assert torch.equal(x.grad, torch.full((3, 2), 5.0))
        if rank < 2:
            assert torch.equal(y.detach()[:, 0], torch.arange(4.0).repeat_interleave(3))


@pytest.mark.parametrize("transport", ["staged", "groups"])
def test_the_differentiable_form_on_shared_ranks(transport: str) -> None:
    launch(differentiable, 4, transport)


def handles(rank: int, world_size: int) -> None:
    with mimo_ext.Bridge(Layout([0]), Layout([1]), transport="groups") as bridge:
        x = torch.arange(8.0).view(4, 2)
        if rank == 0:
            gradients = []
            for step in range(5):
                assert bridge.isend_forward(x + step).wait() is None
                gradients.append(bridge.irecv_backward())
            # The last one carries out those before it.
            assert torch.equal(gradients[4].wait(), 4 * x)
            assert [handle.done() for handle in gradients] == [True] * 5
            assert torch.equal(gradients[1].wait(), x)
        else:
            received = [bridge.irecv_forward() for _ in range(5)]
            assert not received[0].done()
            for step, handle in enumerate(received):
                assert torch.equal(handle.wait().detach(), x + step)
                bridge.send_backward(step * x)


def test_receives_in_groups_are_carried_out_when_one_is_waited_for() -> None:
    launch(handles, 2)


def on_both_sides(rank: int, world_size: int) -> None:
    layouts = Layout(range(2), dp=2, name="images"), Layout(range(2), tp=2, name="language")
    wrong = mimo_ext.Bridge(*layouts, transport="groups", timeout=timedelta(seconds=5))
    with pytest.raises(mimo_ext.BridgeError, match="expected send_forward of the same microbatch first"):
        wrong.recv_forward()
    wrong.close(abort=True)
    with mimo_ext.Bridge(*layouts, transport="groups") as bridge:
        sent = bridge.isend_forward(torch.full((2, 1), float(rank)))
        with pytest.raises(mimo_ext.BridgeError, match="waited for before recv_forward of the same microbatch"):
            sent.wait()
        assert bridge.recv_forward().flatten().tolist() == [0, 0, 1, 1]
        assert sent.wait() is None


def test_a_rank_on_both_sides_sends_before_it_receives() -> None:
    launch(on_both_sides, 2)


def death(rank: int, world_size: int, transport: str) -> str | None:
    bridge = mimo_ext.Bridge(
        Layout([0], name="images"),
        Layout([1], name="language"),
        shape=(4, 2),
        transport=transport,
        timeout=timedelta(seconds=1),
    )
    if rank == 0:
        bridge.close(abort=True)
        return None
    with pytest.raises(mimo_ext.BridgeError) as caught:
        bridge.recv_forward()
    bridge.close(abort=True)
    return str(caught.value)


@pytest.mark.parametrize("transport", ["staged", "groups"])
def test_a_peer_that_is_gone_is_named(transport: str) -> None:
    message = launch(death, 2, transport)[1]
    assert "bridge 'images -> language', rank 1: recv_forward of microbatch 0" in message
    assert "rank 0" in message


def silence(rank: int, world_size: int) -> tuple[str, str] | None:
    layouts = Layout([0], name="images"), Layout([1, 2], tp=2, name="language")
    bridge = mimo_ext.Bridge(*layouts, shape=(4, 2), transport="groups", path="direct", timeout=timedelta(seconds=1))
    message = None
    if rank == 1:
        with pytest.raises(mimo_ext.BridgeTimeoutError) as caught:
            bridge.recv_forward()
        message = type(caught.value).__name__, str(caught.value)
    dist.barrier()
    bridge.close(abort=True)
    return message


def test_a_group_that_never_completes_is_a_timeout_that_names_its_ranks() -> None:
    found = launch(silence, 3)[1]
    assert found is not None
    kind, message = found
    assert kind == "BridgeTimeoutError"
    assert message.startswith(
        "bridge 'images -> language', rank 1: recv_forward of microbatch 0: group of messages with"
    )
    assert "rank 0: not complete within 1 s" in message


def refusals(rank: int, world_size: int) -> None:
    layouts = Layout([0], name="images"), Layout([1], name="language")
    mine = "staged" if rank == 0 else "groups"
    with pytest.raises(ValueError, match="the ranks describe different bridges") as caught:
        mimo_ext.Bridge(*layouts, transport=mine)
    assert "transport=staged" in str(caught.value)
    assert "transport=groups" in str(caught.value)
    for transport in ("nccl", "smoke"):
        with pytest.raises(ValueError, match="expected None or one of gloo, staged, groups for tensors on cpu"):
            mimo_ext.Bridge(*layouts, transport=transport)
    with pytest.raises(NotImplementedError, match="device 'meta' is not supported: expected 'cpu' or 'cuda'"):
        mimo_ext.Bridge(*layouts, device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="device 'cuda': torch finds no CUDA device here; use device='cpu'"):
            mimo_ext.Bridge(*layouts, device="cuda")
    with mimo_ext.Bridge(*layouts, transport="staged") as bridge:
        if rank == 0:
            with pytest.raises(ValueError, match="expected a CPU tensor"):
                bridge.send_forward(torch.zeros(2, 2, device="meta"))
            with pytest.raises(ValueError, match="expected dtype Float, got Double"):
                bridge.send_forward(torch.zeros(2, 2, dtype=torch.float64))


def test_what_cannot_be_is_refused_on_every_rank() -> None:
    launch(refusals, 2)


class Recorded:
    """In place of a process group of NCCL."""

    def __init__(self, bridge: mimo_ext.Bridge, ended: list[tuple[str, bool]]) -> None:
        self._bridge, self._ended = bridge, ended

    def shutdown(self) -> None:
        self._ended.append(("shutdown", self._bridge.closed))

    def abort(self) -> None:
        self._ended.append(("abort", self._bridge.closed))


def endings(rank: int, world_size: int) -> None:
    for how in ("close", "abort", "failure"):
        bridge = mimo_ext.Bridge(Layout([0]), Layout([0]), timeout=timedelta(milliseconds=100))
        ended: list[tuple[str, bool]] = []
        assert bridge._groups is not None
        bridge._groups = replace(bridge._groups, payload=(Recorded(bridge, ended), Recorded(bridge, ended)))
        if how == "failure":
            handle = bridge.irecv_forward()
            with pytest.raises(mimo_ext.BridgeTimeoutError, match="this rank, which is on both sides, did not call"):
                bridge.close()
            del handle
        else:
            bridge.close(abort=how == "abort")
        if how == "close":
            assert ended == [("shutdown", True)] * 2
        else:  # where it can be, before anything is freed
            assert ended == [("abort", how == "failure")] * 2


def test_communicators_of_nccl_end_with_the_bridge_and_are_aborted_where_it_fails() -> None:
    launch(endings, 1)


# The choice, with ranks that are threads and GPUs that are names.


class Threads:
    """`choose` on every rank of a world, each in a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, devices: list[str], backends: str) -> None:
        self.devices, self.store = devices, dist.HashStore()
        monkeypatch.setattr(_transports, "identity_of", lambda device: self.devices[device.index])
        monkeypatch.setattr(dist, "get_backend_config", lambda: backends)

    def choose(self, bridges: list[tuple[str, str | None, list[int]]], limit: float = 10.0) -> list[Any]:
        results: list[Any] = [None] * len(self.devices)

        def run(rank: int) -> None:
            meeting = object.__new__(Meeting)
            meeting.store, meeting.rank, meeting.limit = self.store, rank, timedelta(seconds=limit)
            mine = [(name, torch.device("cuda", rank), asked, ranks) for name, asked, ranks in bridges]
            try:
                results[rank] = _transports.choose(meeting, mine)
            except (ValueError, RuntimeError) as error:
                results[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(self.devices))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_ranks_with_a_gpu_each_choose_nccl_and_ranks_that_share_one_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Threads(monkeypatch, ["a/0", "a/1", "b/0", "b/0"], "cpu:gloo,cuda:nccl")
    bridges: list[tuple[str, str | None, list[int]]] = [
        ("apart", None, [0, 1, 2]),
        ("together", None, [0, 1, 2, 3]),
        ("asked", "staged", [0, 1]),
        ("asked, too", "nccl", [1, 3]),
    ]
    assert world.choose(bridges) == [["nccl", "staged", "staged", "nccl"]] * 4


def test_without_nccl_in_the_default_group_tensors_are_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Threads(monkeypatch, ["a/0", "a/1"], "cpu:gloo,cuda:gloo").choose([("x", None, [0, 1])]) == [["staged"]] * 2


def test_nccl_for_ranks_that_share_a_gpu_is_an_error_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Threads(monkeypatch, ["a/0", "a/1", "a/0"], "cuda:nccl").choose([("x", "nccl", [0, 1, 2])])
    for rank, error in enumerate(found):
        assert isinstance(error, ValueError)
        assert f"bridge 'x', rank {rank}: transport 'nccl': expected one GPU per rank" in str(error)
        assert "got one for ranks 0, 2" in str(error)


def test_tensors_of_the_cpu_go_over_gloo_without_a_question() -> None:
    meeting = object.__new__(Meeting)
    meeting.store = None
    cpu = torch.device("cpu")
    assert _transports.choose(meeting, [("x", cpu, None, [0]), ("y", cpu, "staged", [0])]) == ["gloo", "staged"]
