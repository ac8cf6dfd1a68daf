"""Compiles the CUDA kernels, links them into the extension and loads it, with or without a GPU (`make check-cuda`).

    python scripts/check_cuda.py [BUILD_LIB]

The extension goes to BUILD_LIB (build/cuda), beside the one that is installed; objects of an earlier build with the
same Python are used again. What is proved without a GPU: the kernels compile for each of MIMO_EXT_CUDA_ARCHS, the same
sources link beside this torch, and the ops of the CPU and of CUDA register and load together. What the kernels compute
is not looked at here: tests/cpp runs their arithmetic on the host, and tests/unit/test_ops_cuda.py the kernels
themselves where a GPU is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LOAD = """
import torch
import mimo_ext
from mimo_ext import ops

assert mimo_ext.has_cuda(), "expected CUDA kernels in the extension that was built with them"
for op in ("pack_into", "unpack_", "rescale_"):
    for device in ("CPU", "CUDA"):
        found = torch._C._dispatch_has_kernel_for_dispatch_key(f"mimo_ext::{op}", device)
        assert found, f"{op}: expected a {device} kernel"
x = torch.arange(12.0).view(3, 4)
assert ops.pack(x, [1, 1], [2, 2], dtype=torch.bfloat16).tolist() == [5, 6, 9, 10]
sumsq, found_inf = ops.rescale_([x], 2.0, with_sumsq=True, with_found_inf=True)
assert (sumsq.item(), found_inf.item()) == (4.0 * sum(i * i for i in range(12)), 0.0)
print(f"loaded beside torch {torch.__version__}: {mimo_ext._extension._C.__file__}")
"""


def main(arguments: list[str]) -> int:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    if not (home / "bin/nvcc").exists():
        print(
            f"check-cuda: SKIPPED, nothing was compiled: there is no {home}/bin/nvcc (set CUDA_HOME to a CUDA toolkit)"
        )
        return 0
    lib = Path(arguments[0] if arguments else ROOT / "build" / "cuda").resolve()
    log = lib.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    build = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(lib)]
    with log.open("w") as text:
        done = subprocess.run(
            build, cwd=ROOT, env=os.environ | {"MIMO_EXT_CUDA": "1"}, stdout=text, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        print(log.read_text(), file=sys.stderr)
        print(f"check-cuda: FAILED: {' '.join(build)} ended with status {done.returncode}", file=sys.stderr)
        return 1
    archs = os.environ.get("MIMO_EXT_CUDA_ARCHS", "80;90;100").split(";")
    print(
        f"check-cuda: compiled for sm_{', sm_'.join(archs)} and linked in {time.monotonic() - begin:.0f} s (log: {log})"
    )
    # -P: neither this folder nor the one that the command is given in is on the path.
    loaded = subprocess.run(
        [sys.executable, "-P", "-c", LOAD], cwd=lib, env=os.environ | {"PYTHONPATH": str(lib)}, check=False
    )
    if loaded.returncode:
        print(f"check-cuda: FAILED: the extension in {lib} does not load", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
