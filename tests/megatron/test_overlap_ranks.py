"""Receives posted ahead of the schedule, on real gloo ranks."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pipeline_model as pm
import pytest
import torch
import torch.distributed as dist
from launch import launch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from megatron.core.process_groups_config import MultiModuleProcessGroupCollection
from pipeline_cases import CASES, MORE_CASES, SIMPLE
from pipeline_model import Case, grid
from test_communicator_ranks import ScheduledModel

import mimo_ext.megatron
from mimo_ext.megatron.communicator import MultiModulePipelineCommunicator
from mimo_ext.megatron.overlap import overlapped

WORLD_SIZE = 8
WAIT_S = 20.0


def make(case: Case, config: Any = pm.CONFIG, timeout_s: float = 30.0) -> MultiModulePipelineCommunicator:
    return MultiModulePipelineCommunicator(
        case.grids, case.topology, config, pm.AXES, case.output_ndim, timeout=timedelta(seconds=timeout_s)
    )


def posted(communicator: Any) -> int:
    return sum(link.posted for links in communicator._links for link in links)


def differing_results(rank: int, world_size: int) -> list[str]:
    """With receives ahead, and without, one after the other over the same communicator."""
    failures = []
    for case in (*CASES, *MORE_CASES):
        with make(case) as communicator:
            results = []
            for ahead, extra in ((0, 0), (1, 0), (3, 0), (2, 1)):
                for forward_only in (True, False):  # evaluation, training, and evaluation again
                    if ahead:
                        options = {"forward_only": forward_only, "ahead": ahead, "extra_warmup": extra}
                        with communicator.overlap(case.num_microbatches, **options):
                            results.append(pm.train_rank(communicator, case, rank, forward_only))
                    else:
                        results.append(pm.train_rank(communicator, case, rank, forward_only))
                    if posted(communicator):
                        failures.append(f"{case.name}: {posted(communicator)} receives are still posted")
            plain = results[:2]
            pm.check_rank(case, rank, plain[1])
            for index, result in enumerate(results):
                expected = plain[index % 2]
                same = result["losses"] == expected["losses"] and all(
                    torch.equal(result["grads"][name], gradient) for name, gradient in expected["grads"].items()
                )
                if not same or result["grads"].keys() != expected["grads"].keys():
                    failures.append(f"{case.name}, run {index}: {result} instead of {expected}")
    return failures


def test_values_are_identical_with_and_without_receives_ahead() -> None:
    failures = [failure for rank in launch(differing_results, WORLD_SIZE, timeout=180) for failure in rank]
    assert not failures, "\n".join(failures)


def far_ahead(rank: int, world_size: int) -> None:
    case = replace(SIMPLE, rows={"images": pm.ragged(20, 4, seed=3)}, counts_from="tensor")
    with make(case, timeout_s=WAIT_S / 2) as communicator, communicator.overlap(20, extra_warmup=12):
        pm.check_rank(case, rank, pm.train_rank(communicator, case, rank, False))


def test_a_long_warmup_ends_although_more_is_under_way_than_stages() -> None:
    launch(far_ahead, SIMPLE.world_size, timeout=60)


def megatrons_schedule(rank: int, world_size: int) -> list[str]:
    failures = []
    # Encoders of unequal depth; several pipelines side by side.
    for case, extra in ((CASES[2], 0), (CASES[2], 1), (MORE_CASES[0], 0)):
        schedule = overlapped(forward_backward_pipelining_without_interleaving, extra_warmup=extra)
        config = ModelParallelConfig(
            pipeline_dtype=pm.DTYPE, params_dtype=pm.DTYPE, variable_seq_lengths=True, deallocate_pipeline_outputs=True
        )
        with mimo_ext.megatron.cpu(), make(case, config) as communicator:
            if rank >= case.world_size:
                continue
            model = ScheduledModel(case, rank, config)
            groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
            language = "language" if model.name == "language" else None
            ahead = []

            def step(data: Any, model: Any, case: Case = case, link: Any = communicator, ahead: Any = ahead) -> Any:
                ahead.append(posted(link))
                output, _ = model()
                return output, lambda loss: (loss * case.num_microbatches, loss.item())

            for forward_only in (True, False, True):
                model.microbatch = 0
                ahead.clear()
                with torch.set_grad_enabled(not forward_only):
                    losses = schedule(
                        forward_step_func=step,
                        data_iterator=None,
                        model=model,
                        num_microbatches=case.num_microbatches,
                        seq_length=1,
                        micro_batch_size=1,
                        forward_only=forward_only,
                        p2p_communicator=communicator,
                        pg_collection=MultiModuleProcessGroupCollection({model.name: groups}, language),
                    )
                inputs = len(communicator._links[0])
                if (inputs and ahead[0] != inputs) or posted(communicator):
                    failures.append(f"{case.name}, rank {rank}: {ahead} receives ahead, {inputs} inputs")
                try:
                    result = {"losses": losses, "grads": {model.name: model.weight.grad}}
                    pm.check_rank(case, rank, result, forward_only)
                except AssertionError as error:
                    failures.append(f"{case.name}: {error}")
    return failures


def test_megatrons_own_schedule_with_receives_ahead() -> None:
    failures = [failure for rank in launch(megatrons_schedule, WORLD_SIZE, timeout=120) for failure in rank]
    assert not failures, "\n".join(failures)


TWO_RANKS = Case(
    "two ranks",
    {"images": grid(0, dp=1), "language": grid(1, dp=1)},
    {"images": ["language"], "language": []},
    {"images": [[1], [1], [1]]},
)


def _until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def arrivals(rank: int, world_size: int) -> list[int]:
    """What has arrived while the rank computes, with and without overlap; nobody asks for it meanwhile."""
    rows = torch.ones(64, pm.HIDDEN, dtype=pm.DTYPE)
    seen = []
    with make(TWO_RANKS) as communicator:
        activations, gradients = communicator._links
        with communicator.overlap(2):
            if rank == 0:
                communicator.send_forward({"images": rows})
                communicator.send_forward({"images": 2 * rows})
                _until(lambda: gradients[0].arrived == 1, "the gradient did not come by itself")
                seen.append(gradients[0].arrived)
                for factor in (3, 4):
                    torch.testing.assert_close(communicator.recv_backward()["images"], factor * rows)
            else:
                assert torch.equal(communicator.recv_forward()["images"], rows)
                communicator.send_backward({"images": 3 * rows})
                _until(lambda: activations[0].arrived == 1, "the activation did not come by itself")
                seen.append(activations[0].arrived)
                assert torch.equal(communicator.recv_forward()["images"], 2 * rows)
                communicator.send_backward({"images": 4 * rows})
        dist.barrier()
        if rank == 0:
            communicator.send_forward({"images": rows})
            dist.barrier()
            seen.append(gradients[0].posted)
        else:
            communicator.recv_forward()
            dist.barrier()
            seen.append(activations[0].posted)
            communicator.send_backward({"images": rows})
        dist.barrier()
        if rank == 0:
            communicator.recv_backward()
    return seen


def test_tensors_arrive_while_nobody_waits_for_them() -> None:
    assert launch(arrivals, 2) == [[1, 0], [1, 0]]


def send_or_receive_and_fail(communicator: Any, rank: int, factors: tuple[float, ...]) -> None:
    """Rank 0 sends all, rank 1 receives the first."""
    for factor in factors if rank == 0 else ():
        communicator.send_forward({"images": torch.full((1, pm.HIDDEN), factor, dtype=pm.DTYPE)})
    if rank == 1:
        assert communicator.recv_forward()["images"][0, 0] == factors[0]
    raise ArithmeticError("loss is not finite")


def failing_schedule(rank: int, world_size: int) -> float:
    communicator = make(TWO_RANKS)
    with pytest.raises(ArithmeticError, match="loss is not finite"), communicator.overlap(3):
        send_or_receive_and_fail(communicator, rank, (1.0,))
    dist.barrier()
    # The activation that was posted ahead never comes: nobody waits for it, though its timeout is far away.
    assert posted(communicator) == 1
    begin = time.monotonic()
    communicator.close()
    return time.monotonic() - begin


def test_a_schedule_that_raises_leaves_nothing_to_wait_for() -> None:
    assert max(launch(failing_schedule, 2)) < 10  # the timeout is 30 s


def going_on(rank: int, world_size: int) -> list[float]:
    """The loop catches the error of a microbatch and goes on, on both sides, with what comes next."""
    with make(TWO_RANKS) as communicator:
        with pytest.raises(ArithmeticError, match="loss is not finite"), communicator.overlap(3):
            send_or_receive_and_fail(communicator, rank, (1.0, 2.0, 3.0))
        if rank == 0:
            found = [communicator.recv_backward()["images"] for _ in range(3)]
            return [float(gradient[0, 0]) for gradient in found if gradient is not None]
        inputs = [communicator.recv_forward()["images"] for _ in range(2)]
        for factor in (10.0, 20.0, 30.0):
            communicator.send_backward({"images": torch.full((1, pm.HIDDEN), factor, dtype=pm.DTYPE)})
        return [float(tensor[0, 0]) for tensor in inputs]


def test_after_an_error_the_order_of_the_microbatches_is_kept() -> None:
    assert launch(going_on, 2) == [[10.0, 20.0, 30.0], [2.0, 3.0]]
