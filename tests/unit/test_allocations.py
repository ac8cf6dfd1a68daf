"""In a steady state the executor allocates nothing per message: every allocation of the calling thread is counted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
STEPS = 500

PROGRAM = f"""
import ctypes, json
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import mimo_ext

torch.set_num_threads(1)
count = ctypes.CDLL(None).allocations_of_this_thread
count.restype = ctypes.c_long
found = {{}}
for tp in (2, 8):
    for rank in (0, tp, 2 * tp - 1):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2 * tp)
        src = mimo_ext.Layout(range(tp), tp=tp, name="images")
        dst = mimo_ext.Layout(range(tp, 2 * tp), tp=tp, name="language")
        # Messages of every kind: scattered in chunks that the lane's ranks forward to one another.
        with mimo_ext.Bridge(src, dst, ndim=2, shape=(2**16, 16), path="pipelined") as bridge:
            x = torch.ones(2**16, 16)

            def step():
                if rank < tp:
                    bridge.send_forward(x)
                    bridge.recv_backward()
                else:
                    bridge.recv_forward()
                    bridge.send_backward(x)

            for _ in range(200):
                step()
            before = count()
            for _ in range({STEPS}):
                step()
            allocations = (count() - before) / {STEPS}
            plan = bridge.plan
            messages = 0
            for direction in (plan, plan.reversed()):
                mine = direction.for_rank(rank)
                messages += sum(len(part) for part in mine.values())
            found[f"{{tp}}, {{rank}}"] = [allocations, messages]
        dist.destroy_process_group()
print(json.dumps(found))
"""


def test_nothing_is_allocated_per_message(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and LD_PRELOAD")
    library = tmp_path / "counter.so"
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", str(HERE / "allocation_counter.c"), "-o", str(library)], check=True
    )
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert max(messages for _, messages in found.values()) > 60
    for place, (allocations, messages) in found.items():
        # The transport's work object is one per message. Then, per forward and backward: the received tensor (three),
        # and what Python's call and its tensor object take.
        assert allocations <= messages + 12, (place, allocations, messages)
