"""`MIMO_EXT_CHECK=1` in a pipeline of several modules: every link is checked, and trains as it does without."""

from __future__ import annotations

import os

import pipeline_model as pm
from launch import launch
from pipeline_cases import CASES, MORE_CASES
from test_overlap_ranks import WORLD_SIZE, make

from mimo_ext._canary import CheckedBridge


def checked_training(rank: int, world_size: int) -> None:
    os.environ["MIMO_EXT_CHECK"] = "1"
    for case in (CASES[0], CASES[2], *MORE_CASES):
        with make(case) as communicator:
            assert all(type(bridge) is CheckedBridge for bridge in communicator._own_bridges())
            pm.check_rank(case, rank, pm.train_rank(communicator, case, rank, False))
            with communicator.overlap(case.num_microbatches, ahead=2, extra_warmup=1):
                pm.check_rank(case, rank, pm.train_rank(communicator, case, rank, False))


def test_every_link_of_a_pipeline_is_checked_and_values_are_those_without() -> None:
    launch(checked_training, WORLD_SIZE, timeout=120)
