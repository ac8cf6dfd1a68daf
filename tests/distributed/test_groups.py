"""What the executor issues in groups is what the plan says: compared on real ranks, and carried out in a simulation."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bridge_reference import Case, find, global_gradients, local_tensor
from launch import launch
from test_bridge_values import CASES

import mimo_ext
from mimo_ext._extension import _C

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from nccl_semantics import Issue, Mismatch, Program, check_pairs, simulate

NAMES = ["chunks", "chunks, static", "static 3-D", "same ranks, static", "3-D non-dividing"]
MICROBATCHES = 3
Entry = tuple[bool, int, list[tuple[bool, int, int]]]


def issued(rank: int, world_size: int, case: Case) -> tuple[list[Entry], list[list[Entry]]]:
    """What this rank issued over a few microbatches, and what the plan says for each of them."""
    src, dst = case.layouts()
    options = {"shape": case.global_shape() if case.static else None, **case.extra}
    with mimo_ext.Bridge(
        src, dst, ndim=case.ndim, batch_dim=case.batch_dim, dtype=case.dtype, transport="groups", **options
    ) as bridge:
        assert bridge._communicator is not None
        bridge._communicator.start_group_log()
        here_src, here_dst = find(src, rank, -1), find(dst, rank, 0)
        expected = []
        for step in range(MICROBATCHES):
            whole = case.global_tensor(step)
            if here_src is not None:
                bridge.send_forward(local_tensor(case, src, whole, *here_src))
            if here_dst is not None:
                bridge.recv_forward()
            gradients = global_gradients(case, dst, step)
            if here_dst is not None:
                copy = here_dst[1] // dst.tp if len(gradients) > 1 else 0
                bridge.send_backward(local_tensor(case, dst, gradients[copy], *here_dst))
            if here_src is not None:
                dx = bridge.recv_backward()
                assert torch.equal(dx, local_tensor(case, src, torch.stack(gradients).sum(0), *here_src))
        if case.static:
            for forward, plan in ((True, bridge.plan), (False, bridge.plan.reversed())):
                expected.append([(forward, 0, group) for group in _C.group_order(plan, rank) if group])
        found = bridge._communicator.group_log()
    return found, expected


@pytest.mark.parametrize("name", NAMES)
def test_ranks_issue_what_the_plan_says_and_nothing_in_it_waits_for_itself(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    world = 1 + max(rank for side in case.layouts() for rank in side.ranks)
    found = launch(issued, world, replace(case, seq=6))
    programs: dict[int, Program] = {}
    for rank, (log, expected) in enumerate(found):
        program = []
        rounds: dict[tuple[bool, int], int] = {}
        for forward, microbatch, messages in log:
            number = rounds.setdefault((forward, microbatch), 0)
            rounds[forward, microbatch] += 1
            program.append(Issue(forward, (microbatch, number), tuple(map(tuple, messages))))
        programs[rank] = program
        for microbatch in range(MICROBATCHES) if expected else ():
            mine = [(forward, messages) for forward, number, messages in log if number == microbatch]
            both = [group for direction in expected for group in direction]
            for forward in (True, False):
                assert [m for f, m in mine if f is forward] == [m for f, _, m in both if f is forward]
    assert check_pairs({rank: unlabelled(program) for rank, program in programs.items()}) > 0
    assert simulate(programs) > 0


def unlabelled(program: Program) -> Program:
    """Rounds without messages are not issued: numbers of rounds are those of each rank alone."""
    return [replace(step, label=step.label[0]) for step in program if isinstance(step, Issue)]


def test_a_log_with_two_groups_swapped_is_noticed() -> None:
    case = next(case for case in CASES if case.name == "chunks, static")
    found = launch(issued, 4, case)
    programs: dict[int, Program] = {
        rank: [
            Issue(forward, (microbatch, len(messages)), tuple(map(tuple, messages)))
            for forward, microbatch, messages in log
        ]
        for rank, (log, _) in enumerate(found)
    }
    first = unlabelled(programs[2])
    check_pairs({rank: unlabelled(program) for rank, program in programs.items()})
    other = next(n for n, step in enumerate(first) if step.label != first[0].label and step.communicator is True)
    swapped = list(first)
    swapped[0], swapped[other] = first[other], first[0]
    with pytest.raises(Mismatch):
        check_pairs({**{rank: unlabelled(program) for rank, program in programs.items()}, 2: swapped})
