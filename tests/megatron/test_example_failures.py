"""The example's launcher: a failing rank, a killed rank and Ctrl-C each end the whole run within seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 15.0  # for a run to end, on a busy machine

# Four ranks that meet, write their process ids and then wait for one another, all but the one that misbehaves.
PROGRAM = """
import os, pathlib, sys, time
sys.path.insert(0, {examples!r})
from vlm_digits.launch import run_rank, start_ranks

def rank_main():
    import torch.distributed as dist
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    dist.barrier()
    pathlib.Path({folder!r}, f"pid_{{rank}}").write_text(str(os.getpid()))
    if rank == 2 and {fails}:
        raise ValueError("the weights of rank 2 are gone")
    dist.barrier()   # where a rank is missing: its peers see the connection close, or wait
    if not {fails}:
        time.sleep(600)

if __name__ == "__main__":
    if "RANK" in os.environ:
        sys.exit(run_rank(rank_main))
    sys.exit(start_ranks(pathlib.Path(__file__), [], 4))
"""


class Run:
    """A run of PROGRAM in a session of its own, as under a terminal."""

    def __init__(self, folder: Path, fails: bool, options: Sequence[str] = ()) -> None:
        self.folder = folder
        program = folder / "program.py"
        program.write_text(PROGRAM.format(examples=str(ROOT / "examples"), folder=str(folder), fails=fails))
        self.errors = folder / "stderr"
        hidden = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *options, str(program)],
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if name not in hidden},
            )

    def wait_for_ranks(self) -> list[int]:
        """Process ids of the four ranks."""
        deadline = time.monotonic() + 60
        files = [self.folder / f"pid_{rank}" for rank in range(4)]
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < deadline, f"the ranks did not start:\n{self.errors.read_text()}"
            assert self.process.poll() is None or self.process.returncode == 1, self.errors.read_text()
            time.sleep(0.05)
        return [int(file.read_text()) for file in files]

    def end(self) -> tuple[int, list[str]]:
        """Exit code and the lines of standard error; fails if the run does not end in time."""
        code = self.process.wait(SECONDS)
        return code, self.errors.read_text().rstrip().splitlines()


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[list[Run]]:
    started: list[Run] = []
    yield started
    for run in started:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_error_of_the_failing_rank_is_last(tmp_path: Path, runs: list[Run]) -> None:
    runs.append(run := Run(tmp_path, fails=True))
    pids = run.wait_for_ranks()
    code, lines = run.end()
    assert code == 1
    assert lines[-1] == "ValueError: the weights of rank 2 are gone"
    assert any(line.startswith("rank 2 failed, so the run has ended:") for line in lines)
    assert not any(is_running(pid) for pid in pids)


def test_error_is_last_under_torchrun_too(tmp_path: Path, runs: list[Run]) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    runs.append(run := Run(tmp_path, fails=True, options=torchrun))
    pids = run.wait_for_ranks()
    code, lines = run.end()
    assert code == 1
    summary = "\n".join(lines[lines.index(next(line for line in lines if "Root Cause" in line)) :])
    assert "rank      : 2 " in summary
    assert "ValueError: the weights of rank 2 are gone" in summary
    assert not any(is_running(pid) for pid in pids)


def test_a_killed_rank_ends_the_run(tmp_path: Path, runs: list[Run]) -> None:
    runs.append(run := Run(tmp_path, fails=False))
    pids = run.wait_for_ranks()
    os.kill(pids[1], signal.SIGKILL)
    code, lines = run.end()
    assert code == 1
    assert "rank 1 failed" in "\n".join(lines[-3:])
    assert lines[-1] == f"the process (pid {pids[1]}) was ended by SIGKILL"
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_all_ranks(tmp_path: Path, runs: list[Run], number: signal.Signals) -> None:
    runs.append(run := Run(tmp_path, fails=False))
    pids = run.wait_for_ranks()
    os.killpg(run.process.pid, number)
    code, lines = run.end()
    assert code == 128 + number
    assert lines[-1] == f"stopped by {number.name}; all ranks have ended"
    assert "Traceback" not in "\n".join(lines)
    assert not any(is_running(pid) for pid in pids)
