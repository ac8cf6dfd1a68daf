"""bench_rescale and bench_pack as programs: the records of a small run, and that a missed limit is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = ["name", "layout", "bytes", "method", "ratio_median", "ratio_lo", "ratio_hi", "efficiency", "repeats", "busy"]
NAMES = {
    "bench_rescale.py": {"fused_vs_mul", "fused_vs_three_mul", "fused_vs_mul_norm", "fused_vs_memcpy"},
    "bench_pack.py": {
        *("pack-shard", "pack-zigzag", "pack-samples", "pack-batch-first", "pack-transposed"),
        *("unpack-samples", "unpack-batch-first", "unpack-transposed", "add-samples", "add-transposed"),
    },
}


@pytest.mark.parametrize("program", NAMES)
def test_every_case_has_a_record_and_a_missed_limit_is_status_1(program: str, tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / program), "--mib", "1", "--repeats", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command += ["--ignore-busy", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    missed = [line for line in done.stdout.splitlines() if line.startswith("missed: ")]
    assert done.returncode == (1 if missed else 0), done.stderr
    records = json.loads(file.read_text())
    assert {record["name"] for record in records} == NAMES[program]
    for record in records:
        assert list(record) == KEYS
        assert record["repeats"] == 2
        assert 0 < record["ratio_lo"] <= record["ratio_median"] <= record["ratio_hi"]
