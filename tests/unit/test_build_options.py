"""setup.py: options that cannot be kept end the build with words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"MIMO_EXT_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "MIMO_EXT_CUDA=1, but no CUDA toolkit was found (CUDA_HOME=/nowhere holds no bin/nvcc): set CUDA_HOME",
        ),
        ({"MIMO_EXT_CUDA": "yes"}, "MIMO_EXT_CUDA must be auto, 0 or 1, got 'yes'"),
    ],
)
def test_a_build_that_cannot_be_made_says_why(options: dict[str, str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | options,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert words in done.stderr


def test_check_cuda_says_that_it_was_skipped_where_there_is_no_toolkit() -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "scripts" / "check_cuda.py")],
        env=os.environ | {"CUDA_HOME": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "SKIPPED, nothing was compiled: there is no /nowhere/bin/nvcc" in done.stdout
