"""MultiModulePipelineCommunicator on real gloo ranks: values of losses and gradients against one process."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pipeline_model as pm
import pytest
import torch
import torch.distributed as dist
from launch import launch, run_ranks
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import bridge_communicator, p2p_communication
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from megatron.core.process_groups_config import MultiModuleProcessGroupCollection
from pipeline_cases import CASES, MORE_CASES
from pipeline_model import Case, grid

import mimo_ext.megatron
from mimo_ext.megatron.communicator import MultiModulePipelineCommunicator

WORLD_SIZE = 8
ALL_CASES = [*CASES, *MORE_CASES]


def make(case: Case, **options: Any) -> Any:
    options = {"dim_mapping": pm.AXES, "module_output_ndim": case.output_ndim, **options}
    return MultiModulePipelineCommunicator(case.grids, case.topology, pm.CONFIG, **options)


def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
    raise AssertionError(f"{type(self).__name__} of Megatron was constructed")


def run_cases(rank: int, world_size: int) -> list[str]:
    """All cases one after the other on the same ranks: starting these costs more than all of them."""
    runs: list[tuple[Case, dict[str, Any]]] = [(case, {}) for case in ALL_CASES]
    # Batch first: between stages the lanes' extents along the batch axis differ then, as rows do.
    runs.append((MORE_CASES[-1], {"dim_mapping": {"b": 0, "s": 1, "h": 2}}))
    # Row counts given with each send: fan-in, fan-out, lane counts that do not divide, and a pipelined encoder.
    runs += [(replace(case, counts_from="argument"), {}) for case in (*MORE_CASES[2:5], CASES[2])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridge_communicator.BridgeCommunicator, "__init__", refuse)
        patch.setattr(p2p_communication.P2PCommunicator, "__init__", refuse)
        return [failure for case, options in runs for failure in run_case(rank, case, options)]


def run_case(rank: int, case: Case, options: dict[str, Any]) -> list[str]:
    failures = []
    with make(case, timeout=timedelta(seconds=30), **options) as communicator:
        for forward_only in (True, False):
            result = pm.train_rank(communicator, case, rank, forward_only)
            try:
                pm.check_rank(case, rank, result, forward_only)
            except AssertionError as error:
                failures.append(f"{case.name}: {error}")
    return failures


def test_1f1b_on_real_ranks_gives_the_gradients_of_one_process() -> None:
    failures = [failure for rank in launch(run_cases, WORLD_SIZE, timeout=180) for failure in rank]
    assert not failures, "\n".join(failures)


class ScheduledModel(torch.nn.Module):
    """A rank's stages in the form that Megatron's schedule drives."""

    def __init__(self, case: Case, rank: int, config: Any) -> None:
        super().__init__()
        self.case, self.rank, self.config = case, rank, config
        ((name, grid_),) = [item for item in case.grids.items() if rank in item[1]]
        self.name = name
        self.stage = pm.Stage(case, name, grid_.coordinate(rank, "pp"))
        self.weight = self.stage.weight
        self.inputs: dict[str, torch.Tensor] = {}
        self.microbatch = 0

    def set_input_tensor(self, tensors: list[dict[str, torch.Tensor]]) -> None:
        (self.inputs,) = tensors

    def forward(self) -> tuple[Any, range]:
        microbatch, self.microbatch = self.microbatch, self.microbatch + 1
        samples = self.case.samples(self.name, self.rank, microbatch)
        output = self.stage(self.inputs, microbatch, samples)
        if self.name == "language" and self.stage.is_last:
            return self.stage.loss(output, microbatch, samples), samples
        if self.stage.is_encoder:
            output._mimo_bridge_split_sizes = [self.case.rows[self.name][microbatch][s] for s in samples]
        return {self.name: output}, samples


def megatrons_own_schedule(rank: int, world_size: int) -> list[str]:
    failures = []
    for case in (CASES[2], MORE_CASES[0]):
        config = ModelParallelConfig(
            pipeline_dtype=pm.DTYPE, params_dtype=pm.DTYPE, variable_seq_lengths=True, deallocate_pipeline_outputs=True
        )
        with (
            mimo_ext.megatron.cpu(),
            MultiModulePipelineCommunicator(
                case.grids, case.topology, config, pm.AXES, case.output_ndim
            ) as communicator,
        ):
            if rank >= case.world_size:
                continue
            model = ScheduledModel(case, rank, config)
            groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
            language = "language" if model.name == "language" else None

            def step(data: Any, model: Any, case: Case = case) -> Any:
                output, _ = model()
                # The schedule divides the loss by the number of microbatches.
                return output, lambda loss: (loss * case.num_microbatches, loss.item())

            for forward_only in (True, False):
                model.microbatch = 0
                with torch.set_grad_enabled(not forward_only):
                    losses = forward_backward_pipelining_without_interleaving(
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
                try:
                    result = {"losses": losses, "grads": {model.name: model.weight.grad}}
                    pm.check_rank(case, rank, result, forward_only)
                except AssertionError as error:
                    failures.append(f"{case.name}: {error}")
    return failures


def test_megatrons_own_schedule_runs_on_it() -> None:
    failures = [failure for rank in launch(megatrons_own_schedule, WORLD_SIZE, timeout=180) for failure in rank]
    assert not failures, "\n".join(failures)


def late_receiver(rank: int, world_size: int) -> float:
    """How long the sends of three microbatches took on a source whose destination comes three seconds later."""
    case = Case("", {"images": grid(0, dp=1), "language": grid(1, pp=2)}, {"images": ["language"], "language": []}, {})
    with make(case, timeout=timedelta(seconds=20)) as communicator, torch.no_grad():
        dist.barrier()
        start = time.perf_counter()
        if rank == 0:
            for i in range(3):
                x = torch.full((4, 512, 512), float(i), dtype=pm.DTYPE)  # 8 MiB: more than a socket's buffer
                communicator.send_forward({"images": x})
                x.data = torch.empty(1, dtype=pm.DTYPE)  # as the schedule's deallocate_output_tensor
            return time.perf_counter() - start
        if rank == 1:
            time.sleep(3.0)
        for i in range(3):
            ((name, received),) = communicator.recv_forward([()]).items()
            assert name == ("images" if rank == 1 else "language")
            assert torch.equal(received, torch.full((4, 512, 512), float(i), dtype=pm.DTYPE))
            if rank == 1:
                communicator.send_forward({"language": received})
        return 0.0


def test_sends_do_not_wait_for_the_receiver() -> None:
    assert launch(late_receiver, 3, timeout=60)[0] < 1.5


def views(rank: int, world_size: int) -> None:
    """Activations and gradients as autograd makes them: transposed, strided, expanded."""
    grids = {"images": grid(0, pp=2), "language": grid(2, tp=2)}
    case = Case("", grids, {"images": ["language"], "language": []}, {})
    base = torch.arange(5 * 4 * 6, dtype=pm.DTYPE)
    outputs = [
        (base.reshape(6, 4, 5).permute(2, 1, 0), torch.tensor(2.0, dtype=pm.DTYPE).expand(5, 4, 6)),
        (base.reshape(5, 4, 6)[:, ::2], base.reshape(4, 6, 5).permute(2, 0, 1)[:, ::2]),
    ]
    with make(case, timeout=timedelta(seconds=20)) as communicator:
        for output, gradient in outputs:
            inputs = communicator.recv_forward([()])
            assert list(inputs) == ([] if rank == 0 else ["images"])
            assert all(torch.equal(x, output) for x in inputs.values())
            if rank < 2:
                grads = communicator.send_forward_recv_backward({"images": output}, [()])
                assert torch.equal(grads["images"], gradient)
            if rank > 0:
                communicator.send_backward({"images": gradient})


def test_tensors_of_any_strides_travel() -> None:
    launch(views, 4, timeout=60)


def different_models(rank: int, world_size: int) -> str:
    dp = 1 if rank == 2 else 2
    case = Case("", {"images": grid(0, dp=dp), "language": grid(2, dp=2)}, {"images": ["language"], "language": []}, {})
    with pytest.raises(RuntimeError, match=f"rank {rank}: the ranks were given different models") as caught:
        make(case)
    return str(caught.value)


def test_models_that_differ_between_ranks_fail_everywhere_with_names() -> None:
    for text in launch(different_models, 4, timeout=60):
        assert "rank(s) 2: grids.images.shape: expected [2], got [1]" in text


def refused_by_one(rank: int, world_size: int) -> str:
    topology: dict[str, list[str]] = {"images": ["language"], "language": ["images"] if rank == 1 else []}
    case = Case("", {"images": grid(0, dp=2), "language": grid(2, dp=2)}, topology, {})
    with pytest.raises(ValueError, match=f"rank {rank}: ") as caught:
        make(case)
    return str(caught.value)


def test_what_one_rank_refuses_fails_on_every_rank() -> None:
    texts = launch(refused_by_one, 4, timeout=60)
    assert all("cycle" in text for text in texts)
    assert ["rank 1 refused" in text for text in texts] == [True, False, True, True]


def dies_in_the_middle(rank: int, world_size: int) -> None:
    case = Case("", {"images": grid(0, dp=2), "language": grid(2, tp=2)}, {"images": ["language"], "language": []}, {})
    with make(case, timeout=timedelta(seconds=10)) as communicator:
        x = torch.ones(2, 3, 4, dtype=pm.DTYPE, requires_grad=True) * 1.0
        if rank < 2:
            communicator.send_forward_recv_backward({"images": x}, [()])
            if rank == 1:
                os._exit(7)
            communicator.send_forward_recv_backward({"images": x}, [()])
        else:
            y = communicator.recv_forward([()])["images"]
            y = communicator.send_backward_recv_forward({"images": y.detach()}, [()])["images"]


def test_a_rank_that_dies_ends_the_others_within_the_timeout() -> None:
    start = time.monotonic()
    outcome = run_ranks(dies_in_the_middle, 4, timeout=40)
    assert time.monotonic() - start < 35
    assert outcome.exitcodes[1] == 7
    assert sorted(outcome.errors) == [0, 1, 2, 3]
    for rank in (2, 3):
        assert "BridgeError" in outcome.errors[rank] or "BridgeTimeoutError" in outcome.errors[rank]
        assert "images -> language" in outcome.errors[rank]


def p2p_names(rank: int, world_size: int) -> None:
    """The method names of Megatron's P2PCommunicator, on values, between three stages of two lanes."""
    case = Case("", {"language": grid(0, tp=1, cp=1, dp=2, pp=3)}, {"language": []}, {})
    with make(case, timeout=timedelta(seconds=20)) as communicator:
        p2p = communicator.rank_module_map["language"].p2p_communicator
        stage, lane = rank // 2, rank % 2
        assert (p2p.total_stages, p2p.current_stage) == (3, stage)
        assert (p2p.is_pp_first_stage, p2p.is_pp_last_stage) == (stage == 0, stage == 2)
        assert (p2p.prev_rank, p2p.next_rank) == (None if stage == 0 else rank - 2, None if stage == 2 else rank + 2)
        assert p2p.virtual_pipeline_model_parallel_size is None
        assert p2p.config is pm.CONFIG

        def value(start: int, sign: int = 1) -> torch.Tensor:
            return torch.full((2 + lane, 3, 4), float(sign * (10 * start + lane)), dtype=pm.DTYPE)

        first, last, shape = stage == 0, stage == 2, (2 + lane, 3, 4)
        # One at a time, and a list where the shapes are a list.
        got = p2p.recv_forward(shape, first)
        assert (got is None) if first else torch.equal(got, value(stage - 1))
        p2p.send_forward(value(stage), last)
        got = p2p.recv_backward([shape], last)
        assert got == [None] if last else torch.equal(got[0], value(stage + 1, -1))
        p2p.send_backward([value(stage, -1)], first)
        # Combined.
        got = p2p.recv_forward([()], first)
        assert got == [None] if first else torch.equal(got[0], value(stage - 1))
        got = p2p.send_forward_recv_backward(value(stage), [()], last) if not last else None
        assert last or torch.equal(got, value(stage + 1, -1))
        if not first:
            p2p.send_backward(value(stage, -1), False)
        # A gradient that is not there.
        if first:
            assert p2p.send_forward_recv_backward([value(0), value(0) + 1], [shape, shape], last) == [None, None]
        elif stage == 1:
            p2p.recv_forward(shape, first)
            assert torch.equal(p2p.send_backward_recv_forward(None, shape, first), value(0) + 1)
            p2p.send_backward(None, first)
        # Interleaved forms; the ends of the pipeline leave their side out.
        out, grad = (None if last else value(stage)), (None if first else value(stage, -1))
        got = p2p.send_forward_recv_forward(out, not first, shape)
        assert first or torch.equal(got, value(stage - 1))
        got = p2p.send_backward_recv_backward(grad, not last, shape)
        assert last or torch.equal(got, value(stage + 1, -1))
        x, dx = p2p.send_forward_backward_recv_forward_backward(out, None, not first, False, shape)
        assert dx is None
        assert first or torch.equal(x, value(stage - 1))
        x, dx = p2p.send_forward_backward_recv_forward_backward(None, grad, False, not last, shape)
        assert x is None
        assert last or torch.equal(dx, value(stage + 1, -1))
        dist.barrier()
        if first:
            with pytest.raises(RuntimeError, match=f"rank {rank}, module language: expected a previous pipeline stage"):
                p2p.recv_forward(shape, False)
        if last:
            with pytest.raises(RuntimeError, match=f"rank {rank}, module language: expected a next pipeline stage"):
                p2p.send_forward(value(stage), False)
        with pytest.raises(NotImplementedError, match="overlap_p2p_comm=True"):
            p2p.send_forward_recv_forward(None, False, shape, overlap_p2p_comm=True)


def test_p2p_names_of_megatron_between_stages() -> None:
    launch(p2p_names, 6, timeout=60)
