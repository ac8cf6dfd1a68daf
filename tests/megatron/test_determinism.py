"""The same training twice gives the same bits, whatever arrives first."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from vlm_digits.data import Numbers
from vlm_digits.layout import parse_layout
from vlm_digits.trainer import Recipe, Trainer

from mimo_ext.megatron import cpu

STEPS = 2


def trained(layout: str, recipe: Recipe, path: str, delays: random.Random) -> list[torch.Tensor]:
    """Every gradient of every step, the losses, and the weights at the end; this rank is late now and then."""
    found = []
    trainer = Trainer(parse_layout(layout), Numbers(recipe.seed), recipe, path=path)
    original = trainer._forward

    def late(*args: Any) -> Any:
        time.sleep(delays.choice([0.0, 0.0, 0.01, 0.03]))
        return original(*args)

    trainer._forward = late  # type: ignore[method-assign]
    for step in range(STEPS):
        result = trainer.gradients(step)
        found.append(torch.tensor(result.loss_sum))
        found += [parameter.main_grad.clone() for parameter in trainer.model.parameters() if parameter.requires_grad]
        trainer.update()
    found += [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.close()
    return found


def differing_tensors(rank: int, world_size: int, layout: str, path: str, bf16: bool) -> tuple[int, int]:
    recipe = Recipe(seed=4, batch=12, microbatches=2, warmup=1, bf16=bf16)
    with cpu():
        first, second = (trained(layout, recipe, path, random.Random(10 * rank + run)) for run in range(2))
    assert any(bool(tensor.abs().max() > 0) for tensor in first)
    changed = [not torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    return sum(changed), len(changed)


@pytest.mark.parametrize(
    ("layout", "path", "bf16"),
    [
        ("images: dp=2; language: tp=2", "pipelined", False),
        ("images: dp=3; language: dp=2", "direct", True),
        ("images: tp=2; language: dp=2,pp=2", "leader", False),
    ],
)
def test_two_runs_of_one_training_are_equal_to_the_bit(layout: str, path: str, bf16: bool) -> None:
    # Process groups that Megatron's parallel state keeps are no matter here.
    ranks = parse_layout(layout).world_size
    found = launch(differing_tensors, ranks, layout, path, bf16, timeout=120, leaks=True)
    for rank, (changed, tensors) in enumerate(found):
        assert changed == 0, f"rank {rank}: {changed} of {tensors} tensors differ"
        assert tensors > 10
