"""What a bridge tells about what it has done and does."""

from __future__ import annotations

from typing import Any

from ._arguments import checked_int
from ._extension import _C


class Observed:
    """Counters, traces and the flight recorder of a bridge."""

    name: str
    rank: int
    _open: _C.Communicator

    def telemetry(self) -> dict[str, dict[str, float]]:
        """What this rank has moved so far, for "forward" and "backward" each. Always counted, at no measurable cost.

        `sends`, `receives`: operations; `bytes_sent`, `bytes_received`: payload, with the copies between the ranks of
        a lane; `transfer_s`: seconds from the start of each receive (its header has come; static shapes: it was
        posted) to its end; `exposed_s`: seconds for which the caller was blocked in a receive.
        """
        sides = {"forward": True, "backward": False}
        return {side: self._open.counters(forward) for side, forward in sides.items()}

    def start_trace(self, capacity: int = 10_000) -> None:
        """Record the next operations; the last `capacity` are kept. 0 ends recording."""
        where = f"bridge '{self.name}', rank {self.rank}: start_trace"
        self._open.start_trace(checked_int(where, "capacity", capacity, 0))

    def trace_events(self) -> list[dict[str, Any]]:
        """What was recorded, in the order in which operations ended.

        Each is a dict of `operation` ("send_forward", ...), `microbatch`, `bytes`, and the times `posted_ns`,
        `started_ns` (as in `telemetry`), `done_ns`, `wait_begin_ns` and `wait_end_ns` (0 where nobody waited) on the
        clock of `time.monotonic_ns`, which is one for all processes of a host. A receive is recorded when it has been
        waited for.
        """
        return self._open.trace_events()

    def flight(self) -> dict[str, Any]:
        """The flight recorder: the last 256 operations of this bridge on this rank. Always on; see `mimo_ext.flight`.

        A dict of `entries`, the oldest first, and `caller`. Each entry is a dict of `id` (counts from 1), `operation`
        ("send_forward", ...), `microbatch`, `bytes` (payload; 0 while it is not known), `state`, `waits_for` ("header
        from", "payload from", "lane copy to", ... or None), `peer` (the rank, or None), `posted_ns` and `since_ns`
        (when it began to wait for that, or ended) on the clock of `time.monotonic_ns`. States: "posted" (nobody waits
        for it yet), "header", "receiving", "sending", "done" and "failed".

        `caller` is None unless a call is under way: a dict of `operation`, `microbatch` (None where the call waits for
        several) and `since_ns`. A "send_..." stands for a handle that is waited for, or (microbatch None) for a send
        while as many microbatches as may be are in flight.
        """
        return self._open.flight()
