"""Planning cost per rank in worlds of any size, and what crosses the links of large layouts.

Planning is one thread's computing and waits for nothing: its cost is processor time, which other work does not stretch.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from plan_records import BusyMeter, record

from mimo_ext import Layout, Plan
from mimo_ext.planning import Edge, Links, Traffic, leader_broadcast, planned

WORLDS = (8, 64, 512, 4096, 32768, 131072)
QUICK_WORLDS = (8, 4096, 131072)
PROBES = 12  # ranks of a world that are timed, evenly spread over both sides
REPEATS = 7
QUICK_REPEATS = 3
ROWS, HIDDEN = 4096, 8192  # of a sample: 64 MiB in bfloat16


def layout_text(layout: Layout) -> str:
    """Such as "tp8cp4dp16"."""
    sizes = [f"{dim}{getattr(layout, dim)}" for dim in ("tp", "cp", "dp", "pp") if getattr(layout, dim) > 1]
    return "".join(sizes) or "tp1"


def edge_text(edge: Edge) -> str:
    """Such as "tp8dp64-tp8cp4dp16"."""
    return f"{layout_text(edge.source)}-{layout_text(edge.destination)}"


def make_edge(source: dict[str, int], destination: dict[str, int], **values: Any) -> Edge:
    """Two modules, one behind the other; one sample per lane of the wider side."""
    size = 1
    for extent in source.values():
        size *= extent
    other = 1
    for extent in destination.values():
        other *= extent
    src = Layout(range(size), name="source", **source)
    dst = Layout(range(size, size + other), name="destination", **destination)
    samples = values.pop("samples", max(len(src.lanes(-1)), len(dst.lanes(0))))
    return Edge(src, dst, samples, **{"rows": ROWS, "hidden": HIDDEN, **values})


# Planning cost


def equal(half: int) -> Edge:
    tp = min(8, half)
    return make_edge({"tp": tp, "dp": half // tp}, {"tp": tp, "dp": half // tp})


def fan_in_to_cp(half: int) -> Edge:
    tp = min(8, half)
    cp = min(4, half // tp)
    return make_edge({"tp": tp, "dp": half // tp}, {"tp": tp, "cp": cp, "dp": half // tp // cp})


def fan_out(half: int) -> Edge:
    return make_edge({"tp": 4, "dp": half // 4}, {"tp": 1, "dp": half})


def unequal_lanes(half: int) -> Edge:
    """Lane counts of which neither divides the other."""
    n = half // 6
    return make_edge({"tp": 2, "dp": 3 * n}, {"tp": 3, "dp": 2 * n}, samples=6 * n)


def ragged(half: int) -> Edge:
    """Two samples per lane, each with its own number of rows."""
    tp = min(8, half)
    samples = 2 * (half // tp)
    rows = tuple(1 + 37 * sample % 4096 for sample in range(samples))
    return make_edge({"tp": tp, "dp": half // tp}, {"tp": tp, "dp": half // tp}, samples=samples, rows=rows)


FAMILIES: dict[str, Callable[[int], Edge]] = {
    "equal lanes": equal,
    "fan-in to CP lanes": fan_in_to_cp,
    "fan-out": fan_out,
    "3 lanes to 2": unequal_lanes,
    "ragged rows": ragged,
}


def planning(worlds: Sequence[int], repeats: int) -> Iterator[dict[str, Any]]:
    """One record per family and world: seconds to plan one rank's messages of one microbatch."""
    for family, make in FAMILIES.items():
        for world in worlds:
            if family == "3 lanes to 2" and world < 12:
                continue
            meter = BusyMeter()
            begin = time.thread_time()
            edge = make(world // 2)
            source, destination = edge.source.boundary(-1), edge.destination.boundary(0)
            seconds_layouts = time.thread_time() - begin
            microbatch = edge.microbatch()
            ranks = (*edge.source.ranks, *edge.destination.ranks)
            probes = sorted({ranks[index * (len(ranks) - 1) // (PROBES - 1)] for index in range(PROBES)})
            # What a bridge does once: everything that grows with the world.
            begin = time.thread_time()
            bridge_plan = Plan(source, destination, microbatch)
            seconds_bridge = time.thread_time() - begin
            bridge_plan.for_rank(probes[0])  # warm
            seconds, most = [], 0
            gc.disable()  # its cost is that of everything else in the process
            try:
                for _ in range(repeats):
                    for rank in probes:
                        begin = time.thread_time()
                        mine = bridge_plan.of(microbatch).for_rank(rank)
                        seconds.append(time.thread_time() - begin)
                        most = max(most, sum(map(len, mine.values())))
            finally:
                gc.enable()
            yield record(
                name="planning",
                layout=edge_text(edge),
                bytes=edge.size,
                method="replicated",
                repeats=len(seconds),
                busy=meter.share(),
                family=family,
                world=world,
                ranks=len(ranks),
                messages=most,
                seconds_median=statistics.median(seconds),
                seconds_lo=min(seconds),
                seconds_hi=max(seconds),
                seconds_layouts=seconds_layouts,
                seconds_bridge=seconds_bridge,
            )


# What crosses the links

TRAFFIC = (
    ({"tp": 8, "dp": 64}, {"tp": 8, "cp": 4, "dp": 16}),
    ({"tp": 8, "dp": 64}, {"tp": 8, "dp": 64}),
    ({"tp": 8, "dp": 64}, {"tp": 8, "dp": 8, "pp": 8}),
    ({"dp": 128}, {"tp": 8, "dp": 16}),
    ({"tp": 8}, {"tp": 8}),
)


def sharded(edge: Edge) -> Edge:
    """The same with a destination whose ranks receive only what they use: sequence-parallel and zigzag shards."""
    layout = edge.destination
    sizes = {dim: getattr(layout, dim) for dim in ("tp", "cp", "dp", "pp")}
    placement = "zigzag" if layout.cp > 1 else "replicated"
    return replace(
        edge,
        destination=Layout(
            layout.ranks, **sizes, name=layout.name, cp_placement=placement, sequence_parallel=layout.tp > 1
        ),
    )


def traffic(links: Links) -> Iterator[dict[str, Any]]:
    """One record per layout and delivery: both directions, by the plan and by leader + broadcast."""
    for source, destination in TRAFFIC:
        replicated = make_edge(source, destination)
        leaders = [leader_broadcast(replicated, links, backward) for backward in (False, True)]
        for method, edge in (("replicated", replicated), ("sharded", sharded(replicated))):
            ours = [planned(edge, links, backward) for backward in (False, True)]
            ratio = sum(t.seconds for t in leaders) / sum(t.seconds for t in ours)
            yield record(
                name="traffic",
                layout=edge_text(edge),
                bytes=edge.size,
                method=f"{method}-modelled",
                ratio_median=ratio,
                ratio_lo=min(theirs.seconds / mine.seconds for theirs, mine in zip(leaders, ours, strict=True)),
                ratio_hi=max(theirs.seconds / mine.seconds for theirs, mine in zip(leaders, ours, strict=True)),
                efficiency=min(t.efficiency or 0.0 for t in ours),
                ranks=edge.source.size + edge.destination.size,
                refused_by_released=edge.refused_by_released(),
                forward=_figures(ours[0]),
                backward=_figures(ours[1]),
                leader_forward=_figures(leaders[0]),
                leader_backward=_figures(leaders[1]),
            )


def _figures(traffic: Traffic) -> dict[str, Any]:
    """All but the single ranks."""
    return {key: value for key, value in traffic.as_dict().items() if key not in ("ranks", "method", "efficiency")}
