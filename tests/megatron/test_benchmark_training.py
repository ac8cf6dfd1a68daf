"""The benchmark of a training step, over plain loopback: both communicators train the same, and what is counted."""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = "images: tp=2; language: tp=2"
MS = 1_000_000


@pytest.fixture(autouse=True)
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


class Meet:
    """In place of the barrier of the benchmark's own processes."""

    def wait(self) -> None:
        dist.barrier()


def measure(rank: int, world_size: int, spoiled: bool) -> Any:
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
    import training

    from mimo_ext.megatron.communicator import MultiModulePipelineCommunicator

    if spoiled and rank == 0:  # one number of one gradient
        whole = MultiModulePipelineCommunicator.recv_backward

        def recv_backward(self: Any, *args: Any) -> Any:
            gradients = whole(self, *args)
            for gradient in gradients.values():
                gradient[-1, -1] += 0.01
            return gradients

        MultiModulePipelineCommunicator.recv_backward = recv_backward  # type: ignore[method-assign]
    return training.run(rank, Meet(), training.Setting(LAYOUT, batch=8, microbatches=2), 1 if spoiled else 2)


def test_both_communicators_train_to_the_same_losses_and_every_step_is_recorded() -> None:
    bench = importlib.import_module("bench_training")
    training = importlib.import_module("training")
    ranks = launch(measure, 4, False, timeout=120)
    methods = [training.RELEASED, *training.METHODS]
    losses = ranks[0].losses
    assert list(losses) == methods
    assert all(len(found) == 2 and found == losses[training.RELEASED] for found in losses.values())
    assert len(set(losses[training.RELEASED])) == 2  # it does train
    for rank, measured in enumerate(ranks):
        assert list(measured.steps) == methods
        for steps in measured.steps.values():
            assert len(steps) == 2
            for step in steps:
                assert step.label == ("images" if rank < 2 else "language")
                computed = [(s.kind, s.microbatch) for s in step.spans if s.kind in ("forward", "backward")]
                assert sorted(computed) == [("backward", 0), ("backward", 1), ("forward", 0), ("forward", 1)]
                assert step.seconds("forward", "backward") > 0
                sent = [(s.operation, s.microbatch) for s in step.spans if s.kind == "transfer"]
                assert sent == [("send_forward" if rank < 2 else "send_backward", n) for n in range(2)]
    # 8 numbers of 1 to 4 images of 4 tokens, 2 microbatches, 96 floats per token.
    assert 4 * 4 * 96 * 4 <= ranks[0].bytes <= 4 * 4 * 4 * 96 * 4

    case = bench.Case("compute-bound", LAYOUT, 8, 2)
    found = bench.measurements_of(case, ranks, busy=0.125)
    assert [(item.record.name, item.record.method) for item in found] == [
        (f"{what}-compute-bound", method) for what in ("training", "exposed") for method in training.METHODS
    ]
    for item in found:
        record = item.record
        assert (record.layout, record.bytes, record.repeats, record.busy) == ("tp2-tp2", ranks[0].bytes, 2, 0.125)
        assert 0 < record.ratio_lo <= record.ratio_median <= record.ratio_hi
        if record.name.startswith("exposed"):
            assert 0 < record.efficiency < 1
        else:
            assert record.efficiency is None
            assert item.released_s > item.method_s * 0.05 > 0


def test_a_communicator_that_spoils_one_number_is_not_reported() -> None:
    bench = importlib.import_module("bench_training")
    ranks = launch(measure, 4, True, timeout=120)
    with pytest.raises(bench.DifferentLosses, match=r"rank 0, replicated: expected the losses \[.* of the released"):
        bench.measurements_of(bench.Case("compute-bound", LAYOUT, 8, 2), ranks, busy=None)


def step_of(begin: int, compute: int, exposed: int) -> list[Any]:
    """Both ranks of a step in which the second waits `exposed` ms for what the first has handed in after `compute`."""
    from mimo_ext.timeline import RankTimeline, Span

    def at(kind: str, first: int, last: int, operation: str) -> Span:
        return Span(kind, (begin + first) * MS, (begin + last) * MS, 0, "images -> language", operation)

    end = compute + exposed
    sender = RankTimeline(
        0, "images", begin * MS, (begin + end) * MS, [at("transfer", compute, compute, "send_forward")]
    )
    receiver = RankTimeline(1, "language", begin * MS, (begin + end) * MS, [at("wait", 0, end, "recv_forward")])
    return [sender, receiver]


def test_ratios_and_shares_of_a_step() -> None:
    bench = importlib.import_module("bench_training")
    training = importlib.import_module("training")
    steps = {
        "released": [step_of(0, 60, 40), step_of(500, 60, 60)],  # 100 ms and 120 ms; 20 and 30 ms on average exposed
        "replicated": [step_of(100, 60, 20), step_of(700, 60, 20)],  # 80 ms; 10 ms
        "replicated-overlap": [step_of(200, 60, 4), step_of(800, 60, 4)],
        "replicated-overlap-warmup": [step_of(300, 60, 2), step_of(900, 60, 2)],
    }
    losses = {key: [2.0, 1.0] for key in steps}
    ranks = [
        training.Measured(losses, {name: [step[rank] for step in found] for name, found in steps.items()}, 1000)
        for rank in range(2)
    ]
    case = bench.Case("communication-bound", "images: dp=2; language: tp=2")
    found = {(m.record.name, m.record.method): m for m in bench.measurements_of(case, ranks, busy=None)}
    whole = found["training-communication-bound", "replicated"]
    assert (whole.record.ratio_median, whole.record.ratio_lo, whole.record.ratio_hi) == (1.375, 1.25, 1.5)
    assert (whole.released_s, whole.method_s) == (pytest.approx(0.110), pytest.approx(0.080))
    assert (whole.record.layout, whole.record.efficiency) == ("dp2-tp2", None)
    exposed = found["exposed-communication-bound", "replicated"].record
    assert (exposed.ratio_median, exposed.ratio_lo, exposed.ratio_hi) == (2.5, 2.0, 3.0)
    assert exposed.efficiency == 0.875
    assert found["exposed-communication-bound", "replicated-overlap"].record.ratio_median == 12.5

    worse = [ranks[0], replace(ranks[1], losses={**losses, "replicated-overlap": [2.0, 1.0000001]})]
    with pytest.raises(
        bench.DifferentLosses, match=r"dp=2; language: tp=2, rank 1, replicated-overlap: expected .*2\.0"
    ):
        bench.measurements_of(case, worse, busy=None)
    endless = [replace(rank, losses={key: [float("inf")] for key in steps}) for rank in ranks]
    with pytest.raises(bench.DifferentLosses):
        bench.measurements_of(case, endless, busy=None)


def test_a_watched_communicator_notes_what_is_handed_in_and_what_is_waited_for() -> None:
    training = importlib.import_module("training")
    calls = []

    def operation(name: str) -> Any:
        def call(*args: Any) -> str:
            calls.append((name, args))
            time.sleep(0.002)
            return f"result of {name}"

        return call

    names = {**training._SENDS, **training._RECEIVES}
    communicator = SimpleNamespace(**{name: operation(name) for name in names})
    watch = training.Watch(communicator, sends=True, receives=False)  # an encoder
    assert communicator.recv_forward([()], True) == "result of recv_forward"  # not noted
    watch.start()
    order = ("recv_forward", "send_forward", "recv_forward", "send_forward_recv_backward", "send_backward")
    for name in (*order, "recv_backward", "send_backward"):
        assert getattr(communicator, name)(torch.ones(1)) == f"result of {name}"
    found = watch.finish()
    assert [name for name, _ in calls[1:]] == [*order, "recv_backward", "send_backward"]
    noted = [(s.kind, s.operation, s.microbatch) for s in found.spans if s.operation]
    assert noted == [
        ("transfer", "send_forward", 0),
        ("wait", "send_forward", 0),
        ("transfer", "send_forward", 1),
        ("wait", "recv_backward", 0),  # what is sent with it is waited for with it
        ("wait", "recv_backward", 1),
    ]
    assert all(s.end_ns - s.begin_ns >= 2 * MS for s in found.spans if s.kind == "wait")
    handed_in = [s for s in found.spans if s.kind == "transfer"]
    assert all(s.begin_ns == s.end_ns for s in handed_in)


def test_quick_is_one_small_layout_of_either_setting(capsys: pytest.CaptureFixture[str]) -> None:
    bench = importlib.import_module("bench_training")
    quick = bench.parse_arguments(["--quick"])
    assert [(case.family, case.short_layout, len(case.hosts)) for case in quick.cases] == [
        ("communication-bound", "tp2-tp2", 2),
        ("compute-bound", "tp2-tp2", 2),
    ]
    assert quick.cases[0].hosts == ((0, 1), (2, 3))
    full = bench.parse_arguments([])
    assert {case.short_layout for case in full.cases} == {"tp2-tp2", "tp4-tp4"}
    assert full.repeats > quick.repeats
    (one, _) = bench.parse_arguments(["--layout", "images: dp=2; language: tp=2", "--batch", "16"]).cases
    assert (one.short_layout, one.batch) == ("dp2-tp2", 16)
    with pytest.raises(SystemExit):
        bench.parse_arguments(["--repeats", "-1"])
    assert "--repeats: expected a positive number, got -1" in capsys.readouterr().err


def test_without_root_it_is_skipped_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = importlib.import_module("bench_training")
    emulation = importlib.import_module("emulation")
    monkeypatch.setattr(emulation.os, "geteuid", lambda: 1000)
    assert bench.main(["--quick"]) == 77
    assert capsys.readouterr().err == "skipped: network namespaces need root, this is user 1000\n"
