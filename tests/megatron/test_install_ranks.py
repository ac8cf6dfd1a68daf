"""A training script that knows nothing of us, on real ranks, on Megatron's classes and on ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from install_program_ranks import CASES, PROGRAM, Row, problems, run_case
from launch import launch


def test_an_unmodified_program_gives_the_same_losses_and_weights_on_ours() -> None:
    """Two layouts that Megatron trains, and two that it refuses and we train to the same losses."""
    assert problems([run_case(case) for case in CASES]) == []


def row(**changes) -> Row:
    good = {"losses": [3.0, 2.0], "weights": {"a": 1.0}, "released_bridges": 0, "communicator": "mimo_ext.x"}
    released = good | {"released_bridges": 1, "communicator": "megatron.core.x"}
    case = changes.pop("case", CASES[0])
    return Row(case, changes.pop("released", [released]), changes.pop("refusal", ""), [good | changes])


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (row(losses=[3.0, 2.001]), "losses differ"),
        (row(losses=[3.0, float("nan")]), "losses differ"),
        (row(weights={"a": 1.01}), "weights differ"),
        (row(losses=[3.0, 3.1], released=[row().released[0] | {"losses": [3.0, 3.1]}]), "does not fall"),
        (row(released_bridges=1), "constructed"),
        (row(communicator="megatron.core.x"), "communicator"),
        (row(released=None, refusal="AssertionError"), "refuses a layout that it can train"),
        (row(case=CASES[-1]), "expected to refuse"),
        (row(case=CASES[-1], released=None, refusal="a timeout"), "expected to refuse"),
    ],
)
def test_the_check_sees(made: Row, words: str) -> None:
    [problem] = problems([made])
    assert words in problem


def test_the_check_compares_what_megatron_refuses_with_a_layout_that_it_trains() -> None:
    refused = {"case": CASES[-1], "released": None, "refusal": f"ValueError: {CASES[-1].refusal}"}
    assert problems([row(), row(**refused)]) == []
    [problem] = problems([row(), row(losses=[3.0, 1.9], **refused)])
    assert "losses differ: expected [3.0, 2.0], got [3.0, 1.9]" in problem


def test_torchrun_starts_it_on_ours(tmp_path) -> None:
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "mimo_ext.megatron.install", "--cpu", str(PROGRAM)]
    command += ["--encoder", "dp=1", "--language", "dp=1", "--steps", "2", "--out", str(tmp_path)]
    # The folder of the sources is kept off the path of the ranks, too: what is tested is the installed package.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    [first, second] = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    assert first["communicator"] == second["communicator"] == "mimo_ext.megatron._stand_ins"
    assert first["losses"] == second["losses"]
    assert first["losses"][1] < first["losses"][0]
    assert f"step 1: loss {first['losses'][1]:.6f}" in done.stdout


def run_module(rank: int, world_size: int, folder: str) -> list[str]:
    from mimo_ext.megatron.install import main

    sys.path.insert(0, folder)
    main(["-m", "a_module", "--steps", "3"])
    return sys.modules["collected_by_the_module"].lines


def test_a_module_runs_on_ours(tmp_path) -> None:
    (tmp_path / "a_module.py").write_text(
        "import sys, types\n"
        "from megatron.core.pipeline_parallel.multimodule_communicator import RankModuleInfo\n"
        "box = sys.modules['collected_by_the_module'] = types.ModuleType('box')\n"
        "box.lines = [__name__, RankModuleInfo.__module__, *sys.argv[1:]]\n"
    )
    [lines] = launch(run_module, 1, str(tmp_path))
    assert lines == ["__main__", "mimo_ext.megatron.communicator", "--steps", "3"]
