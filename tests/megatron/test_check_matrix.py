"""The layouts that `make check` compares: every two choices meet; bf16 agrees with bf16, and wrong rows do not."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import astuple
from itertools import combinations
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from test_parity import swap_two_samples
from vlm_digits import check
from vlm_digits.check import BF16_GRADIENT_TOLERANCE, TOLERANCE, Run, compare, record_reference
from vlm_digits.matrix import Choice, pairwise, possible

SEED, STEPS = 3, 2
FAN_IN = "images: dp=2; language: tp=2"


@pytest.fixture(scope="module")
def choices() -> tuple[list[Choice], list[Choice]]:
    every = possible()
    return every, pairwise(every)


def pairs(choices: list[Choice]) -> set[tuple[object, ...]]:
    return {pair for choice in choices for pair in combinations(enumerate(astuple(choice)), 2)}


def test_every_two_values_that_can_meet_do(choices: tuple[list[Choice], list[Choice]]) -> None:
    every, chosen = choices
    assert pairs(chosen) == pairs(every)
    assert ((0, "dp=2"), (1, "tp=2")) in pairs(chosen)
    assert ((2, "shared"), (3, "bf16")) in pairs(chosen)
    assert len(set(chosen)) == len(chosen)


def test_it_is_large_enough_balanced_and_always_the_same(choices: tuple[list[Choice], list[Choice]]) -> None:
    every, chosen = choices
    assert len({choice.layout for choice in chosen}) >= 40
    assert max(choice.ranks for choice in every) == 8
    dtypes = Counter(choice.dtype for choice in chosen)
    assert min(dtypes.values()) >= 20
    assert pairwise(every) == chosen
    assert all(choice.place != "shared" or "pp" not in choice.language for choice in every)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    record_reference(folder, SEED, STEPS, bf16=True)
    return folder


def test_bf16_agrees_with_one_process_in_bf16(reference: Path) -> None:
    found = compare(FAN_IN, reference, SEED, STEPS, run=Run("bf16", "pipelined", 1))
    assert found.bf16
    assert found.agrees, (found.loss_error, found.worst_gradient)
    assert TOLERANCE < found.worst_gradient[1] < BF16_GRADIENT_TOLERANCE  # it does round
    assert found.gradient_tolerance < 0.1  # a factor of 8/7, the smallest that layouts of up to 8 ranks could confuse


def test_wrong_rows_are_noticed_in_bf16(reference: Path) -> None:
    found = compare(FAN_IN, reference, SEED, 1, prepare=swap_two_samples, run=Run("bf16"))
    assert not found.agrees
    assert found.first_layer_error > 2 * BF16_GRADIENT_TOLERANCE


def test_the_table_names_each_choice_and_what_is_allowed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check.check_matrix(SEED, steps=1, part=slice(0, 2)) == 0
    text = capfd.readouterr().out
    assert "2 layouts, 1 steps each" in text
    assert text.count("images: ranks=0-") == 2
    assert text.rstrip().endswith("all 2 layouts agree")
    monkeypatch.setattr(check, "TOLERANCE", 0.0)
    assert check.check_matrix(SEED, steps=1, part=slice(1, 2)) == 1
    assert "WRONG" in capfd.readouterr().out
