"""What a microbatch was received with is free for the next one when it is handed out: pools have the size that is used.

A worker that told the outcome first would make a caller that is faster than itself post the next receive with further
buffers: a quarter of a megabyte more, in one of many thousand microbatches. The worker is made late here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
AHEAD = 3

PROGRAM = f"""
import ctypes, sys, time
import torch
import torch.distributed as dist

import mimo_ext

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
eager_buffers = ctypes.CDLL(None).eager_buffers_so_far
eager_buffers.restype = ctypes.c_long
x = torch.ones(600, 256)  # larger than what is sent of it before it is asked for
before = eager_buffers()
with torch.no_grad(), mimo_ext.Bridge(mimo_ext.Layout([0]), mimo_ext.Layout([1]), ndim=2) as bridge:
    for _ in range(8):
        handles = [bridge.irecv_forward() for _ in range({AHEAD})] if rank == 1 else []
        time.sleep(0.05 * rank)  # the worker has begun when something comes
        dist.barrier()
        for _ in range({AHEAD} * (1 - rank)):
            bridge.send_forward(x)
        for handle in handles:
            handle.wait()
    print(eager_buffers() - before)
dist.destroy_process_group()
"""


def test_receives_that_follow_each_other_share_their_buffers(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and LD_PRELOAD")
    library = tmp_path / "late.so"
    source = str(HERE / "late_worker.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", str(library), "-ldl"], check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(rank), str(tmp_path / "meet")],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        found = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], found
    _, (of_receiver, _) = found
    assert int(of_receiver) == AHEAD
