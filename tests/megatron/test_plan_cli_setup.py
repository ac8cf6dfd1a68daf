"""Set-up as bench_plan.py measures it: on eight real ranks, ours makes two groups per set of ranks that exchange."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import plan_setup
import pytest


@pytest.mark.leaks  # the first TCPStore of a process makes libuv's pipe for signals, which stays
def test_a_bridge_needs_a_group_per_direction_and_fewer_threads_than_megatrons() -> None:
    records = list(plan_setup.setup(repeats=1))
    classes = ["BridgeCommunicator", "MultiModulePipelineCommunicator"]
    assert [(item["name"], item["layout"]) for item in records] == [
        (f"set-up of {name}", layout) for layout in ("tp4-tp4", "tp2dp2-tp4") for name in classes
    ]
    for item in records:
        # One broadcast group per lane of either side, and one of the leaders.
        lanes = {"tp4-tp4": 2, "tp2dp2-tp4": 3}[item["layout"]]
        assert item["released"]["process_groups"] == lanes + 1
        assert item["ours"]["process_groups"] == 2
        assert 0 < item["ours"]["threads"] < item["released"]["threads"]
        assert item["ratio_median"] == item["released"]["seconds_median"] / item["ours"]["seconds_median"]
        assert 0 <= item["busy"] <= 1
