"""What the communicator tells about a schedule, on real gloo ranks: compute, transfers, waits and bytes."""

from __future__ import annotations

import time
from collections import Counter
from datetime import timedelta
from typing import Any

import pipeline_model as pm
import pytest
import torch
import torch.distributed as dist
from launch import launch
from pipeline_cases import CASES
from pipeline_model import Case, grid

from mimo_ext import timeline
from mimo_ext.megatron.communicator import MultiModulePipelineCommunicator
from mimo_ext.planning.links import Links

UNEQUAL = CASES[2]  # images of three stages (0-2) and audio (3), both feeding a language model of two (4-5)
# What each rank sends and receives, forward; gradients take the same ways back.
LINKS = {
    "images stage 0 -> stage 1": (0, 1),
    "images stage 1 -> stage 2": (1, 2),
    "images -> language": (2, 4),
    "audio -> language": (3, 4),
    "language stage 0 -> stage 1": (4, 5),
}
LABELS = ["images, stage 0", "images, stage 1", "images, stage 2", "audio", "language, stage 0", "language, stage 1"]


def make(case: Case) -> MultiModulePipelineCommunicator:
    return MultiModulePipelineCommunicator(
        case.grids, case.topology, pm.CONFIG, pm.AXES, case.output_ndim, timeout=timedelta(seconds=30)
    )


def traced(rank: int, world_size: int) -> Any:
    with make(UNEQUAL) as communicator:
        pm.train_rank(communicator, UNEQUAL, rank)  # not recorded
        before = communicator.telemetry()
        communicator.start_trace()
        with communicator.overlap(UNEQUAL.num_microbatches):
            result = pm.train_rank(communicator, UNEQUAL, rank)
        mine = communicator.finish_trace()
        pm.check_rank(UNEQUAL, rank, result)
        after = communicator.telemetry()
        communicator.start_trace()
        with communicator.overlap(UNEQUAL.num_microbatches, forward_only=True):
            pm.train_rank(communicator, UNEQUAL, rank, forward_only=True)
        evaluation = communicator.finish_trace()
        with pytest.raises(RuntimeError, match=f"rank {rank}: finish_trace without start_trace"):
            communicator.finish_trace()
    return timeline.gather(mine), Counter(s.kind for s in evaluation.spans), before, after


def test_a_schedule_is_recorded_on_every_rank() -> None:
    outcome = launch(traced, 6)
    ranks, microbatches = outcome[0][0], range(UNEQUAL.num_microbatches)
    assert all(found is None for found, *_ in outcome[1:])
    assert [(r.rank, r.label) for r in ranks] == list(enumerate(LABELS))
    for r in ranks:
        computed = Counter((s.kind, s.microbatch) for s in r.spans if s.kind in ("forward", "backward"))
        assert computed == {(kind, n): 1 for kind in ("forward", "backward") for n in microbatches}
        moved = Counter((s.link, s.operation, s.microbatch) for s in r.spans if s.kind == "transfer")
        expected = [
            (link, operation, n)
            for link, ends in LINKS.items()
            for end, operations in zip(
                ends, (("send_forward", "recv_backward"), ("recv_forward", "send_backward")), strict=True
            )
            for operation in operations
            for n in microbatches
            if end == r.rank
        ]
        assert moved == Counter(expected)
        waits = {(s.link, s.operation) for s in r.spans if s.kind == "wait"}
        assert waits <= {(link, operation) for link, operation, _ in expected if operation.startswith("recv")}
        for s in r.spans:
            assert r.begin_ns <= s.begin_ns <= s.end_ns
            assert s.end_ns <= r.end_ns or s.operation.startswith("send")
        # One thing at a time: computing and waiting share no moment (waits of several links may share one).
        alone = r.seconds(*timeline.COMPUTE) + r.seconds("wait")
        assert alone == pytest.approx(r.seconds(*timeline.COMPUTE, "wait"))
    spans = {(s.link, s.operation, s.microbatch): s for r in ranks for s in r.spans if s.kind == "transfer"}
    for (link, operation, n), span in spans.items():
        if operation.startswith("recv"):
            sent = spans[link, operation.replace("recv", "send"), n]
            assert sent.begin_ns <= span.end_ns
            assert sent.num_bytes == span.num_bytes > 0 or "audio" in link or "images ->" in link  # rows may be none
    for _, kinds, _, _ in outcome:
        assert kinds["forward"] == len(microbatches)
        assert kinds["backward"] == 0


def test_telemetry_counts_operations_and_bytes_per_link() -> None:
    rows = {name: sum(map(sum, UNEQUAL.rows[name])) for name in UNEQUAL.rows}
    samples = sum(len(counts) for counts in UNEQUAL.rows["images"])
    per_step = {
        "images stage 0 -> stage 1": rows["images"],
        "images stage 1 -> stage 2": rows["images"],
        "images -> language": rows["images"],
        "audio -> language": rows["audio"],
        "language stage 0 -> stage 1": 2 * samples,
    }
    for rank, (_, _, before, after) in enumerate(launch(traced, 6)):
        assert set(after) == {link for link, ends in LINKS.items() if rank in ends}
        for link, found in after.items():
            sends_forward = LINKS[link][0] == rank
            for direction, sends in (("forward", sends_forward), ("backward", not sends_forward)):
                counts = found[direction]
                num_bytes = 2 * per_step[link] * pm.HIDDEN * 8  # two steps of float64
                side, other = ("sent", "received") if sends else ("received", "sent")
                assert (counts[f"bytes_{side}"], counts[f"bytes_{other}"]) == (num_bytes, 0)
                operations = 2 * UNEQUAL.num_microbatches
                assert (counts["sends"], counts["receives"]) == ((operations, 0) if sends else (0, operations))
                assert before[link][direction][f"bytes_{side}"] == num_bytes / 2
                assert counts["exposed_s"] >= before[link][direction]["exposed_s"] >= 0


TWO_RANKS = Case(
    "two ranks",
    {"images": grid(0, dp=1), "language": grid(1, dp=1)},
    {"images": ["language"], "language": []},
    {"images": [[1]]},
)
COMPUTE_S = 0.2


def computing(rank: int, world_size: int) -> Any:
    """The encoder computes for a while before it sends; then both are there and the language model receives at once."""
    rows = torch.ones(1, pm.HIDDEN, dtype=pm.DTYPE)
    with make(TWO_RANKS) as communicator:
        dist.barrier()
        communicator.start_trace()
        inputs = communicator.recv_forward()
        if rank == 0:
            time.sleep(COMPUTE_S)
            communicator.send_forward({"images": rows})
            communicator.recv_backward()
        else:
            assert torch.equal(inputs["images"], rows)
            communicator.send_backward({"images": rows})
        return timeline.gather(communicator.finish_trace())


def test_waiting_for_a_peer_that_computes_is_idle_and_not_exposed() -> None:
    ranks = launch(computing, 2)[0]
    encoder, language = timeline.summary(ranks)
    assert encoder["compute_s"] >= COMPUTE_S
    assert language["idle_s"] >= 0.75 * COMPUTE_S
    assert language["idle_s"] + language["exposed_s"] <= language["total_s"]
    ((forward,),) = [[s for s in r.spans if s.kind == "forward"] for r in ranks[:1]]
    (idle,) = [s for s in timeline.split_waits(ranks)[1].spans if s.kind == "idle"]
    assert idle.end_ns >= forward.end_ns  # until it was handed in


def test_a_closed_communicator_tells_nothing() -> None:
    assert launch(closed, 2) == [True, True]


def closed(rank: int, world_size: int) -> bool:
    communicator = make(TWO_RANKS)
    dist.barrier()  # the other rank may still be connecting
    communicator.close()
    for name in ("telemetry", "start_trace", "finish_trace"):
        with pytest.raises(RuntimeError, match=f"rank {rank}: {name} on a closed"):
            getattr(communicator, name)()
    return True


def chosen_paths(rank: int, world_size: int) -> list[tuple[int, int]]:
    case = Case(
        "replicas",
        {"images": grid(0, tp=2), "language": grid(2, tp=2)},
        {"images": ["language"], "language": []},
        {"images": [[400]]},
    )
    found = []
    slow = Links(nic=1e6, host=1e9, latency=1e-6, overhead=1e-6, ranks_per_host=2)
    for options in ({"path": "leader"}, {"path": "direct"}, {"links": slow}):
        with MultiModulePipelineCommunicator(
            case.grids, case.topology, pm.CONFIG, pm.AXES, {"images": 2}, **options
        ) as c:
            result = pm.train_rank(c, case, rank)
            pm.check_rank(case, rank, result)
            # What this rank has moved tells the path.
            found.append(c.telemetry()["images -> language"]["forward"])
    return [(int(f["bytes_sent"]), int(f["bytes_received"])) for f in found]


def test_the_path_to_replicas_can_be_given() -> None:
    whole = 400 * pm.HIDDEN * 8
    found = launch(chosen_paths, 4)
    # One receives all and forwards it; both receive all from the source; each receives a half and forwards it.
    sources = [sum(found[rank][option][0] for rank in (0, 1)) for option in range(3)]
    assert sources == [whole, 2 * whole, whole]
    replicas = [sorted(found[rank][option] for rank in (2, 3)) for option in range(3)]
    assert replicas == [[(0, whole), (whole, whole)], [(0, whole)] * 2, [(whole // 2, whole)] * 2]
