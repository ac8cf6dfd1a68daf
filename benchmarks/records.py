"""What the benchmarks report: a list of records, the same for all of them, as JSON and as a table."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """One method on one case. What does not apply is None.

    Attributes:
        name: of the case, e.g. "transfer" or "steady-1f1b".
        layout: source and destination, e.g. "tp2dp2-tp4".
        bytes: of the boundary tensor of the global microbatch.
        method: "replicated" or "sharded", with a suffix where needed.
        ratio_median, ratio_lo, ratio_hi: time of the released class / time of the method, in pairs that were measured
            one after the other: median, smallest and largest. Above 1, the method is faster.
        efficiency: the time that the links need at least / median time of the method; 1 is the limit.
        repeats: number of pairs.
        busy: share of the machine, 0 to 1, that other work has used meanwhile.
    """

    name: str
    layout: str | None
    bytes: int | None
    method: str
    ratio_median: float | None
    ratio_lo: float | None
    ratio_hi: float | None
    efficiency: float | None
    repeats: int | None
    busy: float | None


KEYS = tuple(field.name for field in fields(Record))
_TEXTS = ("name", "layout", "method")
_COUNTS = ("bytes", "repeats")


@dataclass(frozen=True)
class Measurement:
    """A record and the times behind it, in seconds (medians), for the table."""

    record: Record
    released_s: float | None = None
    method_s: float | None = None


def measurement(
    name: str,
    layout: str,
    num_bytes: int | None,
    method: str,
    *,
    released_s: Sequence[float],
    method_s: Sequence[float],
    bound_s: float | None,
    busy: float | None,
) -> Measurement:
    """From the paired times of the released class and of the method, in seconds.

    Raises:
        ValueError: no pairs, or times that are not positive.
    """
    if not released_s or len(released_s) != len(method_s):
        raise ValueError(f"{name} {layout}: expected pairs of times, got {len(released_s)} and {len(method_s)}")
    if min(*released_s, *method_s) <= 0:
        raise ValueError(f"{name} {layout}: expected positive times, got {released_s} and {method_s}")
    ratios = [theirs / mine for theirs, mine in zip(released_s, method_s, strict=True)]
    median = statistics.median(method_s)
    return Measurement(
        Record(
            name=name,
            layout=layout,
            bytes=num_bytes,
            method=method,
            ratio_median=round(statistics.median(ratios), 3),
            ratio_lo=round(min(ratios), 3),
            ratio_hi=round(max(ratios), 3),
            efficiency=None if bound_s is None else round(bound_s / median, 3),
            repeats=len(ratios),
            busy=None if busy is None else round(busy, 3),
        ),
        statistics.median(released_s),
        median,
    )


def write_json(records: Sequence[Record], file: Path) -> None:
    """One record per line, in the order given."""
    lines = ",\n".join("  " + json.dumps(asdict(record)) for record in records)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"[\n{lines}\n]\n" if records else "[]\n")


def read_json(file: Path) -> list[Record]:
    """What `write_json` wrote, checked.

    Raises:
        ValueError: keys that are missing or unknown, or values of another type; names the file and the record.
    """
    data = json.loads(file.read_text())
    if not isinstance(data, list):
        raise ValueError(f"{file}: expected a list of records, got {type(data).__name__}")
    return [_checked(item, f"{file}, record {index}") for index, item in enumerate(data)]


def _checked(item: Any, where: str) -> Record:
    if not isinstance(item, dict) or set(item) != set(KEYS):
        raise ValueError(f"{where}: expected the keys {list(KEYS)}, got {item!r}")
    for key, value in item.items():
        if value is None and key not in ("name", "method"):
            continue
        if key in _TEXTS:
            good = isinstance(value, str)
        elif key in _COUNTS:
            good = type(value) is int and value >= 0
        else:
            good = type(value) in (int, float) and math.isfinite(value)
        if not good:
            raise ValueError(f"{where}: {key}: got {value!r}")
    return Record(**item)


def size_text(num_bytes: int | None) -> str:
    """1536 -> "1.5 KiB"."""
    if num_bytes is None:
        return "-"
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:g} {unit}"
    return f"{num_bytes} B"


def table(measurements: Sequence[Measurement]) -> str:
    """Lines of equal columns: released and method times, the ratio with its range, the link efficiency."""
    head = ("case", "layout", "payload", "method", "released", "ours", "ratio", "lo .. hi", "efficiency", "busy")
    return _columns([head, *(_row(item) for item in measurements)], left=4)


def _columns(rows: Sequence[tuple[str, ...]], left: int) -> str:
    """Text of equal columns, the first `left` of them to the left; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def memory_table(measurements: Sequence[Measurement]) -> str:
    """Lines of equal columns for passes over memory: the opponent's time, ours, the ratio with its range."""
    head = ("case", "dtype", "bytes", "opponent", "ours", "ratio", "lo .. hi", "busy")
    rows = [_row(item) for item in measurements]
    return _columns([head, *((row[0], row[3], row[2], *row[4:8], row[9]) for row in rows)], left=3)


def slower(records: Sequence[Record], limit: float = 0.97) -> list[str]:
    """Cases and methods that lose to the released class: their smallest ratio is below `limit`."""
    return [
        f"{record.name} {record.layout} {size_text(record.bytes)} {record.method}"
        for record in records
        if record.ratio_lo is not None and record.ratio_lo < limit
    ]


def _row(item: Measurement) -> tuple[str, ...]:
    record = item.record

    def number(value: float | None, digits: int = 2, unit: str = "") -> str:
        return "-" if value is None else f"{value:.{digits}f}{unit}"

    span = "-" if record.ratio_lo is None else f"{number(record.ratio_lo)} .. {number(record.ratio_hi)}"
    return (
        record.name,
        record.layout or "-",
        size_text(record.bytes),
        record.method,
        _time_text(item.released_s),
        _time_text(item.method_s),
        number(record.ratio_median, unit="x"),
        span,
        number(record.efficiency),
        number(record.busy),
    )


def _time_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
