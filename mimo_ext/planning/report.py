"""The plan of an edge in words and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._extension import _C
from ..layout import PATHS
from .edge import Edge
from .links import HOST, NIC, STAYS, Links, Load
from .traffic import Traffic, leader_broadcast, planned

MAX_LINES = 32  # of the table of ranks


@dataclass(frozen=True)
class Comparison:
    """One direction of an edge: ours and the released way.

    Args:
        paths: modelled seconds of ours by path, whichever was taken.
    """

    direction: str
    ours: Traffic
    leader: Traffic
    paths: dict[str, float]

    @property
    def ratio(self) -> float | None:
        """How many times as long as ours the released way takes; None where nothing moves."""
        return self.leader.seconds / self.ours.seconds if self.ours.seconds else None


def compare(edge: Edge, links: Links, directions: Sequence[str], broadcast: str = "ring") -> list[Comparison]:
    """Both ways, for every direction ("forward", "backward") asked for."""
    return [
        Comparison(
            direction,
            planned(edge, links, direction == "backward"),
            leader_broadcast(edge, links, direction == "backward", broadcast),
            {path: planned(replace(edge, path=path), links, direction == "backward").seconds for path in PATHS[1:]},
        )
        for direction in directions
    ]


def bytes_text(size: float) -> str:
    """Such as "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def seconds_text(seconds: float) -> str:
    """Such as "12.5 us"."""
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 1000 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.2f} s"


def ratio_text(ratio: float | None) -> str:
    """Such as "4.5x"."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def edge_text(edge: Edge, links: Links) -> str:
    """The edge, its microbatch and the links, one line each."""
    kind = "ragged rows" if edge.ragged else f"{edge.rows} rows each"
    dtype = str(edge.dtype).removeprefix("torch.")
    hosts = f"{links.ranks_per_host} ranks per host" if links.ranks_per_host else "one host"
    return "\n".join(
        [
            f"source       {_side_text(edge.plan().source)}",
            f"destination  {_side_text(edge.plan().destination)}",
            f"microbatch   {edge.samples} samples, {kind}: {dtype} {list(edge.shape)}, {bytes_text(edge.size)}",
            f"links        {8e-9 * links.nic:g} Gbit/s per network card, {8e-9 * links.host:g} inside a host ({hosts}),"
            f" latency {1e6 * links.latency:g} us, {1e6 * links.overhead:g} us per message",
        ]
    )


def _side_text(boundary: _C.Boundary) -> str:
    def lane_text(lane: Sequence[int]) -> str:
        shown = [*map(str, lane[:7]), "...", str(lane[-1])] if len(lane) > 9 else map(str, lane)
        return f"[{' '.join(shown)}]"

    lanes = [lane_text(lane) for lane in boundary.lanes]
    if len(lanes) > 6:
        lanes = [*lanes[:3], f"... {len(lanes) - 4} more ...", lanes[-1]]
    held = f" {boundary.cp_placement}" if boundary.cp > 1 else ""
    parallel = " sequence parallel" if boundary.sequence_parallel else ""
    name = "" if boundary.module in ("source", "destination") else f"{boundary.module}: "
    count = f"{len(boundary.lanes)} lane{'s' if len(boundary.lanes) > 1 else ''}"
    return f"{name}tp={boundary.tp} cp={boundary.cp}{held}{parallel}, {count}: {' '.join(lanes)}"


def comparison_text(comparison: Comparison) -> str:
    """Totals of both ways side by side, then what every rank sends and receives by the plan."""
    ours, leader = comparison.ours, comparison.leader
    rows: list[tuple[str, str, str]] = [("", ours.method, leader.method)]
    rows.append(("rounds (messages that wait for one another)", str(ours.rounds), str(leader.rounds)))
    rows.append(("chunks", str(ours.chunks), str(leader.chunks)))
    rows.append(("messages", f"{ours.messages:,}", f"{leader.messages:,}"))
    for path, words in ((NIC, "network cards"), (HOST, "hosts")):
        rows.append((f"all bytes over {words}", bytes_text(ours.total(path)), bytes_text(leader.total(path))))
        for way, verb in (("out", "sent"), ("in", "received")):
            what = "network card" if path == NIC else "link in a host"
            rows.append(
                (
                    f"busiest {what}, {verb}",
                    bytes_text(ours.most(path, way)),
                    bytes_text(leader.most(path, way)),
                )
            )
    rows.append(("modelled time", seconds_text(ours.seconds), seconds_text(leader.seconds)))
    rows.append(("", f"{ratio_text(comparison.ratio)} as fast" if comparison.ratio else "nothing moves", ""))
    times = ", ".join(f"{path} {seconds_text(seconds)}" for path, seconds in comparison.paths.items())
    taken = " or ".join(ours.paths) or "none: nothing moves"
    lines = [comparison.direction, *_aligned(rows), "", f"  path: {taken}; modelled: {times}"]
    return "\n".join([*lines, "", *_ranks_text(ours)])


def _ranks_text(traffic: Traffic) -> list[str]:
    loads, ranks = traffic.loads(), traffic.part.ranks
    header = ("rank", "card out", "card in", "host out", "host in", "stays")
    keys = ((NIC, "out"), (NIC, "in"), (HOST, "out"), (HOST, "in"), (STAYS, "out"))
    rows = [
        (str(rank), *(bytes_text(size) if (size := loads.get((rank, *key), Load()).size) else "-" for key in keys))
        for rank in ranks[:MAX_LINES]
    ]
    lines = _aligned([header, *rows])
    if len(ranks) > MAX_LINES:
        lines.append(f"  ... and {len(ranks) - MAX_LINES} more ranks (--json lists them)")
    if traffic.part.groups > 1:
        lines.append(f"  the first of {traffic.part.groups} groups of lanes, which all do the same")
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """First column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def report_text(edge: Edge, links: Links, comparisons: Sequence[Comparison]) -> str:
    """All that the command prints."""
    parts = [edge_text(edge, links), *(comparison_text(comparison) for comparison in comparisons)]
    if len(comparisons) > 1:
        ours = sum(comparison.ours.seconds for comparison in comparisons)
        leader = sum(comparison.leader.seconds for comparison in comparisons)
        ratio = ratio_text(leader / ours) if ours else "-"
        parts.append(
            f"forward + backward: {seconds_text(ours)}, {seconds_text(leader)} by leader + broadcast: {ratio} as fast"
        )
    refused = edge.refused_by_released()
    if refused is not None:
        parts.append(
            f"Megatron-Core's released class refuses this layout ({refused}); leader + broadcast is what its way would "
            "cost here."
        )
    return "\n\n".join(parts)


def report_dict(edge: Edge, links: Links, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The same for a program: bytes, seconds, bytes per second."""
    return {
        "source": str(edge.plan().source),
        "destination": str(edge.plan().destination),
        "shape": list(edge.shape),
        "dtype": str(edge.dtype).removeprefix("torch."),
        "bytes": edge.size,
        "links": {
            "nic": links.nic,
            "host": links.host,
            "latency": links.latency,
            "overhead": links.overhead,
            "ranks_per_host": links.ranks_per_host,
        },
        "refused_by_released": edge.refused_by_released(),
        "directions": [
            {
                "direction": comparison.direction,
                "ratio": comparison.ratio,
                "path_seconds": comparison.paths,
                "ours": comparison.ours.as_dict(),
                "leader": comparison.leader.as_dict(),
            }
            for comparison in comparisons
        ],
    }
