"""Sharded delivery on real ranks: a step gives the values and gradients of the same step with replicated delivery."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import grad_ranks
import pytest
import torch
from grad_cases import Case, make_case
from launch import launch, run_ranks

# With sequence parallelism the text of a sample is not looked up in one piece: words that occur more than once are
# summed in another order.
SUMMED_IN_ANOTHER_ORDER = ("word_embeddings.weight", "position_embeddings.weight", "output_layer.weight")
SP = {"sequence_parallel": True}


@dataclass(frozen=True)
class Run:
    """How a step is run."""

    sharded: bool | None = None
    forward_only: bool = False
    overlapped: bool = False
    bound: bool = True  # False: the communicator finds the model by its config


class Step(grad_ranks.Ranks):
    """A step of a case, with what it computes on the way."""

    def __init__(self, case: Case, run: Run) -> None:
        from megatron.core.utils import unwrap_model

        self.run = run
        with (
            mock.patch.object(grad_ranks, "build_provider", partial(self._build_provider, grad_ranks.build_provider)),
            mock.patch.object(grad_ranks, "load", lambda weights, models: models),  # equal seeds, equal weights
        ):
            super().__init__(case, {})
        if not run.bound:
            self._bind_by_config()
        self.update = lambda: None  # gradients stay
        self.inputs: list[torch.Tensor] = []
        self.losses: list[torch.Tensor] = []
        model = unwrap_model(self.model)
        if model.language_model is not None:
            model.language_model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _build_provider(self, build: Any, case: Case) -> Any:
        provider = build(case)
        provider.sharded_delivery = self.run.sharded
        return provider

    def _bind_by_config(self) -> None:
        from mimo_ext.megatron import MultiModulePipelineCommunicator

        self.communicator.close()
        self.communicator = MultiModulePipelineCommunicator(
            self.infra.module_to_grid_map,
            self.infra.topology,
            self.config,
            module_output_ndim=self.infra.module_output_ndim,
            timeout=timedelta(seconds=30),
            sharded_delivery=True,
        )

    def step(self, step: int) -> None:
        from megatron.core.pipeline_parallel import schedules

        from mimo_ext.megatron import overlapped

        name = "forward_backward_pipelining_without_interleaving"
        schedule = getattr(schedules, name)
        schedule = overlapped(schedule) if self.run.overlapped else schedule

        def run(**kwargs: Any) -> Any:
            with torch.set_grad_enabled(not self.run.forward_only):
                return schedule(**{**kwargs, "forward_only": self.run.forward_only})

        with mock.patch.object(schedules, name, run):
            super().step(step)

    def _see(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["decoder_input"] is not None:
            self.inputs.append(kwargs["decoder_input"].detach().clone())

    def _loss(self, mask: torch.Tensor, losses: torch.Tensor) -> tuple[Any, ...]:
        self.losses.append(losses.detach().clone())
        return super()._loss(mask, losses)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.main_grad.clone() for name, p in self.model.named_parameters() if p.requires_grad}


def compare(rank: int, world_size: int, cases: list[tuple[Case, Run]]) -> list[dict[str, float]]:
    """For each case the parameters whose gradients differ: largest difference over the largest gradient of it."""
    import mimo_ext.megatron as mimo

    found = []
    with mimo.cpu():
        for case, run in cases:
            steps = [Step(case, Run(sharded=False, forward_only=run.forward_only)), Step(case, run)]
            for step in steps:
                step.step(int(case.text_at_the_end))  # which has a microbatch of text alone
            replicated, sharded = steps
            model = mimo.parallel_utils.unwrap_megatron_mimo_model(sharded.model)
            delivery = model._sharded_here if case.colocated else model.sharded
            assert delivery is not None
            assert (model.sharded is None) == case.colocated  # there is nothing for a communicator
            assert not any(delivery.arriving.values())
            assert not any(delivery.row_shards.values())
            for kind in ("inputs", "losses"):
                for expected, got in zip(getattr(replicated, kind), getattr(sharded, kind), strict=True):
                    assert torch.equal(got, expected), (case.name, rank, kind)
            largest = {}
            expected, got = replicated.gradients(), sharded.gradients()
            assert list(expected) == list(got)
            for name, gradient in expected.items():
                assert bool(gradient.any()) != run.forward_only, (case.name, name)
                if not torch.equal(got[name], gradient):
                    largest[name] = float((got[name] - gradient).abs().max() / gradient.abs().max())
            found.append(largest)
            for step in steps:
                step.close()
    return found


def check(world_size: int, cases: list[Case | tuple[Case, Run]]) -> None:
    runs = [entry if isinstance(entry, tuple) else (entry, Run()) for entry in cases]
    assert all(case.world_size == world_size for case, _ in runs)
    ranks = launch(compare, world_size, runs, timeout=120)
    for index, (case, _) in enumerate(runs):
        different = {name: error for found in ranks for name, error in found[index].items()}
        if not case.sequence_parallel:
            assert not different, case.name
        assert all(name.endswith(SUMMED_IN_ANOTHER_ORDER) for name in different), (case.name, different)
        assert all(error < 1e-6 for error in different.values()), (case.name, different)


def test_sequence_parallel_and_context_parallel():
    learned = {"position": "learned_absolute"}
    check(
        3,
        [
            make_case("sp", {}, {"tp": 2}, **SP),
            make_case("sp, learned positions, mean loss", {}, {"tp": 2}, "mean/mean", **learned, **SP),
            make_case("cp 2", {}, {"cp": 2}),
            make_case("cp 2, learned positions, mean loss", {}, {"cp": 2}, "mean/mean", **learned),
            make_case("sp, samples without images", {}, {"tp": 2}, text_only=True, **SP),
            make_case("cp 2, a microbatch of text", {}, {"cp": 2}, text_at_the_end=True),
            make_case("sp, a microbatch of text", {}, {"tp": 2}, text_at_the_end=True, overlap=True, **SP),
        ],
    )


def test_frozen_parts_evaluation_overlap_and_programs_that_bind_no_model():
    sp, cp = make_case("sp", {}, {"tp": 2}, microbatches=4, **SP), make_case("cp 2", {}, {"cp": 2}, microbatches=4)
    check(
        3,
        [
            make_case("sp, frozen encoder", {}, {"tp": 2}, frozen=("encoders",), **SP),
            make_case("sp, frozen encoder and projection", {}, {"tp": 2}, frozen=("encoders", "projections"), **SP),
            make_case("cp 2, frozen language model", {}, {"cp": 2}, frozen=("language",)),
            (sp, Run(forward_only=True)),
            (cp, Run(overlapped=True)),
            (sp, Run(bound=False)),
        ],
    )


def test_fan_in_and_two_encoders():
    check(
        4,
        [
            make_case("fan-in to sp", {"dp": 2}, {"tp": 2}, microbatches=4, **SP),
            make_case("fan-in to cp 2", {"dp": 2}, {"cp": 2}, "mean/token"),
            make_case("tp 2 to cp 2", {"tp": 2}, {"cp": 2}),
            make_case("cp 2 to sp", {"cp": 2}, {"tp": 2}, **SP),
            make_case("two encoders to cp 2", {}, {"cp": 2}, audio={}),
            make_case("two encoders to sp", {}, {"tp": 2}, audio={}, text_only=True, **SP),
        ],
    )


def test_fan_out_both_kinds_and_pipelines():
    check(
        5,
        [
            make_case("sp and cp 2", {}, {"tp": 2, "cp": 2}, microbatches=4, **SP),
            make_case("cp 2, tp ranks are replicas", {}, {"tp": 2, "cp": 2}),
            make_case("fan-out to cp 2", {}, {"cp": 2, "dp": 2}, "mean/mean"),
            make_case("sp and pp 2, tied embeddings", {}, {"tp": 2, "pp": 2}, tied=True, microbatches=4, **SP),
            make_case("cp 2 and pp 2", {}, {"cp": 2, "pp": 2}, overlap=True),
        ],
    )


def test_lane_counts_that_do_not_divide_one_another():
    check(
        7,
        [
            make_case("3 -> 2, sp", {"dp": 3}, {"tp": 2, "dp": 2}, position="learned_absolute", **SP),
            make_case("3 -> 2, cp 2", {"dp": 3}, {"cp": 2, "dp": 2}),
        ],
    )


def test_modules_on_the_same_ranks():
    here = {"colocated": True}
    check(
        4,
        [
            make_case("to sp", {"dp": 4}, {"tp": 4}, **SP, **here),
            make_case("to sp and cp 2", {"dp": 4}, {"tp": 2, "cp": 2}, "mean/mean", microbatches=3, **SP, **here),
            make_case("tp 2 to cp 2", {"tp": 2, "dp": 2}, {"cp": 2, "dp": 2}, text_only=True, **here),
            make_case("cp 2 to cp 2", {"cp": 2, "dp": 2}, {"cp": 2, "dp": 2}, frozen=("encoders",), **here),
            make_case("two encoders", {"dp": 4}, {"tp": 2, "cp": 2}, audio={"tp": 2, "dp": 2}, **here),
        ],
    )


def with_other_ids(rank: int, world_size: int) -> None:
    """The language model's ranks have another picture in their first sample than the encoder's rank."""
    import mimo_ext.megatron as mimo

    with mimo.cpu():
        step = Step(make_case("sp", {}, {"tp": 2}, microbatches=1, **SP), Run())
        forward = step._forward

        def changed(batches: Any, model: Any) -> Any:
            batch = next(batches)
            if rank > 0:
                ids = batch["ids"]
                row = int((ids == 60).any(dim=1).nonzero()[0])
                ids[row] = ids[row].flip(0)  # as many tokens of the image, in other places
            return forward(iter([batch]), model)

        step._forward = changed
        step.step(0)


@pytest.mark.parametrize("world_size", [3])
def test_ranks_that_see_other_ids_are_told_so(world_size):
    outcome = run_ranks(with_other_ids, world_size, timeout=60)
    assert any("images -> language" in error and "row_shards" in error for error in outcome.errors.values()), (
        outcome.errors
    )
