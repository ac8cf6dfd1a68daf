"""Are the weights right? Training over many layouts against one process, after three optimizer steps in fp32.

    make check-grad [CASES="part of a case's name ..."]

prints a table and exits with 0, or 1 where a weight differs by more than 1e-5 of the largest weight of its tensor.
`grad_cases.py` says what is varied, `grad_reference.py` what is right.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from grad_cases import CASES, STEPS, Case, is_frozen
from grad_reference import Trained
from launch import launch

TOLERANCE = 1e-5  # of a weight, relative to the largest of its tensor; also of the gradients' norm
CHANGE_TOLERANCE = 1e-4  # of a weight, relative to the largest change in its tensor: the rounding of what moved little
MOVED = 1e-3  # training changes every trained tensor by more than this part of its largest weight


def check(cases: list[Case], show: bool = False) -> list[str]:
    """Train all cases; returns one line for each that is wrong. `show` prints the table."""
    with tempfile.TemporaryDirectory(prefix="mimo_ext_grad_check_") as folder:
        launch(reference_rank, 2, cases, folder, timeout=300.0)
        ranks = max(case.world_size for case in cases)
        # Large worlds first: a rank that smaller ones do not need has then nothing to wait for.
        ordered = sorted(cases, key=lambda case: -case.world_size)
        if show:
            print(HEADER, flush=True)
        results = launch(worker, ranks, ordered, folder, show, timeout=900.0)
    return [line for line in results[0] if line]


def reference_rank(rank: int, world_size: int, cases: list[Case], folder: str) -> None:
    """Train this rank's share of the cases, each in one process, and leave what they gave in `folder`."""
    from grad_reference import reference

    leave_the_first_world()
    os.environ.update(WORLD_SIZE="1", RANK="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/alone_{rank}", rank=0, world_size=1)
    distinct = list({case.reference: case for case in cases}.values())
    for case in distinct[rank::world_size]:
        trained = reference(case)
        trained.save(Path(folder) / f"{case.reference}.pt")
        check_reference(case, trained)


def check_reference(case: Case, trained: Any) -> None:
    """A comparison proves nothing unless what is compared has moved. AssertionError where a weight has not."""
    for name, before in trained.initial.items():
        moved = float((trained.final[name] - before).abs().max() / before.abs().max())
        if is_frozen(case, name) or case.tokens == "none":
            assert moved == 0.0, (case.name, name, moved)
        else:
            assert moved > MOVED, (case.name, name, moved)


def worker(rank: int, world_size: int, cases: list[Case], folder: str, show: bool) -> list[str]:
    """Run every case that has this rank; returns what rank 0 found wrong, "" for what is right."""
    from grad_ranks import compare_on_ranks

    leave_the_first_world()
    lines = []
    for case in cases:
        if rank >= case.world_size:
            continue
        started = time.monotonic()
        expected = Trained.load(Path(folder) / f"{case.reference}.pt")
        found = compare_on_ranks(case, expected, rank, f"{folder}/rendezvous_{case.name}")
        missing = set(expected.initial) - found.seen
        wrong = ""
        if missing:
            wrong = f"not compared: {sorted(missing)}"
        elif not (found.weight <= TOLERANCE and found.change <= CHANGE_TOLERANCE and found.norm <= TOLERANCE):
            wrong = f"{found.worst} differs by {found.weight:.1e} ({found.change:.1e} of a change), the norm by "
            wrong += f"{found.norm:.1e}"
        if rank == 0:
            if show:
                print(row(case, found, time.monotonic() - started, wrong), flush=True)
            lines.append(f"{case.name} ({case.layout}): {wrong}" if wrong else "")
    return lines


def leave_the_first_world() -> None:
    """Each case has a default process group of its own."""
    logging.getLogger("megatron").setLevel(logging.ERROR)  # its advice would stand between the lines of the table
    dist.barrier()  # a rank that leaves breaks the connections of those still coming up
    dist.destroy_process_group()


HEADER = (
    f"{STEPS} steps in fp32, largest relative difference of a weight to one process; 'change' is relative to what\n"
    "training changed, 'norm' the difference of the gradients' norm\n\n"
    f"  {'case':<47} {'encoders -> language':<26} {'loss':<11} {'mb':>2} {'optimizer':<32} "
    f"{'weight':>8} {'change':>8} {'norm':>8} {'s':>5}"
)


def row(case: Case, found: Any, seconds: float, wrong: str) -> str:
    norm = f"{found.norm:8.1e}" if "mimo" in case.optimizer else f"{'-':>8}"
    return (
        f"  {case.name:<47} {case.layout:<26} {case.loss:<11} {case.microbatches:>2} {case.trained_by:<32} "
        f"{found.weight:8.1e} {found.change:8.1e} {norm} {seconds:5.1f}  {'ok' if not wrong else 'WRONG ' + wrong}"
    )


def main(names: list[str]) -> int:
    cases = [case for case in CASES if not names or any(name in case.name for name in names)]
    if not cases:
        print(f"no case has one of {names} in its name; there are: {[case.name for case in CASES]}", file=sys.stderr)
        return 2
    # Ranks are forked from a server that has imported Megatron.
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["torch", "torch.distributed", "torch._dynamo", "megatron.core.models.mimo", "megatron.core.optimizer"]
    )
    forkserver.ensure_running()
    torch.set_num_threads(1)
    started = time.monotonic()
    wrong = check(cases, show=True)
    print(f"\n{len(cases) - len(wrong)} of {len(cases)} cases agree within {TOLERANCE:g}", end="")
    print(f" ({time.monotonic() - started:.0f} s)")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
