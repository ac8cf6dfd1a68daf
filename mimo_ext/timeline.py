"""What every rank did in a training step, and when: compute, transfers, and what of them the ranks had to wait for.

    recorder = mimo_ext.timeline.Recorder("encoder", bridge)
    with recorder.compute("forward", microbatch=0):
        y = encoder(x)
    bridge.send_forward(y)
    ...
    ranks = mimo_ext.timeline.gather(recorder.finish())    # collective; a list on rank 0, None on the others
    if ranks is not None:
        mimo_ext.timeline.draw(ranks, "step.png")
        mimo_ext.timeline.write_trace(ranks, "step.json")  # for chrome://tracing and ui.perfetto.dev

With `mimo_ext.megatron`, `communicator.start_trace()` and `communicator.finish_trace()` record a whole schedule.

All times are of `time.monotonic_ns()`, one clock for all processes of a host.
"""

from __future__ import annotations

import json
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ._bytes import gather_bytes

__all__ = ["COMPUTE", "RankTimeline", "Recorder", "Span", "draw", "gather", "split_waits", "summary", "write_trace"]

COMPUTE = ("forward", "backward", "other")
"""Kinds of spans in which a rank computes."""

_SEND_OF = {"recv_forward": "send_forward", "recv_backward": "send_backward"}
_NUM_SPANS = 65536
_SETTLE_S = 1.0


@dataclass(frozen=True)
class Span:
    """A time in which a rank did one thing.

    Attributes:
        kind: "forward", "backward" or "other" (compute); "transfer" (an operation of a link is under way); "wait" (the
            rank does nothing but wait for one), which `split_waits` divides into "exposed" and "idle".
        begin_ns, end_ns: on the clock `time.monotonic_ns`.
        microbatch: number within the recording, from 0; None where it does not apply.
        link: what is transferred over, e.g. "images -> language".
        operation: "send_forward", "recv_forward", "send_backward" or "recv_backward".
        num_bytes: this rank's share of the transfer.
    """

    kind: str
    begin_ns: int
    end_ns: int
    microbatch: int | None = None
    link: str = ""
    operation: str = ""
    num_bytes: int | None = None


@dataclass
class RankTimeline:
    """The spans of one rank.

    Attributes:
        rank: global rank.
        label: what it is, e.g. "language, stage 1".
        begin_ns, end_ns: of the recording.
        spans: in no particular order.
    """

    rank: int
    label: str
    begin_ns: int
    end_ns: int
    spans: list[Span] = field(default_factory=list)

    def seconds(self, *kinds: str) -> float:
        """Time spent in spans of these kinds; what two of them share counts once."""
        covered, end = 0, self.begin_ns
        for span in sorted((s for s in self.spans if s.kind in kinds), key=lambda s: s.begin_ns):
            covered += max(0, span.end_ns - max(span.begin_ns, end))
            end = max(end, span.end_ns)
        return covered / 1e9


class Recorder:
    """Records what this rank does, from its construction to `finish()`.

    Args:
        label: what this rank is.
        bridges: `mimo_ext.Bridge` objects whose transfers and waits are recorded. Their traces start anew.
    """

    def __init__(self, label: str, *bridges: Any) -> None:
        self._label = label
        self._bridges = bridges
        self._spans: list[Span] = []
        self._sends = [_sends(bridge) for bridge in bridges]
        for bridge in bridges:
            bridge.start_trace(capacity=_NUM_SPANS)
        self._begin_ns = time.monotonic_ns()

    @contextmanager
    def compute(self, kind: str, microbatch: int | None = None) -> Iterator[None]:
        """What runs in the block is compute of this kind ("forward", "backward" or "other")."""
        if kind not in COMPUTE:
            raise ValueError(f"kind: expected one of {COMPUTE}, got {kind!r}")
        begin = time.monotonic_ns()
        try:
            yield
        finally:
            self.add(Span(kind, begin, time.monotonic_ns(), microbatch))

    def add(self, span: Span) -> None:
        """A span that the caller has measured."""
        self._spans.append(span)

    def finish(self) -> RankTimeline:
        """The recording; ends those of the bridges.

        Sends that are still under way are waited for, for a second at most; the recording ends before that.
        """
        end = time.monotonic_ns()
        spans = list(self._spans)
        for bridge, before in zip(self._bridges, self._sends, strict=True):
            spans += spans_of(bridge.name, _settled_events(bridge, _sends(bridge) - before))
            bridge.start_trace(capacity=0)
        rank = dist.get_rank() if dist.is_initialized() else 0
        return RankTimeline(rank, self._label, self._begin_ns, end, spans)


def _sends(bridge: Any) -> int:
    return sum(int(counts["sends"]) for counts in bridge.telemetry().values())


def _settled_events(bridge: Any, sends: int) -> list[Mapping[str, Any]]:
    """The events of a bridge, when all of its `sends` have ended. A peer is told of a tensor before its sender is."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        events: list[Mapping[str, Any]] = bridge.trace_events()
        ended = sum(event["operation"].startswith("send") for event in events)
        if ended >= min(sends, _NUM_SPANS // 2) or time.monotonic() > deadline:
            return events
        time.sleep(0.002)


def spans_of(link: str, events: Iterable[Mapping[str, Any]]) -> list[Span]:
    """The transfers and waits of one bridge, from its `trace_events()`; microbatches are numbered anew, from 0."""
    spans: list[Span] = []
    first: dict[str, int] = {}
    for event in sorted(events, key=lambda event: int(event["microbatch"])):
        operation = event["operation"]
        number = event["microbatch"] - first.setdefault(operation, event["microbatch"])
        # A send counts from when it was handed in, a receive from when there was something to receive.
        begin = event["started_ns"] if operation.startswith("recv") else event["posted_ns"]
        about = Span("transfer", begin, event["done_ns"], number, link, operation, event["bytes"])
        spans.append(about)
        if event["wait_begin_ns"]:
            spans.append(replace(about, kind="wait", begin_ns=event["wait_begin_ns"], end_ns=event["wait_end_ns"]))
    return spans


def gather(mine: RankTimeline, dst: int = 0, group: dist.ProcessGroup | None = None) -> list[RankTimeline] | None:
    """The recordings of all ranks, in the order of the ranks, on rank `dst`; None on the others. Collective.

    Hosts have clocks of their own: those of other hosts are set to that of `dst` by the moment at which a barrier let
    all ranks go, which is good to a fraction of a millisecond.
    """
    dist.barrier(group=group)
    host, now = socket.gethostname(), time.monotonic_ns()
    # As JSON: nothing that comes from a peer is unpickled.
    gathered = gather_bytes(json.dumps([host, now, asdict(mine)]).encode(), dst, group)
    if gathered is None:
        return None
    ranks: list[RankTimeline] = []
    for its_host, its_now, about in map(json.loads, gathered):
        found = RankTimeline(**{**about, "spans": [Span(**span) for span in about["spans"]]})
        ranks.append(found if its_host == host else _shifted(found, now - its_now))
    return ranks


def _shifted(timeline: RankTimeline, by_ns: int) -> RankTimeline:
    spans = [replace(s, begin_ns=s.begin_ns + by_ns, end_ns=s.end_ns + by_ns) for s in timeline.spans]
    return replace(timeline, begin_ns=timeline.begin_ns + by_ns, end_ns=timeline.end_ns + by_ns, spans=spans)


def split_waits(ranks: Sequence[RankTimeline]) -> list[RankTimeline]:
    """The same with every "wait" divided into "idle" and "exposed", and transfers as long as both sides take part.

    A rank that waits for a tensor is idle until its senders have handed it in: they are still computing, and no faster
    link would help. From then on the transfer is exposed. All waiting within a send is exposed. A receive begins at the
    earliest when its first sender has handed in; a send, whose end its rank may notice late, ends when the last
    receiver has the tensor.
    """
    handed_in: dict[Any, list[int]] = defaultdict(list)
    arrived: dict[Any, list[int]] = defaultdict(list)
    for timeline in ranks:
        for span in timeline.spans:
            if span.kind == "transfer" and span.operation in _SEND_OF:
                arrived[span.link, _SEND_OF[span.operation], span.microbatch].append(span.end_ns)
            elif span.kind == "transfer":
                handed_in[span.link, span.operation, span.microbatch].append(span.begin_ns)
    return [
        replace(timeline, spans=[part for span in timeline.spans for part in _split(span, handed_in, arrived)])
        for timeline in ranks
    ]


def _split(span: Span, handed_in: dict[Any, list[int]], arrived: dict[Any, list[int]]) -> list[Span]:
    if span.kind not in ("wait", "transfer"):
        return [span]
    senders = handed_in.get((span.link, _SEND_OF.get(span.operation), span.microbatch), [])
    if span.kind == "transfer" and span.operation in _SEND_OF:
        begin = min(max(span.begin_ns, min(senders, default=span.begin_ns)), span.end_ns)
        return [replace(span, begin_ns=begin)]
    if span.kind == "transfer":
        receivers = arrived.get((span.link, span.operation, span.microbatch), [])
        end = max(min(span.end_ns, max(receivers, default=span.end_ns)), span.begin_ns)
        return [replace(span, end_ns=end)]
    ready = min(max(span.begin_ns, max(senders, default=span.begin_ns)), span.end_ns)
    parts = [replace(span, kind="idle", end_ns=ready), replace(span, kind="exposed", begin_ns=ready)]
    return [part for part in parts if part.end_ns > part.begin_ns]


def summary(ranks: Sequence[RankTimeline]) -> list[dict[str, Any]]:
    """Per rank: its seconds of compute, of transfers, of waits that are exposed and idle, and of the whole recording.

    A rank's transfers may run at the same time, and while it computes.
    """
    return [
        {
            "rank": timeline.rank,
            "label": timeline.label,
            "total_s": (timeline.end_ns - timeline.begin_ns) / 1e9,
            "compute_s": timeline.seconds(*COMPUTE),
            "transfer_s": timeline.seconds("transfer"),
            "exposed_s": timeline.seconds("exposed"),
            "idle_s": timeline.seconds("idle"),
        }
        for timeline in split_waits(ranks)
    ]


def draw(ranks: Sequence[RankTimeline], path: Path | str, title: str | None = None) -> None:
    """Draw one training step as a PNG: a row per rank with its compute, its transfers below, its waits in between.

    Needs matplotlib. The folder is made where it is missing.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no ranks.
    """
    from mimo_ext._timeline_picture import draw as draw_picture

    if not ranks:
        raise ValueError("ranks: expected one timeline or more, got none")
    draw_picture(split_waits(ranks), Path(path), title)


def write_trace(ranks: Sequence[RankTimeline], path: Path | str) -> None:
    """Write the spans as JSON in Chrome's trace format, with a process per rank. The folder is made where missing."""
    start = min((timeline.begin_ns for timeline in ranks), default=0)
    tracks = ("compute and waits", "forward transfers", "backward transfers")
    events: list[dict[str, Any]] = []
    for timeline in split_waits(ranks):
        about = {"ph": "M", "pid": timeline.rank}
        events.append({**about, "name": "process_name", "args": {"name": f"rank {timeline.rank}: {timeline.label}"}})
        events.append({**about, "name": "process_sort_index", "args": {"sort_index": timeline.rank}})
        events += [
            {**about, "name": "thread_name", "tid": tid, "args": {"name": track}} for tid, track in enumerate(tracks)
        ]
        for span in sorted(timeline.spans, key=lambda s: s.begin_ns):
            track = 0 if span.kind != "transfer" else 2 if span.operation.endswith("backward") else 1
            what = span.operation if track else f"{span.kind} {span.link}".strip()
            arguments = {"microbatch": span.microbatch, "link": span.link, "bytes": span.num_bytes}
            events.append(
                {
                    "name": what if span.microbatch is None else f"{what} {span.microbatch}",
                    "cat": span.kind,
                    "ph": "X",
                    "pid": timeline.rank,
                    "tid": track,
                    "ts": (span.begin_ns - start) / 1e3,
                    "dur": (span.end_ns - span.begin_ns) / 1e3,
                    "args": {key: value for key, value in arguments.items() if value not in (None, "")},
                }
            )
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
