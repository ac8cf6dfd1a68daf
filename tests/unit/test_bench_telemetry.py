"""bench_telemetry: a build that counts is not taken for one that does not, and what costs too much is told."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_telemetry  # noqa: E402
from records import Record  # noqa: E402

import mimo_ext  # noqa: E402

OFF = Record("telemetry", "tp4-tp4", 16384, "off", 0.99, 0.9, 1.1, None, 21, 0.0)


def run(bare: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", bench_telemetry.__file__, "--bare", str(bare), "--quick"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_a_build_with_telemetry_is_not_measured_as_one_without() -> None:
    done = run(Path(mimo_ext.__file__).resolve().parents[1])
    assert done.returncode != 0
    assert not done.stdout
    assert "without: 200 sends were counted: this is the other build" in done.stderr


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    assert f"--bare: expected a folder that holds mimo_ext, got {tmp_path}" in done.stderr


@pytest.mark.parametrize("method", ["off", "trace", "nothing"])
@pytest.mark.parametrize("ratio", [0.97, 0.98])
def test_only_what_is_off_has_a_limit(method: str, ratio: float) -> None:
    lines = bench_telemetry.missed([dataclasses.replace(OFF, method=method, ratio_median=ratio)])
    assert bool(lines) == (method == "off" and ratio == 0.97)
