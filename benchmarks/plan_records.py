"""The records of bench_plan.py: what all benchmarks report, and figures of their own beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from busy import machine_usage, other_share, process_usage
from records import KEYS, Record


def record(**values: Any) -> dict[str, Any]:
    """A record with every key of `records.Record` (None where it does not apply), then its own."""
    common = Record(**{key: values.pop(key, None) for key in KEYS})
    return {**asdict(common), **values}


def write_json(records: Sequence[dict[str, Any]], file: Path) -> None:
    """One record per line, figures to four digits."""
    lines = ",\n".join("  " + json.dumps(_rounded(item)) for item in records)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"[\n{lines}\n]\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


class BusyMeter:
    """Share of the machine that other programs have used since this was made."""

    def __init__(self) -> None:
        self._machine, self._process = machine_usage(), process_usage()

    def share(self) -> float:
        """0 to 1."""
        return other_share(machine_usage() - self._machine, [process_usage() - self._process])
