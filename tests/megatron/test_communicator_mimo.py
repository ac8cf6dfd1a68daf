"""The communicator under Megatron's schedule with the real MimoModel: text-only microbatches, evaluation between
training steps and frozen encoders, against one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grad_cases
import grad_ranks
import grad_reference
import torch
from grad_cases import TOKENS, Case, make_case
from grad_check import CHANGE_TOLERANCE, TOLERANCE, check_reference
from launch import launch

CASES = [
    make_case("fan-in", {"dp": 2}, {"tp": 2}, microbatches=4),
    make_case("3 -> 2, pipelined", {"dp": 3}, {"dp": 2, "pp": 2}, "mean/token", microbatches=4),
    make_case("frozen", {"dp": 2, "pp": 2}, {"dp": 2}, frozen=("encoders", "projections"), microbatches=4),
]
TEXT_ONLY = 2  # the microbatch, of four, that has no pictures at all


def microbatch(case: Case, step: int, index: int) -> dict[str, Any]:
    data = grad_cases.microbatch(case, step, index)
    if index == TEXT_ONLY:
        data["ids"] = torch.where(data["ids"] >= min(TOKENS.values()), 7, data["ids"])
        for name in case.encoders:
            data["owner"][name] = data["owner"][name][:0]
            data[name] = data[name][:0]
    return data


def reference_rank(rank: int, world_size: int, folder: str) -> None:
    grad_reference.microbatch = microbatch
    for case in CASES:
        trained = grad_reference.reference(case)
        check_reference(case, trained)
        trained.save(Path(folder) / f"{case.name}.pt")


class Recorder(grad_ranks.Ranks):
    """Evaluates before each training step: what that computes must be what training computes then, and training must
    not notice.
    """

    def step(self, step: int) -> float | None:
        self.evaluating, self.losses, sent = True, [], []
        original = self.communicator._io.send_forward

        def send_forward(outputs: Any, *rest: Any) -> None:
            if isinstance(outputs, dict):  # else it is the loss
                sent.append({name: tuple(output.shape) for name, output in outputs.items()})
            original(outputs, *rest)

        with torch.no_grad():
            self._run(step)
        evaluated, self.losses, self.evaluating = self.losses, [], False
        assert all(not output.in_flight for output in self.communicator._io._outputs)
        self.communicator._io.send_forward = send_forward
        norm = super().step(step)
        self.communicator._io.send_forward = original
        assert len(self.losses) == (self.case.microbatches if self.communicator.is_pp_last_stage else 0)
        torch.testing.assert_close(evaluated, self.losses, rtol=1e-6, atol=0)
        if "images" in self.groups and self.groups["images"].pp.rank() == self.groups["images"].pp.size() - 1:
            hidden = sent[0]["images"][1]
            assert sent[TEXT_ONLY]["images"] == (0, hidden)
            assert all(shape["images"][0] > 0 for i, shape in enumerate(sent) if i != TEXT_ONLY)
        return norm

    def _run(self, step: int) -> None:
        from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving

        from mimo_ext.megatron import parallel_utils

        forward_backward_pipelining_without_interleaving(
            forward_step_func=self._forward,
            data_iterator=iter([microbatch(self.case, step, i) for i in range(self.case.microbatches)]),
            model=[self.model],
            num_microbatches=self.case.microbatches,
            seq_length=16,
            micro_batch_size=grad_cases.SAMPLES,
            forward_only=True,
            p2p_communicator=self.communicator,
            pg_collection=parallel_utils.build_pg_collection_for_schedule(self.infra),
        )

    def _loss(self, mask: torch.Tensor, losses: torch.Tensor) -> tuple[Any, ...]:
        result = super()._loss(mask, losses)
        self.losses.append(result[0].detach().clone())
        return result


def worker(rank: int, world_size: int, folder: str) -> list[str]:
    import torch.distributed as dist

    grad_ranks.microbatch, grad_ranks.Ranks = microbatch, Recorder
    dist.destroy_process_group()  # each case has a world of its own
    wrong = []
    for case in CASES:
        if rank < case.world_size:
            expected = grad_reference.Trained.load(Path(folder) / f"{case.name}.pt")
            found = grad_ranks.compare_on_ranks(case, expected, rank, f"{folder}/rendezvous_{case.name}")
            if not (found.weight <= TOLERANCE and found.change <= CHANGE_TOLERANCE and found.norm <= TOLERANCE):
                wrong.append(f"{case.name}: {found}")
            assert found.seen == set(expected.initial)
    return wrong


def test_text_only_microbatches_evaluation_and_frozen_encoders_under_the_schedule(tmp_path: Path) -> None:
    launch(reference_rank, 1, str(tmp_path), timeout=120)
    for wrong in launch(worker, max(case.world_size for case in CASES), str(tmp_path), timeout=180):
        assert wrong == []
