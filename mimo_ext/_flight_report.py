"""Who waits for whom: what the flight recorders of all ranks say together.

An operation of one rank waits for a message of another: for its peer's own operation with the same bridge, direction
and microbatch. Where the peer has not called that, it waits for the peer's program, which may be blocked in an
operation itself, and so on, until a rank is found that waits for nothing: the one that the others wait for. Or a rank
comes twice: a cycle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .flight import VERSION, caller_text, seconds, wall_text

Key = tuple[str, str, int]  # of a bridge: name, digest, serial
PARTNER = {
    "send_forward": "recv_forward",
    "recv_forward": "send_forward",
    "send_backward": "recv_backward",
    "recv_backward": "send_backward",
}
ENDED = ("done", "failed")


@dataclass(frozen=True)
class Operation:
    """One operation of one rank."""

    rank: int
    bridge: Key
    name: str
    microbatch: int

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.name} of microbatch {self.microbatch}, bridge '{self.bridge[0]}'"


@dataclass(frozen=True)
class Step:
    """One step of a chain: `rank` waits, for the reason in words."""

    rank: int
    text: str


@dataclass
class Chain:
    """From a rank that waits to what it waits for in the end.

    Attributes:
        steps: the first is of the rank itself.
        root: the rank that waits for nothing; None for a cycle and where two ranks are at fault together.
        verdict: about the root, or what else ends the chain.
        cycle: the ranks that wait for each other, the first of them again at the end.
    """

    steps: list[Step] = field(default_factory=list)
    root: int | None = None
    verdict: str = ""
    cycle: list[int] = field(default_factory=list)


class Flight:
    """The dumps of several ranks of one job.

    Args:
        snapshots: as of `mimo_ext.flight.snapshot`, one per rank.

    Raises:
        ValueError: two of the same rank, or of another version.
    """

    def __init__(self, snapshots: Iterable[dict[str, Any]]) -> None:
        self.ranks: dict[int, dict[str, Any]] = {}
        self._entries: dict[tuple[int, Key, str], dict[int, dict[str, Any]]] = {}
        self._bridges: dict[tuple[int, Key], dict[str, Any]] = {}
        named = set[int]()
        for found in snapshots:
            if found.get("version") != VERSION:
                raise ValueError(f"expected version {VERSION} of the flight recorder, got {found.get('version')!r}")
            rank = found["rank"]
            if rank in self.ranks:
                raise ValueError(f"expected one file per rank, got two of rank {rank}")
            self.ranks[rank] = found
            for bridge in found["bridges"]:
                key = (bridge["name"], bridge["digest"], bridge["serial"])
                self._bridges[rank, key] = bridge
                named.update(member for side in ("source", "destination") for lane in bridge[side] for member in lane)
                for entry in bridge["entries"]:
                    self._entries.setdefault((rank, key, entry["operation"]), {})[entry["microbatch"]] = entry
        self.missing = sorted(named - set(self.ranks))
        """Ranks of the bridges that have no dump."""

    def waiting(self) -> dict[int, Chain]:
        """Of each rank that is blocked in a bridge, or that gave up waiting."""
        return {rank: chain for rank in sorted(self.ranks) if (chain := self._follow(rank)) is not None}

    def wall_ns(self, rank: int, monotonic_ns: int) -> int:
        """On the wall clock, which the hosts of a cluster share more or less."""
        found = self.ranks[rank]
        return int(monotonic_ns - found["monotonic_ns"] + found["time_ns"])

    # The program of a rank

    def _follow(self, rank: int) -> Chain | None:
        if self._begin(rank) is None:
            return None
        chain = Chain()
        seen: list[int] = []
        current = rank
        while True:
            if current in seen:
                chain.cycle = [*seen[seen.index(current) :], current]
                chain.verdict = f"cycle: {' -> '.join(map(str, chain.cycle))}"
                return chain
            seen.append(current)
            if current not in self.ranks:
                chain.root, chain.verdict = current, f"no dump of rank {current}: it is dead, or was not asked"
                return chain
            begin = self._begin(current)
            if begin is None:
                chain.root, chain.verdict = current, f"rank {current} waits for no bridge; {self._stands(current)}"
                return chain
            operation, text = begin
            following = self._through(operation, text, chain)
            if following is None:
                return chain
            current = following

    def _begin(self, rank: int) -> tuple[Operation, str] | None:
        """What the program of a rank is blocked in, else what it gave up, and that in words."""
        found = self.ranks[rank]
        blocked = [
            (bridge["caller"]["since_ns"], key)
            for (owner, key), bridge in self._bridges.items()
            if owner == rank and bridge["caller"]
        ]
        if blocked:
            key = max(blocked)[1]
            caller = self._bridges[rank, key]["caller"]
            operation = self._blocked_in(rank, key, caller)
            if operation is not None:
                return operation, f"in {caller_text(caller, found['monotonic_ns'])}, bridge '{key[0]}'"
        failed = [
            (entry["since_ns"], Operation(rank, key, name, entry["microbatch"]))
            for (owner, key, name), entries in self._entries.items()
            if owner == rank
            for entry in entries.values()
            if entry["state"] == "failed" and entry["waits_for"]
        ]
        if not failed:
            return None
        since, operation = min(failed, key=lambda item: item[0])
        entry = self._entry(operation)
        assert entry is not None
        waited = seconds(since - entry["posted_ns"])
        return operation, f"gave up {operation.name} of microbatch {operation.microbatch} after {waited}, " + (
            f"bridge '{operation.bridge[0]}'"
        )

    def _blocked_in(self, rank: int, key: Key, caller: dict[str, Any]) -> Operation | None:
        """The operation that a blocked call waits for: the named one, else the oldest that has not ended."""
        if caller["microbatch"] is not None:
            return Operation(rank, key, caller["operation"], caller["microbatch"])
        names = PARTNER if caller["operation"] == "close" else [caller["operation"]]
        open_ones = [
            (entry["id"], Operation(rank, key, name, entry["microbatch"]))
            for name in names
            for entry in self._entries.get((rank, key, name), {}).values()
            if entry["state"] not in ENDED
        ]
        return min(open_ones, key=lambda item: item[0])[1] if open_ones else None

    def _stands(self, rank: int) -> str:
        found = self.ranks[rank]
        failed = [entry for (owner, _, _), by in self._entries.items() if owner == rank for entry in by.values()]
        if found["reason"] and any(entry["state"] == "failed" for entry in failed):
            return f"it failed: {found['reason']}"
        stack = found["stack"]
        return f"it stands at {stack[-1]}" if stack else "it computes"

    # From operation to operation

    def _through(self, operation: Operation, text: str, chain: Chain) -> int | None:
        """Follow an operation to the rank whose program it waits for; None where the chain has ended."""
        seen = set[Operation]()
        while True:
            entry = self._entry(operation)
            waits = entry and entry["waits_for"] and f", waiting for {entry['waits_for']} rank {entry['peer']}"
            chain.steps.append(Step(operation.rank, text + (waits or "")))
            seen.add(operation)
            if entry is None or entry["state"] == "done":
                chain.root = operation.rank
                chain.verdict = f"rank {operation.rank}: {operation.name} of microbatch {operation.microbatch} " + (
                    "has ended: it goes on" if entry else "is too long ago to be known"
                )
                return None
            if entry["waits_for"] is None:
                before = self._before(operation, entry)
                if before is None or before in seen:
                    chain.root, chain.verdict = operation.rank, f"rank {operation.rank} is about to look after it"
                    return None
                operation, text = before, f"first {before.name} of microbatch {before.microbatch}"
                continue
            peer = int(entry["peer"])
            partner = self._partner(operation, entry, peer)
            if partner.rank == operation.rank:
                chain.root = operation.rank
                chain.verdict = f"rank {operation.rank} is on both sides and has not called {partner.name}"
                return None
            if peer not in self.ranks:
                return peer
            theirs = self._entry(partner)
            if theirs is None:
                chain.steps.append(self._absent(partner))
                return peer
            late = self._late(operation, entry, partner, theirs)
            if late:
                chain.root, chain.verdict = peer, late
                return None
            if partner in seen or not self._waits_for_another(partner, theirs, operation.rank):
                chain.verdict = self._between(operation, partner)
                return None
            operation, text = (
                partner,
                f"in {partner.name} of microbatch {partner.microbatch}, bridge '{partner.bridge[0]}'",
            )

    def _entry(self, operation: Operation) -> dict[str, Any] | None:
        return self._entries.get((operation.rank, operation.bridge, operation.name), {}).get(operation.microbatch)

    def _before(self, operation: Operation, entry: dict[str, Any]) -> Operation | None:
        """Operations of one kind are looked after in order: the oldest that has not ended."""
        entries = self._entries[operation.rank, operation.bridge, operation.name].values()
        older = [other for other in entries if other["id"] < entry["id"] and other["state"] not in ENDED]
        if not older:
            return None
        oldest = min(older, key=lambda other: int(other["id"]))
        return Operation(operation.rank, operation.bridge, operation.name, oldest["microbatch"])

    def _partner(self, operation: Operation, entry: dict[str, Any], peer: int) -> Operation:
        """What the peer has to do for it."""
        lane = entry["waits_for"].startswith("lane copy")
        return Operation(
            peer, operation.bridge, operation.name if lane else PARTNER[operation.name], operation.microbatch
        )

    def _absent(self, partner: Operation) -> Step:
        calls = self._entries.get((partner.rank, partner.bridge, partner.name), {})
        what = f"{partner.name} of microbatch {partner.microbatch}, bridge '{partner.bridge[0]}'"
        if (partner.rank, partner.bridge) not in self._bridges:
            return Step(partner.rank, f"has no such bridge any more, or not yet: '{partner.bridge[0]}'")
        last = f"its last is of microbatch {max(calls)}" if calls else "it has called none"
        if calls and min(calls) > partner.microbatch:
            return Step(partner.rank, f"called {what} too long ago to be known; {last}")
        return Step(partner.rank, f"has not called {what}; {last}")

    def _late(self, mine: Operation, entry: dict[str, Any], partner: Operation, theirs: dict[str, Any]) -> str:
        """The peer came after this rank had given up."""
        if entry["state"] != "failed":
            return ""
        gave_up = self.wall_ns(mine.rank, entry["since_ns"])
        came = self.wall_ns(partner.rank, theirs["posted_ns"])
        if came <= gave_up:
            return ""
        return (
            f"rank {partner.rank} called {partner.name} of microbatch {partner.microbatch} "
            f"{seconds(came - gave_up)} after rank {mine.rank} had given up"
        )

    @staticmethod
    def _waits_for_another(partner: Operation, theirs: dict[str, Any], rank: int) -> bool:
        # A send that has not failed is on its way, whatever else it waits for.
        if theirs["state"] == "done" or (partner.name.startswith("send") and theirs["state"] != "failed"):
            return False
        return theirs["waits_for"] is None or bool(theirs["peer"] != rank)

    @staticmethod
    def _between(mine: Operation, partner: Operation) -> str:
        low, high = sorted((mine.rank, partner.rank))
        return (
            f"ranks {low} and {high} both did their part: the message is on its way, or the link between them is down"
        )


def report(flight: Flight) -> str:
    """Who waits for whom, in words."""
    chains = flight.waiting()
    first = [flight.ranks[rank]["time_ns"] for rank in sorted(flight.ranks)]
    when = f"dumped {wall_text(min(first))} .. {wall_text(max(first))}" if first else ""
    missing = f"; no dump of {_ranks(flight.missing)}" if flight.missing else ""
    lines = [f"{len(flight.ranks)} ranks, {when}{missing}", ""]
    for rank, chain in chains.items():
        for number, step in enumerate(chain.steps):
            head = f"rank {rank:<3}" if number == 0 else f"{'':8}  rank {step.rank}"
            lines.append(f"{head} {step.text}")
        lines.append(f"{'':8}  => {chain.verdict}")
    idle = [rank for rank in sorted(flight.ranks) if rank not in chains]
    lines += [f"rank {rank:<3} waits for no bridge; {flight._stands(rank)}" for rank in idle]
    lines.append("")
    if not chains:
        return "\n".join([*lines, "No rank waits for another."])
    return "\n".join([*lines, *summary(chains)])


def summary(chains: dict[int, Chain]) -> list[str]:
    """One line per culprit."""
    verdicts: dict[str, list[int]] = {}
    for rank, chain in chains.items():
        # Of a cycle each member tells another beginning.
        cycle = sorted(set(chain.cycle))
        text = f"{_ranks(cycle)} wait for each other, in a cycle" if cycle else chain.verdict
        verdicts.setdefault(text, []).append(rank)
    return [f"{_ranks(ranks)} {'waits' if len(ranks) == 1 else 'wait'}: {text}" for text, ranks in verdicts.items()]


def report_dict(flight: Flight) -> dict[str, Any]:
    """The same for programs."""
    return {
        "ranks": sorted(flight.ranks),
        "missing": flight.missing,
        "waiting": [
            {
                "rank": rank,
                "steps": [{"rank": step.rank, "text": step.text} for step in chain.steps],
                "root": chain.root,
                "cycle": chain.cycle,
                "verdict": chain.verdict,
            }
            for rank, chain in flight.waiting().items()
        ],
    }


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
