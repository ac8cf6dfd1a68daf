"""setup.py: options that cannot be kept end the build with words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


# setup.py beside a torch that says it is built for the CUDA of argv[1].
BESIDE_CUDA = """
import runpy
import sys

import torch

torch.version.cuda = sys.argv[1]
sys.argv[:] = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("mode", "toolkit", "status", "words"),
    [
        ("1", "12.8", 1, "expected the same major version"),
        ("auto", "12.8", 0, "no CUDA kernels\nmimo_ext: torch {torch}; CUDA kernels: off"),
        ("0", "12.8", 0, "CUDA kernels: off"),
        ("1", "13.2", 0, "CUDA kernels: sm_80, sm_90, sm_100"),
        ("auto", "13.2", 0, "CUDA kernels: sm_80, sm_90, sm_100"),
        ("auto", None, 0, "CUDA kernels: off"),
    ],
)
def test_the_toolkit_has_to_be_of_the_major_version_of_torch(
    tmp_path: Path, mode: str, toolkit: str | None, status: int, words: str
) -> None:
    if toolkit:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {toolkit}, V{toolkit}.93'\n")
        nvcc.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", BESIDE_CUDA, "13.0"],
        cwd=ROOT,
        env=os.environ | {"MIMO_EXT_CUDA": mode, "CUDA_HOME": str(tmp_path), "MIMO_EXT_CUDA_ARCHS": "80;90;100"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stderr
    said = done.stderr if status else done.stdout
    assert words.format(torch=torch.__version__) in said
    names_both = f"is built for CUDA 13.0, the toolkit in {tmp_path} is {toolkit}" in said
    assert names_both == (toolkit == "12.8" and mode != "0")


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
