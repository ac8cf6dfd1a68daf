"""The tables of docs/scale.md, made of bench_plan.py's records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimo_ext.planning.report import bytes_text, seconds_text

Record = dict[str, Any]
TABLES = ("planning", "traffic", "set-up")


def tables(records: Sequence[Record]) -> dict[str, str]:
    """Markdown by name of the table; tables without a record are left out."""
    made = {
        "planning": _planning([item for item in records if item["name"] == "planning"]),
        "traffic": _traffic([item for item in records if item["name"] == "traffic"]),
        "set-up": _setup([item for item in records if item["name"].startswith("set-up of ")]),
    }
    return {name: text for name, text in made.items() if text}


def write_tables(file: Path, made: dict[str, str]) -> None:
    """Put tables (by name) between their marks in a Markdown file.

    Raises:
        ValueError: a mark is missing.
    """
    text = file.read_text()
    for name, table in made.items():
        mark = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end of table -->)", re.DOTALL)
        if not mark.search(text):
            raise ValueError(f"{file}: there is no place '<!-- table: {name} -->' ... '<!-- end of table -->'")
        text = mark.sub(lambda found, table=table: f"{found[1]}{table}{found[2]}", text)
    file.write_text(text)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) if rows else ""


def _planning(records: Sequence[Record]) -> str:
    families = list(dict.fromkeys(item["family"] for item in records))
    worlds = sorted({item["world"] for item in records})
    found = {(item["family"], item["world"]): item for item in records}
    rows = []
    for family in families:
        cells = [found.get((family, world)) for world in worlds]
        # The widest world says what is planned; the smaller ones have fewer lanes of the same kind.
        rows.append([f"{family}: `{cells[-1]['layout']}`" if cells[-1] else family, *map(_cost, cells)])
    return _markdown(["layout of the largest world", *(f"{world:,} ranks" for world in worlds)], rows)


def _cost(item: Record | None) -> str:
    if item is None:
        return "-"
    return f"{seconds_text(item['seconds_median'])} ({seconds_text(item['seconds_hi'])}), {item['messages']:,}"


def _traffic(records: Sequence[Record]) -> str:
    head = [
        "layout, delivery",
        "payload",
        "messages",
        "busiest card, out",
        "busiest card, in",
        "all cards",
        "rounds",
        "forward",
        "backward",
        "against leader",
    ]
    rows, seen = [], set()
    for item in records:
        if item["layout"] not in seen:
            seen.add(item["layout"])
            refused = " (refused by the released class)" if item["refused_by_released"] else ""
            name = f"`{item['layout']}` leader + broadcast{refused}"
            rows.append(_way(name, item, item["leader_forward"], item["leader_backward"], "1"))
        method = item["method"].removesuffix("-modelled")
        name = f"`{item['layout']}` ours, {method}"
        rows.append(_way(name, item, item["forward"], item["backward"], f"{item['ratio_median']:.1f}x"))
    return _markdown(head, rows)


def _way(name: str, item: Record, forward: Record, backward: Record, ratio: str) -> list[str]:
    busiest = forward["busiest_rank_bytes"]
    return [
        name,
        bytes_text(item["bytes"]),
        f"{forward['messages']:,}",
        bytes_text(busiest["nic_out"]),
        bytes_text(busiest["nic_in"]),
        bytes_text(forward["bytes"]["nic"]),
        str(forward["rounds"]),
        seconds_text(forward["seconds"]),
        seconds_text(backward["seconds"]),
        ratio,
    ]


def _setup(records: Sequence[Record]) -> str:
    head = ["class, layout", "process groups", "threads per rank", "seconds", "released / ours", "other work"]
    rows = []
    for item in records:
        name = f"{item['name'].removeprefix('set-up of ')}, `{item['layout']}`"
        ratio = f"{item['ratio_median']:.2f}x ({item['ratio_lo']:.2f} .. {item['ratio_hi']:.2f})"
        rows.append([f"released {name}", *_effort(item["released"]), "", ""])
        rows.append([f"ours, {name}", *_effort(item["ours"]), ratio, f"{item['busy']:.0%}"])
    return _markdown(head, rows)


def _effort(summary: Record) -> list[str]:
    seconds = [seconds_text(summary[f"seconds_{key}"]) for key in ("median", "lo", "hi")]
    return [
        str(summary["process_groups"]),
        str(summary["threads"]),
        f"{seconds[0]} ({seconds[1]} .. {seconds[2]})",
    ]
