"""The model of `python -m mimo_ext plan` against what bench_bridge.py has measured on the emulated cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from cases import BATCH, METHODS, SHARDED, Case, Side, parse_layout
from records import Record, size_text

from mimo_ext import Layout
from mimo_ext.planning import Edge, Links, leader_broadcast, planned

TITLE = """
### The model against the emulated cluster

How many times as fast as the released class: measured by `bench_bridge.py` (gloo over shaped links, see
`benchmarks/README.md`), and by the model with the same links, gloo's tree as the broadcast, no latency and no overhead.

"""
MODELLED = ("transfer", "one-host")  # families: single transfers of payloads that are not small


def edge_of(case: Case, method: str) -> tuple[Edge, Links]:
    """What a case of the emulated cluster moves, and over what."""
    rows, _, hidden = case.shape
    host = max(case.source.size, case.destination.size)  # each module has a host of its own
    sides = [
        _layout(case.source, 0, method),
        _layout(case.destination, case.source.size if case.one_host else host, method),
    ]
    edge = Edge(*sides, samples=BATCH, rows=rows, hidden=hidden, dtype=torch.bfloat16, ndim=3, batch_dim=1)
    rates = case.rates
    links = Links(rates.nic_bytes_per_s, rates.nvl_bytes_per_s, 0.0, 0.0, 0 if case.one_host else host)
    return edge, links


def _layout(side: Side, first: int, method: str) -> Layout:
    ranks = range(first, first + side.size)
    return Layout(ranks, tp=side.tp, dp=side.dp, sequence_parallel=method.startswith(SHARDED) and side.tp > 1)


def modelled_ratio(case: Case, method: str) -> float:
    """Time of leader + broadcast / time of ours, forward and backward."""
    edge, links = edge_of(case, method)
    whole, _ = edge_of(case, METHODS[0])  # the released class knows no shards
    leader, ours = (
        sum(way(*arguments, backward).seconds for backward in (False, True))
        for way, arguments in ((_leader, (whole, links)), (planned, (edge, links)))
    )
    return leader / ours


def _leader(edge: Edge, links: Links, backward: bool) -> Any:
    return leader_broadcast(edge, links, backward, "tree")


def check_table(measured: Sequence[Record]) -> str:
    """Markdown with a heading; empty where there is nothing to compare."""
    rows = []
    for item in measured:
        if item.name not in MODELLED or item.ratio_median is None or item.layout is None or item.bytes is None:
            continue
        case = Case(item.name, *parse_layout(item.layout), item.bytes, (item.method,))
        rows.append(
            f"| {item.name} `{item.layout}`, {size_text(item.bytes)}, {item.method} | {item.ratio_median:.2f}x "
            f"({item.ratio_lo:.2f} .. {item.ratio_hi:.2f}) | {modelled_ratio(case, item.method):.2f}x "
            f"| {'-' if item.busy is None else f'{item.busy:.0%}'} |\n"
        )
    head = "| case | measured | modelled | other work |\n| --- | ---: | ---: | ---: |\n"
    return f"{TITLE}{head}{''.join(rows)}\n" if rows else ""
