"""The example trains to the same numbers, bit for bit, whatever carries its tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import launch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from vlm_digits.data import Numbers
from vlm_digits.layout import parse_layout
from vlm_digits.trainer import Recipe, Trainer

from mimo_ext.megatron import cpu

STEPS = 2


def trained(rank: int, world_size: int, layout: str, transport: str) -> list[torch.Tensor]:
    """Losses and gradients of every step, and the weights at the end."""
    found = []
    with cpu():
        recipe = Recipe(seed=4, batch=12, microbatches=3, warmup=1)
        trainer = Trainer(parse_layout(layout), Numbers(recipe.seed), recipe, transport=transport)
        assert trainer.bridge is not None
        assert trainer.bridge.transport == transport
        for step in range(STEPS):
            found.append(torch.tensor(trainer.gradients(step).loss_sum))
            found += [p.main_grad.clone() for p in trainer.model.parameters() if p.requires_grad]
            trainer.update()
        found += [p.detach().clone() for p in trainer.model.parameters()]
        trainer.close()
    return found


@pytest.mark.parametrize("layout", ["images: dp=2; language: tp=2", "images: ranks=0-1,dp=2; language: ranks=0-1,tp=2"])
def test_training_has_the_same_bits_over_every_transport(layout: str) -> None:
    ranks = parse_layout(layout).world_size
    expected, *others = [
        launch(trained, ranks, layout, transport, timeout=120, leaks=True) for transport in ("gloo", "staged", "groups")
    ]
    assert sum(float(loss) for found in expected for loss in found[:1]) > 0
    for found in others:
        for mine, theirs in zip(expected, found, strict=True):
            assert len(mine) > 20
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_ends_with_words() -> None:
    program = Path(__file__).resolve().parents[2] / "examples" / "vlm_digits" / "train.py"
    done = subprocess.run(
        [sys.executable, str(program), "--device", "cuda"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "--device cuda: torch finds no CUDA device here; leave --device out to train on the CPU" in done.stderr
    assert "Traceback" not in done.stderr
