"""Some of the cases of the gradient check (`make check-grad` runs all), and that the check can fail."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import grad_check
import pytest
import torch
from grad_cases import CASES, TWICE, Case, microbatch
from launch import launch

SUBSET = [
    "equal",
    "3 -> 2, mean loss",
    "2 -> 3, encoder by mean",
    "language pp 2, tied embeddings",
    "encoder pp 2",
    "cp 2, language by mean",
    "cp 2 and pp 2, encoder by mean",
    "sp and cp 2",
    "encoder cp 2, language cp 2",
    "two encoders, cp 2",
    "only the projection trained",
    "empty lane, mean loss",
    "empty step",
    "no token at all",
    "distributed optimizer, cp 2",
    "colocated, sp",
    "equal, folded",
    "two encoders, cp 2, folded",
    "distributed optimizer, cp 2, folded",
    "colocated, sp, folded",
]


def named(name: str) -> Case:
    [case] = [case for case in CASES if case.name == name]
    return case


def test_weights_after_training_equal_one_process() -> None:
    assert grad_check.check([named(name) for name in SUBSET]) == []


def scale_gradients_a_little_wrong(module: Any, factor: Any) -> None:
    for parameter in module.module.parameters():
        if parameter.requires_grad:
            parameter.main_grad *= 1.001 * factor


def wrong_worker(rank: int, world_size: int, cases: list[Case], folder: str) -> list[str]:
    from megatron.core.distributed import DistributedDataParallel

    DistributedDataParallel.scale_gradients = scale_gradients_a_little_wrong
    return grad_check.worker(rank, world_size, cases, folder, False)


def test_the_check_notices_gradients_of_the_wrong_size(tmp_path: Path) -> None:
    case = dataclasses.replace(named("3 -> 2"), name="wrong", optimizer="mimo sgd")
    launch(grad_check.reference_rank, 1, [case], str(tmp_path), timeout=60.0)
    results = launch(wrong_worker, case.world_size, [case], str(tmp_path), timeout=60.0)
    assert "wrong (dp3 -> dp2): " in results[0][0]
    assert " differs by " in results[0][0]


def test_cases_differ_and_their_data_is_what_they_say() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.reference for case in CASES if case.folded} == set(TWICE)
    assert max(case.world_size for case in CASES) <= 8
    pairs = {(case.language_per_token, case.encoder_per_token) for case in CASES}
    assert len(pairs) == 4
    assert {case.microbatches for case in CASES} == {1, 2, 4}
    for case in CASES:
        masks = [microbatch(case, step, index)["loss_mask"] for step in (0, 1) for index in range(case.microbatches)]
        tokens = torch.stack([mask.sum(dim=1) for mask in masks])  # [microbatches of two steps, samples]
        by_step = tokens.sum(dim=1).view(2, -1)
        assert bool((by_step == 0).any()) == (case.tokens in ("empty microbatch", "empty step", "none")), case.name
        assert int((by_step.sum(dim=1) == 0).sum()) == {"empty step": 1, "none": 2}.get(case.tokens, 0), case.name
        if case.tokens == "uneven":
            assert len(set(tokens.sum(dim=1).tolist())) > 1 or case.microbatches == 1
            assert len(set(tokens[0].tolist())) > 3
        for name in case.encoders:
            items = torch.bincount(microbatch(case, 0, 0)["owner"][name], minlength=tokens.size(1))
            assert len(set(items.tolist())) > 1  # ragged
            assert not case.text_only or items[: tokens.size(1) // 2].sum() == 0


def test_a_sequence_that_does_not_divide_is_refused_by_name() -> None:
    from types import SimpleNamespace

    from mimo_ext.megatron import MimoModel

    pair = SimpleNamespace(size=lambda: 2)
    sharding = SimpleNamespace(use_cp=True, seq_parallel=True, cp_group=pair, tp_group=pair)
    model: Any = SimpleNamespace(partition_adapter=SimpleNamespace(cfg=sharding))
    for name, arguments in {
        "embeddings": (torch.zeros(12, 2, 4), None, None),
        "labels": (None, torch.zeros(2, 12), None),
        "loss_mask": (None, None, torch.zeros(2, 12)),
    }.items():
        with pytest.raises(ValueError, match=f"'language': expected .* divisible by 8 .* got {name} of length 12"):
            MimoModel._shard_language_inputs(model, *arguments)
