"""Weights after training with modules on the same ranks, against one process; `make check-grad` runs all such cases."""

from __future__ import annotations

import grad_check
from grad_cases import CASES

SUBSET = [
    "colocated, 2 -> 3, tp 2",
    "colocated, fan-in, mean loss",
    "colocated, fan-out, language by mean",
    "colocated, sp and cp 2",
    "colocated, two encoders",
    "colocated, text-only lanes",
    "colocated, frozen encoder",
    "colocated, only the language model trained",
    "colocated, distributed optimizer",
]


def test_weights_after_training_equal_one_process() -> None:
    cases = [case for case in CASES if case.name in SUBSET]
    assert len(cases) == len(SUBSET)
    assert grad_check.check(cases) == []
