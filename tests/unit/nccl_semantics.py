"""What NCCL makes of groups of messages: a simulation, as strict as its documentation allows.

A rank has one stream of its own and one stream per communicator. Its own stream issues groups and waits for them in
the order of the program. A communicator's stream runs its groups one after the other, each not before it was issued.
A message moves while the groups of both ends run; the messages of two ranks match in order, by no tag. A group ends
when all of its messages have moved.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

Message = tuple[bool, int, int]  # sending, peer, bytes


@dataclass(frozen=True)
class Issue:
    """Enqueues a group on a communicator. `label` says what it is: both ends of a message must agree on it."""

    communicator: Hashable
    label: Hashable
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Wait:
    """This rank's own stream goes on when all that it has issued on the communicator so far has ended."""

    communicator: Hashable


Program = Sequence[Issue | Wait]


class Mismatch(AssertionError):
    """Two ends of a message that do not agree."""


class Deadlock(AssertionError):
    """Streams that wait for each other."""


class _Group:
    def __init__(self, issue: Issue) -> None:
        self.issue = issue
        self.keys: list[tuple[Hashable, int, int, int]] = []  # communicator, sender, receiver, number
        self.left = 0


def check_pairs(programs: dict[int, Program]) -> int:
    """Every send has its receive, in order, of as many bytes, in a group with the same label. Returns their number."""
    ends: dict[tuple[Hashable, int, int], tuple[list, list]] = defaultdict(lambda: ([], []))
    for rank, program in programs.items():
        for step in program:
            if isinstance(step, Issue):
                for sending, peer, size in step.messages:
                    pair = (rank, peer) if sending else (peer, rank)
                    ends[(step.communicator, *pair)][0 if sending else 1].append((step.label, size))
    for (communicator, sender, receiver), (sends, receives) in ends.items():
        if sends != receives:
            raise Mismatch(f"{communicator}: {sender} -> {receiver}: sends {sends}, receives {receives}")
    return sum(len(sends) for sends, _ in ends.values())


def simulate(programs: dict[int, Program]) -> int:
    """Runs the programs to their end and returns the number of groups. Raises Deadlock."""
    position = dict.fromkeys(programs, 0)
    queues: dict[tuple[int, Hashable], deque[_Group]] = defaultdict(deque)
    counts: dict[tuple[Hashable, int, int, bool], int] = defaultdict(int)
    running: dict[tuple[Hashable, int, int, int], dict[bool, _Group]] = defaultdict(dict)
    ended = 0
    todo = deque(programs)  # ranks whose own stream may go on
    started: deque[tuple[int, Hashable]] = deque()  # queues whose first group begins to run

    def own_stream(rank: int) -> None:
        program = programs[rank]
        while position[rank] < len(program):
            step = program[position[rank]]
            if isinstance(step, Wait):
                if queues[rank, step.communicator]:
                    return
            else:
                group = _Group(step)
                for sending, peer, _ in step.messages:
                    pair = (rank, peer) if sending else (peer, rank)
                    number = counts[(step.communicator, *pair, sending)]
                    counts[(step.communicator, *pair, sending)] = number + 1
                    group.keys.append((step.communicator, *pair, number))
                group.left = len(group.keys)
                queue = queues[rank, step.communicator]
                queue.append(group)
                if len(queue) == 1:
                    started.append((rank, step.communicator))
            position[rank] += 1

    while todo or started:
        while todo:
            own_stream(todo.popleft())
        while started:
            rank, communicator = started.popleft()
            group = queues[rank, communicator][0]
            for key, (sending, _, _) in zip(group.keys, group.issue.messages, strict=True):
                running[key][sending] = group
                if len(running[key]) == 2:
                    for both in running.pop(key).values():
                        both.left -= 1
            # Groups without anything left end, and let the next ones begin.
            for place in [place for place, queue in queues.items() if queue and queue[0].left == 0]:
                queue = queues[place]
                if (place in started) or queue[0].left:
                    continue
                queue.popleft()
                ended += 1
                todo.append(place[0])
                if queue:
                    started.append(place)
    stuck = {rank: program[position[rank]] for rank, program in programs.items() if position[rank] < len(program)}
    waiting = {place: queue[0].issue.label for place, queue in queues.items() if queue}
    if stuck or waiting:
        raise Deadlock(f"own streams at {stuck}; groups that do not end: {waiting}")
    return ended
