"""How long a set of messages takes: a model of a cluster's links, in SI units.

Every rank has a network card of its own and a faster path to the other ranks of its host. Both carry `bandwidth` bytes
per second each way at once, so a rank has four links: out and in, over the card and inside the host. Messages that are
under way together take as long as the busiest link needs for its share,

    time of a set = max over ranks and links of (bytes / bandwidth + overhead * messages) + latency * rounds,

where `rounds` counts the messages in a row of which each waits for the one before. Sets that follow one another add up.
Where lane copies are made of what has arrived, chunk by chunk, both sets are under way together but for one chunk: with
transfers that alone take S, copies that alone take C and k chunks, max(both together, S + C / k, S / k + C). These are
two rounds: no chunk waits for another one's copies.

Where it idealises: the network and the switch of a host have no other limit than the ranks' own links (no
oversubscription, no congestion, no slow peer); packing, local copies, the host's own work and waiting for the device
cost nothing; bandwidth does not depend on the size of a message, nor on the other path of the same rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .._extension import _C

NIC, HOST, STAYS = "nic", "host", "stays"


class Transfer(NamedTuple):
    """What one rank sends to another in one phase: `size` bytes in `messages` messages."""

    sender: int
    receiver: int
    size: int
    messages: int = 1


@dataclass(frozen=True)
class Links:
    """The links of every rank.

    Args:
        nic: bytes per second of a rank's network card, each way.
        host: bytes per second between ranks of one host, each way.
        latency: seconds until a message of no bytes has arrived.
        overhead: seconds that each message keeps a link of its sender and of its receiver busy, besides its bytes.
        ranks_per_host: consecutive ranks on one host; 0: all ranks are on one host.

    Raises:
        ValueError: a bandwidth that is not positive, a negative time or number of ranks.
    """

    nic: float = 50e9
    host: float = 450e9
    latency: float = 5e-6
    overhead: float = 0.5e-6
    ranks_per_host: int = 8

    def __post_init__(self) -> None:
        for name in ("nic", "host"):
            if not getattr(self, name) > 0:
                raise ValueError(f"links: bandwidth {name} must be positive, got {getattr(self, name)}")
        for name in ("latency", "overhead", "ranks_per_host"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"links: {name} must not be negative, got {getattr(self, name)}")

    def core(self) -> _C.Links:
        """As a plan sees them when it chooses a path: in whole bytes per second and nanoseconds."""
        return _C.Links(
            nic=self.nic,
            host=self.host,
            latency=self.latency,
            overhead=self.overhead,
            ranks_per_host=self.ranks_per_host,
        )

    def host_of(self, rank: int) -> int:
        """The host that a rank is on."""
        return rank // self.ranks_per_host if self.ranks_per_host else 0

    def path(self, sender: int, receiver: int) -> str:
        """NIC, HOST, or STAYS for what a rank gives to itself."""
        if sender == receiver:
            return STAYS
        return HOST if self.host_of(sender) == self.host_of(receiver) else NIC

    def bandwidth(self, path: str) -> float:
        """Bytes per second, each way."""
        return self.nic if path == NIC else self.host


@dataclass(frozen=True)
class Phase:
    """Messages that are under way together; phases follow one another.

    Args:
        name: what they are for.
        transfers: the messages. What a rank gives to itself takes no time.
        copies: lane copies of what the transfers bring, made chunk by chunk.
        chunks: in how many chunks the copies follow the transfers.
        rounds: messages in a row of which each waits for the one before.
    """

    name: str
    transfers: tuple[Transfer, ...]
    copies: tuple[Transfer, ...] = ()
    chunks: int = 1
    rounds: int = 1

    @property
    def all(self) -> tuple[Transfer, ...]:
        return self.transfers + self.copies


class Load(NamedTuple):
    """What one link of one rank carries."""

    size: int = 0
    messages: int = 0


def loads_of(transfers: Iterable[Transfer], links: Links) -> dict[tuple[int, str, str], Load]:
    """What every link carries, by (rank, NIC | HOST | STAYS, "out" | "in"); links that carry nothing are left out."""
    loads: dict[tuple[int, str, str], Load] = {}
    for transfer in transfers:
        path = links.path(transfer.sender, transfer.receiver)
        for rank, way in ((transfer.sender, "out"), (transfer.receiver, "in")):
            size, messages = loads.get((rank, path, way), Load())
            loads[rank, path, way] = Load(size + transfer.size, messages + transfer.messages)
    return loads


def busiest(transfers: Iterable[Transfer], links: Links) -> float:
    """Seconds that the busiest link is busy; no latency."""
    return max(
        (
            load.size / links.bandwidth(path) + links.overhead * load.messages
            for (_, path, _), load in loads_of(transfers, links).items()
            if path != STAYS
        ),
        default=0.0,
    )


def time_of(phases: Sequence[Phase], links: Links) -> float:
    """Seconds that the phases take, one after the other."""
    return sum(_time_of_phase(phase, links) for phase in phases)


def _time_of_phase(phase: Phase, links: Links) -> float:
    if all(links.path(transfer.sender, transfer.receiver) == STAYS for transfer in phase.all):
        return 0.0
    sending, copying = busiest(phase.transfers, links), busiest(phase.copies, links)
    together = busiest(phase.all, links)
    chunks = phase.chunks
    return max(together, sending + copying / chunks, sending / chunks + copying) + links.latency * phase.rounds
