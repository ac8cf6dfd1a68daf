"""Bridges that are set up together: one agreement of the ranks for all of them, and shared connections."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

import torch.distributed as dist

from ._agreement import Meeting
from ._groups import Connection, connect, connected_ranks
from ._transports import choose

if TYPE_CHECKING:
    from .bridge import Bridge


class Setup:
    """Where several bridges begin, the ranks meet once, and bridges between the same ranks share their connections.

    Every rank makes the same bridges in the same order inside the block; they can be used after it.

        with Setup("encoders") as setup:
            images = Bridge(vision, language, setup=setup)
            audio = Bridge(speech, language, setup=setup)

    Args:
        name: for messages.
        ranks: that take part, in the same order on all of them; default: all.
        timeout: how long to wait for the other ranks, at least; the timeout of the default process group where that
            is longer.

    Raises:
        ValueError: the ranks describe different bridges, or one of them raised inside its block; on all others.
        RuntimeError: ranks that do not come in time; they are named.
    """

    def __init__(
        self, name: str = "bridges", ranks: Sequence[int] | None = None, timeout: timedelta | None = None
    ) -> None:
        self._meeting = Meeting(name, ranks, timeout)
        self._bridges: list[tuple[Bridge, str]] = []

    @property
    def ranks(self) -> Sequence[int]:
        """That take part."""
        return self._meeting.ranks

    @property
    def description(self) -> list[str]:
        """What all ranks must agree on: one line per bridge."""
        return [text for _, text in self._bridges]

    def add(self, bridge: Bridge, text: str) -> None:
        """A bridge that is to be connected, and all that must be equal on every rank."""
        self._bridges.append((bridge, text))

    def compare(self, text: str) -> list[tuple[list[int], str]] | None:
        """Collective, once: None where every rank gives this text; else the ranks that gave each, and the text."""
        return self._meeting.compare(text)

    def agree(self, refusal: BaseException | None = None) -> None:
        """Collective: ValueError unless the bridges are the same on every rank.

        Args:
            refusal: this rank's own error, which the others get to hear; raise it after the call.
        """
        lines = [f"refused: {refusal}"] if refusal is not None else self.description
        given = self.compare(json.dumps(lines))
        if given is None or refusal is not None:
            return
        # All ranks name the same two: the first rank, and the first that differs from it.
        (first, expected), (other, got) = [(ranks[0], json.loads(text)) for ranks, text in given[:2]]
        count = max(len(expected), len(got))
        for lines in (expected, got):
            lines += ["nothing"] * (count - len(lines))
        one, another = next(pair for pair in zip(expected, got, strict=True) if pair[0] != pair[1])
        raise ValueError(
            f"{self._meeting.what}, rank {self._meeting.rank}: the ranks describe different bridges: "
            f"expected (rank {first}) {one!r}, got (rank {other}) {another!r}"
        )

    def connect(self) -> None:
        """After the agreement: make the process groups, and open the bridges."""
        bridges, self._bridges = self._bridges, []
        try:
            transports = choose(
                self._meeting,
                [(bridge.name, bridge.device, bridge._asked_transport, bridge._ranks) for bridge, _ in bridges],
            )
            connected = [
                Connection(
                    connected_ranks(bridge._source, bridge._destination, bridge.rank),
                    f"bridge '{bridge.name}'",
                    bridge.device if transport == "nccl" else None,
                )
                for (bridge, _), transport in zip(bridges, transports, strict=True)
            ]
            found = zip(bridges, transports, connect(self._meeting, connected), strict=True)
            for (bridge, text), transport, groups in found:
                bridge._connect(groups, f"{text} {transport}", transport)
        except BaseException:
            for bridge, _ in bridges:
                bridge.close(abort=True)
            raise

    def __enter__(self) -> Setup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Exception):
            self.agree(error)
        if error is None:
            self.connect()


def refuse_bridge(name: str, error: Exception, group: dist.ProcessGroup | None = None) -> None:
    """Collective: what a rank calls in place of the constructor of `Bridge` that the others are in.

    Their constructors raise ValueError with the text of `error`; this rank raises its own error after the call.
    """
    Setup(f"bridge '{name}'", ranks_of(group)).agree(error)


def ranks_of(group: dist.ProcessGroup | None) -> list[int] | None:
    """Of a process group; None stands for all ranks."""
    return None if group is None else dist.get_process_group_ranks(group)
