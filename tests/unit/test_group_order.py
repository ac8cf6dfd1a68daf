"""The order in which messages go to NCCL: it matches at every pair of ranks, and nothing in it can wait for itself."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
from nccl_semantics import Deadlock, Issue, Message, Mismatch, Program, Wait, check_pairs, simulate

from mimo_ext import Layout, Plan
from mimo_ext._extension import _C

BYTES = 2


@dataclass(frozen=True)
class Edge:
    """One bridge."""

    name: str
    src: Layout
    dst: Layout
    plan: Plan

    def groups(self, rank: int, forward: bool) -> list[tuple[Message, ...]]:
        plan = self.plan if forward else self.plan.reversed()
        return [tuple(messages) for messages in _C.group_order(plan, rank)]

    @property
    def sources(self) -> set[int]:
        return {rank for lane in self.src.lanes(-1) for rank in lane}

    @property
    def destinations(self) -> set[int]:
        return {rank for lane in self.dst.lanes(0) for rank in lane}


def edge(src: Layout, dst: Layout, name: str = "edge", **options: Any) -> Edge:
    rows = 24
    microbatch = _C.Microbatch(
        ndim=2,
        batch_dim=0,
        seq_dim=0,
        samples=12,
        shape=[1, 4],
        rows_per_sample=rows,
        element_size=BYTES,
    )
    given = {"max_chunks": 3, "min_chunk_bytes": 64, "path": "pipelined", **options}
    plan = Plan(src.boundary(-1), dst.boundary(0), microbatch, False, links=None, **given)
    return Edge(name, src, dst, plan)


def layouts(first: int, name: str) -> list[Layout]:
    """One to eight ranks."""
    sizes = [
        {},
        {"tp": 2},
        {"dp": 2},
        {"dp": 3},
        {"tp": 2, "dp": 2},
        {"tp": 3},
        {"cp": 2},
        {"tp": 2, "cp": 2},
        {"cp": 2, "cp_placement": "zigzag"},
        {"tp": 2, "sequence_parallel": True},
        {"tp": 4, "dp": 2},
        {"tp": 2, "cp": 2, "dp": 2, "cp_placement": "contiguous"},
    ]
    found = []
    for size in sizes:
        count = size.get("tp", 1) * size.get("cp", 1) * size.get("dp", 1)
        found.append(Layout(range(first, first + count), name=name, **size))
    return found


PAIRS = [
    (src, dst)
    for src in layouts(0, "images")
    # On ranks of their own, on the same first ranks, and partly on the same.
    for first in (src.size, 0, 1)
    for dst in layouts(first, "language")
]


def pipeline(edges: list[Edge], depths: dict[str, int], microbatches: int) -> dict[int, Program]:
    """1F1B across the edges: each rank's program, as the executor carries it out.

    Args:
        depths: by edge, how many microbatches its source is ahead: at least as many as there are stages after it.
            Encoders with fewer stages than others are ahead by more.
    """
    ranks = sorted(set().union(*(each.sources | each.destinations for each in edges)))
    return {rank: program_of(rank, edges, depths, microbatches) for rank in ranks}


def program_of(rank: int, edges: list[Edge], depths: dict[str, int], microbatches: int) -> Program:
    program: list[Issue | Wait] = []
    mine = [each for each in edges if rank in each.sources | each.destinations]

    def move(each: Edge, forward: bool, step: int) -> None:
        # Both, where the rank is on both sides: its own sends are part of the groups of its receive.
        groups = each.groups(rank, forward)
        program.extend(Issue((each.name, forward), (step, n), group) for n, group in enumerate(groups) if group)
        if rank in (each.destinations if forward else each.sources):
            program.append(Wait((each.name, forward)))

    def forward(step: int) -> None:
        for each in mine:
            move(each, True, step)

    def backward(step: int) -> None:
        for each in reversed(mine):
            move(each, False, step)

    if any(rank in each.destinations for each in mine):
        ahead = min(depths[each.name] for each in mine if rank in each.destinations) - 1
    else:
        ahead = max(depths[each.name] for each in mine)
    ahead = min(ahead, microbatches)
    for step in range(ahead):
        forward(step)
    for step in range(microbatches):
        if step + ahead < microbatches:
            forward(step + ahead)
        backward(step)
    return program


def test_every_pair_of_layouts_matches_and_ends() -> None:
    assert len(PAIRS) > 400
    messages = groups = 0
    for src, dst in PAIRS:
        programs = pipeline([edge(src, dst)], {"edge": 1}, 2)
        messages += check_pairs(programs)
        groups += simulate(programs)
    assert messages > 10_000
    assert groups > 5_000


@pytest.mark.parametrize("path", ["pipelined", "direct", "leader", "auto"])
def test_every_path_matches_and_ends(path: str) -> None:
    for src, dst in PAIRS[::5]:
        programs = pipeline([edge(src, dst, path=path)], {"edge": 2}, 3)
        check_pairs(programs)
        simulate(programs)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("microbatches", [1, 3, 6])
def test_whole_schedules_of_encoders_of_unequal_depth_end(depth: int, microbatches: int) -> None:
    language = Layout(range(7, 11), tp=4, name="language")
    images = Layout(range(3), dp=3, name="images")
    audio = Layout(range(3, 7), tp=2, dp=2, name="audio")
    edges = [edge(images, language, "images"), edge(audio, language, "audio")]
    programs = pipeline(edges, {"images": depth, "audio": depth + 2}, microbatches)
    # What is moved: every microbatch, in both directions, over both edges.
    labels = {(step.communicator, step.label[0]) for p in programs.values() for step in p if isinstance(step, Issue)}
    assert len(labels) == 2 * 2 * microbatches
    check_pairs(programs)
    simulate(programs)


def test_one_source_of_two_modules_ends() -> None:
    images = Layout(range(2), tp=2, name="images")
    edges = [
        edge(images, Layout(range(2, 6), tp=4, name="language"), "language"),
        edge(images, Layout(range(6, 9), dp=3, name="audio"), "audio"),
    ]
    for depth in (1, 3):
        programs = pipeline(edges, {"language": depth, "audio": depth}, 5)
        check_pairs(programs)
        simulate(programs)


def test_chunks_and_lane_copies_share_groups() -> None:
    """Not one chunk after the other: while one is received, the one before it goes to the replicas."""
    chunks = edge(Layout([0], name="images"), Layout(range(1, 5), tp=4, name="language"))
    groups = chunks.groups(1, True)
    assert len(groups) >= 3
    middle = groups[1]
    assert [peer for sending, peer, _ in middle if not sending and peer == 0] == [0]
    assert sorted(peer for sending, peer, _ in middle if sending) == [2, 3, 4]
    received = sum(size for group in groups for sending, _, size in group if not sending)
    assert received == chunks.plan.microbatch.samples * 24 * 4 * BYTES


def mutants(programs: dict[int, Program]) -> list[tuple[dict[int, Program], bool]]:
    """Two rounds of one rank swapped: for every rank and every two neighbouring groups of a communicator.

    And whether the two have messages with the same peer, the same way.
    """
    found = []
    for rank, program in programs.items():
        places = [n for n, step in enumerate(program) if isinstance(step, Issue)]
        for first, second in itertools.pairwise(places):
            one, other = program[first], program[second]
            assert isinstance(one, Issue)
            assert isinstance(other, Issue)
            if one.communicator != other.communicator:
                continue
            changed = list(program)
            changed[first], changed[second] = other, one
            common = {message[:2] for message in one.messages} & {message[:2] for message in other.messages}
            found.append(({**programs, rank: changed}, bool(common)))
    return found


def test_two_rounds_in_the_wrong_order_are_noticed() -> None:
    src, dst = Layout(range(2), tp=2, name="images"), Layout(range(2, 6), tp=4, name="language")
    programs = pipeline([edge(src, dst)], {"edge": 1}, 2)
    wrong = mutants(programs)
    assert len(wrong) > 20
    mismatches = 0
    for changed, common_peers in wrong:
        try:
            check_pairs(changed)
            assert not common_peers
        except Mismatch:
            mismatches += 1
    assert mismatches > 20


def test_both_directions_on_one_communicator_would_deadlock() -> None:
    """Why forward and backward have one each."""
    src, dst = Layout(range(2), tp=2, name="images"), Layout(range(2, 6), tp=4, name="language")
    programs = pipeline([edge(src, dst)], {"edge": 2}, 4)
    simulate(programs)
    joined: dict[int, Program] = {
        rank: [replace(step, communicator="edge") for step in program] for rank, program in programs.items()
    }
    with pytest.raises(Deadlock):
        simulate(joined)


def test_a_send_of_its_own_group_would_deadlock_ranks_on_both_sides() -> None:
    """Why the sends of a rank that is on both sides wait for its receive."""
    both = Layout(range(2), dp=2, name="images"), Layout(range(2), tp=2, name="language")
    programs = pipeline([edge(*both)], {"edge": 1}, 1)
    simulate(programs)
    apart: dict[int, Program] = {}
    for rank, program in programs.items():
        split: list[Issue | Wait] = []
        for step in program:
            if not isinstance(step, Issue):
                split.append(step)
                continue
            for sending in (True, False):
                messages = tuple(message for message in step.messages if message[0] is sending)
                if messages:
                    split.append(replace(step, messages=messages))
        apart[rank] = split
    with pytest.raises(Deadlock):
        simulate(apart)


def test_the_simulation_knows_a_deadlock() -> None:
    crossed: dict[int, Program] = {
        0: [Issue("a", 0, ((True, 1, 8),)), Issue("a", 1, ((False, 1, 8),))],
        1: [Issue("a", 0, ((True, 0, 8),)), Issue("a", 1, ((False, 0, 8),))],
    }
    with pytest.raises(Deadlock):
        simulate(crossed)
    together: dict[int, Program] = {
        rank: [Issue("a", 0, ((True, 1 - rank, 8), (False, 1 - rank, 8))), Wait("a")] for rank in (0, 1)
    }
    assert simulate(together) == 2
    alone: dict[int, Program] = {0: [Issue("a", 0, ((True, 1, 8),)), Wait("a")], 1: []}
    with pytest.raises(Deadlock):
        simulate(alone)
