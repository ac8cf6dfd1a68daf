"""What every rank sends: by the bridge's plan, and by the released way (one leader per lane, then a broadcast)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from .._extension import _C
from ..layout import Plan
from .edge import Edge, EdgeError
from .links import HOST, NIC, STAYS, Links, Load, Phase, Transfer, busiest, loads_of, time_of

BROADCASTS = ("ring", "tree")
FEW_RANKS = 32  # of both sides together: these are all looked at
MAX_RANKS = 1 << 14  # whose messages are listed one by one
SHAPE_BYTES = 8  # of one extent: shapes travel as int64


@dataclass(frozen=True)
class Part:
    """The lanes that are looked at: all, or the first of `groups` groups that do the same and know nothing of another.

    Lanes of one group exchange samples with one another only; where all groups are alike, the first stands for all.
    """

    senders: tuple[tuple[int, ...], ...]
    receivers: tuple[tuple[int, ...], ...]
    groups: int = 1

    @property
    def ranks(self) -> list[int]:
        """All ranks of the part, ascending."""
        return sorted({rank for lane in (*self.senders, *self.receivers) for rank in lane})


def part_of(edge: Edge, plan: Plan, links: Links) -> Part:
    """The part of a plan that has to be looked at.

    Raises:
        EdgeError: too many ranks that are not groups of equals.
    """
    senders, receivers = _sides(plan)
    groups = math.gcd(len(senders.lanes), len(receivers.lanes))
    many = sum(len(lane) for side in (senders, receivers) for lane in side.lanes) > FEW_RANKS
    even = not edge.ragged and edge.samples % groups == 0
    if many and groups > 1 and even and _groups_are_alike(senders, receivers, links):
        return Part(
            tuple(map(tuple, senders.lanes[: len(senders.lanes) // groups])),
            tuple(map(tuple, receivers.lanes[: len(receivers.lanes) // groups])),
            groups,
        )
    part = Part(tuple(map(tuple, senders.lanes)), tuple(map(tuple, receivers.lanes)))
    if len(part.ranks) > MAX_RANKS:
        raise EdgeError(
            f"{len(part.ranks)} ranks whose lanes do not fall into equal groups are more than can be listed here "
            f"({MAX_RANKS}); samples that are a multiple of {groups} would make {groups} groups"
        )
    return part


def _sides(plan: Plan) -> tuple[_C.Boundary, _C.Boundary]:
    """The sending and the receiving side."""
    return (plan.destination, plan.source) if plan.backward else (plan.source, plan.destination)


def _groups_are_alike(senders: _C.Boundary, receivers: _C.Boundary, links: Links) -> bool:
    """Whether each group's ranks are the first group's, moved on by whole hosts."""
    groups = math.gcd(len(senders.lanes), len(receivers.lanes))
    strides, hosts = [], []
    for side in (senders, receivers):
        size = len(side.lanes) // groups
        stride = side.lanes[size][0] - side.lanes[0][0]
        moved = [[rank + stride for rank in lane] for lane in side.lanes[:-size]]
        if moved != side.lanes[size:] or (links.ranks_per_host and stride % links.ranks_per_host):
            return False
        strides.append(stride)
        hosts.append({links.host_of(rank) for lane in side.lanes for rank in lane})
    # Two sides that move on unequally must not share a host (or ranks): what is close in one group is not in the next.
    return strides[0] == strides[1] or not hosts[0] & hosts[1]


@dataclass(frozen=True)
class Traffic:
    """What one method sends for one microbatch in one direction.

    Args:
        method: in words.
        phases: the messages of the part's ranks, in the order in which they wait for one another.
        part: which ranks these are.
        links: what they are sent over.
        paths: that overlaps of lanes take, where the method has a choice.
    """

    method: str
    phases: tuple[Phase, ...]
    part: Part
    links: Links
    paths: tuple[str, ...] = ()

    @property
    def transfers(self) -> list[Transfer]:
        """All messages of the part's ranks, of all phases."""
        return [transfer for phase in self.phases for transfer in phase.all]

    @property
    def rounds(self) -> int:
        """Messages in a row of which each waits for the one before."""
        return sum(phase.rounds for phase in self.phases if any(t.sender != t.receiver for t in phase.all))

    @property
    def chunks(self) -> int:
        """In how many chunks lane copies follow what they are made of."""
        return max((phase.chunks for phase in self.phases), default=1)

    @property
    def messages(self) -> int:
        """Messages of all ranks; what stays on its rank is none."""
        return self.part.groups * sum(t.messages for t in self.transfers if t.sender != t.receiver)

    @property
    def seconds(self) -> float:
        """Modelled time."""
        return time_of(self.phases, self.links)

    @property
    def efficiency(self) -> float | None:
        """Time that the busiest link needs for the bytes of the first delivery alone, as a share of the modelled time.

        None where nothing moves.
        """
        bare = Links(self.links.nic, self.links.host, 0.0, 0.0, self.links.ranks_per_host)
        payload = [transfer for phase in self.phases if phase.name == PAYLOAD for transfer in phase.transfers]
        return busiest(payload, bare) / self.seconds if self.seconds else None

    def loads(self) -> dict[tuple[int, str, str], Load]:
        """What every link carries, by (rank, "nic" | "host" | "stays", "out" | "in")."""
        return loads_of(self.transfers, self.links)

    def most(self, path: str, way: str) -> int:
        """Bytes of the busiest of all links of a kind."""
        return max((load.size for key, load in self.loads().items() if key[1:] == (path, way)), default=0)

    def total(self, path: str) -> int:
        """Bytes over all links of a kind, each counted once."""
        return self.part.groups * sum(load.size for key, load in self.loads().items() if key[1:] == (path, "out"))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes and seconds; the ranks of the first group only where groups are alike."""
        loads = self.loads()
        links = [(path, way) for path in (NIC, HOST) for way in ("out", "in")]
        return {
            "method": self.method,
            "rounds": self.rounds,
            "chunks": self.chunks,
            "paths": list(self.paths),
            "messages": self.messages,
            "seconds": self.seconds,
            "efficiency": self.efficiency,
            "bytes": {path: self.total(path) for path in (NIC, HOST, STAYS)},
            "busiest_rank_bytes": {f"{path}_{way}": self.most(path, way) for path, way in links},
            "equal_groups": self.part.groups,
            "ranks": [
                {
                    "rank": rank,
                    **{f"{path}_{way}": loads.get((rank, path, way), Load()).size for path, way in links},
                    "stays": loads.get((rank, STAYS, "out"), Load()).size,
                }
                for rank in self.part.ranks
            ],
        }


PAYLOAD = "payload"
PAYLOAD_IN_LANE = "payload in the lane"


def planned(edge: Edge, links: Links, backward: bool = False) -> Traffic:
    """What the bridge sends: the messages of its plan, on the path that it chooses for these links."""
    plan = edge.plan(backward, links)
    part = part_of(edge, plan, links)
    item = edge.dtype.itemsize
    transfers, chunks = _gathered(_sends(plan, part), item)
    copies, copy_chunks = _gathered(_lane_sends(plan, part), item)
    phase = Phase(PAYLOAD, transfers, copies, max(chunks, copy_chunks), rounds=2 if copies else 1)
    phases = (phase,) if transfers else ()
    return Traffic("the bridge's plan", phases, part, links, tuple(plan.paths_taken))


def _sends(plan: Plan, part: Part) -> Iterator[_C.Message]:
    for rank in sorted({rank for lane in part.senders for rank in lane}):
        yield from plan.for_rank(rank, True, False)["sends"]


def _lane_sends(plan: Plan, part: Part) -> Iterator[_C.Message]:
    for rank in sorted({rank for lane in part.receivers for rank in lane}):
        yield from plan.for_rank(rank, False, True)["lane_sends"]


def _size(message: _C.Message, item: int) -> int:
    return item * math.prod(extent for _, extent in message["recv_box"])


def _gathered(messages: Iterable[_C.Message], item: int) -> tuple[tuple[Transfer, ...], int]:
    """Messages between the same two ranks as one transfer, and into how many chunks they are cut."""
    sums: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
    last_chunk = 0
    for message in messages:
        pair = sums[message["sender"], message["receiver"]]
        pair[0] += _size(message, item)
        pair[1] += 1
        last_chunk = max(last_chunk, message["chunk"])
    return tuple(Transfer(*ranks, *pair) for ranks, pair in sums.items()), last_chunk + 1


def _overlaps(edge: Edge, plan: Plan, part: Part) -> Iterator[tuple[tuple[int, int], int]]:
    """(sender lane, receiver lane) of all lanes that share samples, and the bytes of these."""
    senders, receivers = (len(side.lanes) for side in _sides(plan))
    before = [0, *accumulate(edge.rows_of_samples)]
    for lane in range(len(part.senders)):
        for other in range(lane * receivers // senders, -(-(lane + 1) * receivers // senders)):
            first = max(edge.samples * lane // senders, edge.samples * other // receivers)
            last = min(edge.samples * (lane + 1) // senders, edge.samples * (other + 1) // receivers)
            if first < last:
                yield (lane, other), (before[last] - before[first]) * edge.hidden * edge.dtype.itemsize


def leader_broadcast(edge: Edge, links: Links, backward: bool = False, broadcast: str = "ring") -> Traffic:
    """What Megatron-Core's released class sends: whole lanes between leaders, then a broadcast in the receiving lane.

    Two further messages go ahead with the shape: one between the leaders, one broadcast in the lane. A lane's leader is
    its last rank at the source, its first at the destination. Layouts that the released class refuses are modelled as
    if it served them in the same way.

    Args:
        broadcast: "ring" passes a tensor on from rank to rank in small pieces, so that each rank sends it once at most
            (as NCCL does); "tree" sends it whole, to twice as many ranks each time (as gloo does).
    """
    plan = edge.plan(backward)
    part = part_of(edge, plan, links)
    # A gradient's partial copies count once: the leader's is taken.
    sizes = dict(_overlaps(edge, plan, part))
    sender, receiver = (0, -1) if backward else (-1, 0)
    between = {
        pair: (part.senders[pair[0]][sender], part.receivers[pair[1]][receiver]) for pair, size in sizes.items() if size
    }
    arrived: dict[int, int] = defaultdict(int)
    for pair in between:
        arrived[pair[1]] += sizes[pair]
    shape = SHAPE_BYTES * edge.ndim
    # The leader first, the others in the lane's order.
    lanes = {lane: part.receivers[lane] for lane in arrived}
    rings = {lane: (ranks[receiver], *(ranks[:-1] if backward else ranks[1:])) for lane, ranks in lanes.items()}
    phases = [
        Phase("shape", tuple(Transfer(*pair, shape) for pair in between.values())),
        Phase(PAYLOAD, tuple(Transfer(*between[pair], sizes[pair]) for pair in between)),
        *_broadcast("shape in the lane", rings, dict.fromkeys(rings, shape), broadcast),
        *_broadcast(PAYLOAD_IN_LANE, rings, arrived, broadcast),
    ]
    return Traffic("leader + broadcast", tuple(phase for phase in phases if phase.transfers), part, links)


def _broadcast(name: str, rings: dict[int, tuple[int, ...]], sizes: dict[int, int], broadcast: str) -> Sequence[Phase]:
    width = max(map(len, rings.values()), default=1)
    if broadcast == "ring":
        edges = [Transfer(*pair, sizes[lane]) for lane, ranks in rings.items() for pair in pairwise(ranks)]
        return [Phase(name, tuple(edges), rounds=width - 1)]
    if broadcast != "tree":
        raise ValueError(f"broadcast must be one of {', '.join(BROADCASTS)}, got {broadcast!r}")
    phases, have = [], 1
    while have < width:
        edges = [
            Transfer(ranks[index], ranks[index + have], sizes[lane])
            for lane, ranks in rings.items()
            for index in range(min(have, len(ranks) - have))
        ]
        phases.append(Phase(name, tuple(edges)))
        have *= 2
    return phases
