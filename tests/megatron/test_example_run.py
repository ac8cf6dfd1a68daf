"""The example as its user runs it, and how the model's answers are counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from launch import launch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

TRAIN_PY = EXAMPLES / "vlm_digits" / "train.py"


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_trains_and_reports(tmp_path: Path) -> None:
    layout = "images: dp=3; language: tp=2"
    options = ["--layout", layout, "--steps", "30", "--seed", "5", "--timeline", "step/timeline.png"]
    done = run([sys.executable, str(TRAIN_PY), *options], tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.rstrip("\n").splitlines()
    assert lines[-1].startswith("result: ")
    result = json.loads(lines[-1].removeprefix("result: "))
    assert result["layout"] == layout
    assert (result["ranks"], result["seed"], result["steps"], result["batch"]) == (5, 5, 30, 36)
    assert 0.0 <= result["accuracy"] <= 1.0
    assert 0.5 < result["loss"] < 2.7  # log(16) = 2.77 is what knowing nothing costs
    assert result["seconds"] > 0
    picture = Path(result["picture"])
    assert picture == (tmp_path / "out" / "vlm_digits.png").resolve()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 30_000
    step = Path(result["timeline"])
    assert step == (tmp_path / "step" / "timeline.png").resolve()
    assert step.read_bytes().startswith(b"\x89PNG")
    assert step.stat().st_size > 10_000
    events = json.loads(step.with_suffix(".json").read_text())["traceEvents"]
    computed = {(e["pid"], e["name"]) for e in events if e.get("cat") in ("forward", "backward")}
    assert computed == {(rank, f"{kind} {n}") for rank in range(5) for kind in ("forward", "backward") for n in (0, 1)}
    table = "\n".join(lines[:-1])
    for words in (layout, "(5 ranks)", "held-out numbers", str(picture), str(step)):
        assert words in table
    assert "loss=" in done.stderr
    assert "accuracy=" in done.stderr
    assert "samples/s=" in done.stderr
    assert "Warning" not in done.stderr


def test_no_timeline_where_modules_share_their_ranks(tmp_path: Path) -> None:
    shared = "images: ranks=0-1,dp=2; language: ranks=0-1,tp=2"
    done = run([sys.executable, str(TRAIN_PY), "--layout", shared, "--timeline", "timeline.png"], tmp_path)
    assert done.returncode == 2
    assert "--timeline shows the pipeline between modules on ranks of their own" in done.stderr


def test_torchrun_with_a_wrong_number_of_ranks_is_refused(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    done = run([*torchrun, str(TRAIN_PY), "--steps", "30"], tmp_path)
    assert done.returncode != 0
    words = "the layout needs 4 ranks = 2 (images: dp=2) + 2 (language: tp=2), but 3 were started"
    assert done.stderr.count(words) == 1
    assert "result:" not in done.stdout


def _read(rank: int, world_size: int) -> tuple[list[str], list[str], float, float]:
    from vlm_digits.data import TEST, Numbers
    from vlm_digits.launch import hide_gpus
    from vlm_digits.layout import parse_layout
    from vlm_digits.trainer import Recipe, Trainer

    from mimo_ext.megatron import cpu

    hide_gpus()
    with cpu():
        numbers = Numbers(seed=2)
        trainer = Trainer(parse_layout("images: dp=2; language: tp=2"), numbers, Recipe(seed=2, warmup=20, steps=200))
        for step in range(120):
            trainer.gradients(step)
            trainer.update()
        batch = numbers.batch(TEST, 0, 96)
        before = batch.input_ids.clone()
        reading, exact = trainer.read(batch), trainer.exact(batch)
        assert torch.equal(batch.input_ids, before)
        trainer.close()
    return reading.texts, reading.numbers, reading.accuracy, exact


def test_one_pass_counts_what_greedy_writing_reads() -> None:
    results = launch(_read, 4, timeout=200.0)
    assert all(result == results[0] for result in results)
    texts, numbers, accuracy, exact = results[0]
    right = [text == number for text, number in zip(texts, numbers, strict=True)]
    assert accuracy == sum(right) / len(right)
    assert abs(exact - accuracy) < 1e-6
    assert 0 < sum(right) < len(right)  # neither all nor nothing: the comparison says something
    assert len(set(texts)) > 20  # it reads the images, it does not repeat one answer
