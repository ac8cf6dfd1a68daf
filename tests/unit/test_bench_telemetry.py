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
import busy  # noqa: E402
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


class Asked:
    """A process that answers with how often it was asked, and the same usage each time."""

    def __init__(self) -> None:
        self.times = 0
        self.stdin = self.stdout = self

    def write(self, line: str) -> None:
        assert line == "7\n"
        self.times += 1

    def flush(self) -> None: ...

    def readline(self) -> str:
        return f"{self.times} 0.5 0.25\n"


def test_processes_take_turns_and_what_they_use_is_counted() -> None:
    running = {mode: Asked() for mode in ("without", "off")}
    times, spent = bench_telemetry.in_turns(running, 3, 7)  # type: ignore[arg-type]
    assert times == {"without": [1.0, 2.0, 3.0], "off": [1.0, 2.0, 3.0]}
    assert busy.other_share(busy.Usage(4.0, 2.0, 0.0, 10.0), spent) == pytest.approx(0.15)
