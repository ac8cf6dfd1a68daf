"""Each benchmark as a program, on its smallest case: what it writes with --json has the keys that all of them share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = ["name", "layout", "bytes", "method", "ratio_median", "ratio_lo", "ratio_hi", "efficiency", "repeats", "busy"]
SKIPPED = 77

PROGRAMS = {
    "bench_bridge.py": "--layouts tp1-tp1 --sizes 16k --families small,loopback --repeats 1 --ignore-busy",
    "bench_training.py": "--layout images:tp=1;language:tp=1 --batch 8 --microbatches 2 --repeats 1 --ignore-busy",
    "bench_host.py": "--layouts tp1-tp1 --repeats 1 --ignore-busy",
    "bench_plan.py": "--only planning traffic",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_records_of_every_benchmark_have_the_same_keys(program: str, tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    arguments = ["--quick", *PROGRAMS[program].split(), "--json", str(file)]
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / program), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    if done.returncode == SKIPPED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    records = json.loads(file.read_text())
    assert records
    for record in records:
        assert list(record) == KEYS
        assert isinstance(record["name"], str)
        assert record["method"].startswith(("replicated", "sharded"))
        ratios = [record[key] for key in ("ratio_lo", "ratio_median", "ratio_hi")]
        assert ratios == sorted(ratios) if None not in ratios else ratios == [None] * 3
