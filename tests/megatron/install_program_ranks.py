"""Runs install_program.py on ranks, as it is: on Megatron's classes, then on ours after `install`, and compares.

As a script (``make check-install``) it prints a table and exits with 1 where anything is not as it should be.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import multiprocessing
import os
import runpy
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed as dist
from launch import run_ranks

PROGRAM = Path(__file__).resolve().parent / "install_program.py"
PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "megatron.core.models.mimo", "megatron.core.optimizer"]


@dataclass(frozen=True)
class Case:
    """A layout. `refusal`: what Megatron says to it; empty where it can train it. `overlap`: ours posts receives ahead.

    Of the layouts with the same data (`ragged`), those that Megatron cannot train must give the losses of those it can.
    """

    name: str
    encoder: str
    language: str
    world_size: int
    ragged: bool
    refusal: str = ""
    overlap: bool = False


CASES = [
    Case("fan-out, ragged rows", "dp=1", "dp=2", 3, True),
    Case("fan-in, pipeline", "dp=2", "pp=2", 4, False, overlap=True),
    Case("fan-in, ragged rows", "dp=2", "dp=1", 3, True, "Fan-in with variable modality token counts is not supported"),
    Case("DP 2 -> 3, ragged rows", "dp=2", "dp=3", 5, True, "must be evenly divisible"),
]


@dataclass
class Row:
    """Results of all ranks (None where they failed, with their errors' text) without and with `install`."""

    case: Case
    released: list[dict[str, Any]] | None
    refusal: str
    ours: list[dict[str, Any]] | None
    error: str = ""


class _Gloo:
    """torch.distributed for Megatron's own bridge, which asks for NCCL by name."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def new_group(self, ranks: Any, backend: Any = None) -> Any:
        return dist.new_group(ranks)

    def new_subgroups_by_enumeration(self, ranks_per_subgroup_list: Any, backend: Any = None) -> Any:
        return dist.new_subgroups_by_enumeration(ranks_per_subgroup_list)


def run_program(
    rank: int,
    world_size: int,
    install: bool,
    arguments: list[str],
    program: Path = PROGRAM,
    bridge: str | None = None,
    overlap: bool = False,
) -> dict[str, Any]:
    """One rank: the script's result, how often Megatron's own bridge was constructed, and schedules that overlapped.

    Args:
        rank, world_size: as `launch` gives them.
        install: whether the script runs on our classes.
        arguments: of the script.
        program: the script.
        bridge: folder with the sources of Megatron-Bridge, where the script needs them.
        overlap: of `install`.
    """
    if bridge is not None:
        import bridge_sources

        bridge_sources.use(bridge)
    from megatron.core.pipeline_parallel import bridge_communicator

    import mimo_ext.megatron as mimo

    released = bridge_communicator.BridgeCommunicator
    constructed = 0
    init = released.__init__

    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal constructed
        constructed += 1
        init(self, *args, **kwargs)

    logging.getLogger("mimo_ext.megatron.cpu").setLevel(logging.ERROR)  # on random states, of which none is drawn
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(mimo.cpu())
        stack.enter_context(mock.patch.object(bridge_communicator, "dist", _Gloo()))
        stack.enter_context(mock.patch.object(released, "__init__", count))
        stack.enter_context(mock.patch.object(sys, "argv", [str(program), *arguments, "--out", folder]))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        schedules = mock.Mock(side_effect=mimo.MultiModulePipelineCommunicator.overlap)
        if install:
            stack.enter_context(mimo.install(overlap=overlap))
            counted = lambda self, *args, **kwargs: schedules(self, *args, **kwargs)  # noqa: E731 - a method
            stack.enter_context(mock.patch.object(mimo.MultiModulePipelineCommunicator, "overlap", counted))
        runpy.run_path(str(program), run_name="__main__")
        result = json.loads((Path(folder) / f"rank_{rank}.json").read_text())
    return result | {"released_bridges": constructed, "overlapped": schedules.call_count}


def run_case(case: Case) -> Row:
    arguments = ["--encoder", case.encoder, "--language", case.language, *(["--ragged"] if case.ragged else [])]
    outcomes = [
        run_ranks(run_program, case.world_size, install, arguments, PROGRAM, None, case.overlap, timeout=120)
        for install in (False, True)
    ]
    errors = ["\n".join(outcome.errors.values()) for outcome in outcomes]
    results = [None if outcome.errors else outcome.results for outcome in outcomes]
    return Row(case, results[0], errors[0], results[1], errors[1])


def problems(rows: list[Row]) -> list[str]:
    """What is not as it should be, in words."""
    found = [
        f"{row.case.name}: expected schedules that post receives ahead only with overlap={row.case.overlap}"
        for row in rows
        if row.ours is not None and any(bool(rank.get("overlapped")) != row.case.overlap for rank in row.ours)
    ]
    losses_of = {row.case.ragged: row.released[0]["losses"] for row in rows if row.released is not None}
    for row in rows:
        case, ours = row.case, row.ours

        def problem(text: str, name: str = case.name) -> None:
            found.append(f"{name}: {text}")

        if case.refusal and (row.released is not None or case.refusal not in row.refusal):
            problem(f"Megatron was expected to refuse with '{case.refusal}', got {row.refusal[-500:] or 'losses'}")
            continue
        if not case.refusal and row.released is None:
            problem(f"Megatron refuses a layout that it can train: {row.refusal[-500:]}")
            continue
        if ours is None:
            problem(f"fails with install: {row.error[-2000:]}")
            continue
        for rank, mine in enumerate(ours):
            losses, weights = mine["losses"], mine["weights"]
            expected = losses_of[case.ragged] if row.released is None else row.released[rank]["losses"]
            if not _close(losses, expected, 1e-5):
                problem(f"rank {rank}: losses differ: expected {expected}, got {losses}")
            elif not losses[-1] < losses[0]:
                problem(f"rank {rank}: the loss does not fall: {losses}")
            theirs = None if row.released is None else row.released[rank]["weights"]
            if theirs is not None and not (
                theirs.keys() == weights.keys() and _close(list(weights.values()), list(theirs.values()), 1e-5)
            ):
                problem(f"rank {rank}: weights differ: expected {theirs}, got {weights}")
            if mine["released_bridges"]:
                problem(f"rank {rank}: {mine['released_bridges']} bridges of Megatron were constructed with install")
            if not mine["communicator"].startswith("mimo_ext."):
                problem(f"rank {rank}: the communicator is of {mine['communicator']}")
    return found


def _close(values: list[float], expected: list[float], relative: float) -> bool:
    return len(values) == len(expected) and all(
        math.isclose(value, other, rel_tol=relative) for value, other in zip(values, expected, strict=True)
    )


def main() -> int:
    from multiprocessing import forkserver

    os.environ["PYTHONWARNINGS"] = "ignore"  # of what is not installed beside Megatron
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    print(f"{PROGRAM.name}, unchanged: losses of 3 steps on Megatron's classes, and on ours after install()")
    print(f"{'layout':24} {'ranks':>5}  {'Megatron':28} {'install()':28} bridges of Megatron")
    rows = []
    for case in CASES:
        row = run_case(case)
        rows.append(row)
        released, ours = (" ".join(f"{x:.6f}" for x in r[0]["losses"]) if r else "" for r in (row.released, row.ours))
        bridges = "/".join(str(sum(x["released_bridges"] for x in r)) if r else "-" for r in (row.released, row.ours))
        line = f"{case.name:24} {case.world_size:5}  {released or 'refuses':28} {ours or 'fails':28} {bridges}"
        print(line, flush=True)
    found = problems(rows)
    for text in found:
        print(f"wrong: {text}")
    print("check-install: " + ("failed" if found else "all as it should be"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
