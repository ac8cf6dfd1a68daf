"""What planning costs, what large layouts put on their links, and what set-up takes.

    python benchmarks/bench_plan.py [--quick] [--json FILE] [--details FILE] [--tables docs/scale.md]
        [--measured RECORDS] [--only planning traffic set-up]

* planning: seconds to plan one rank's messages of one microbatch, in worlds of 8 to 131,072 ranks. Measured, in this
  process (processor time).
* traffic: bytes per network card, rounds and time of layouts of up to 1,024 ranks, ours against leader + broadcast. The
  plan's own messages, put through the model of `python -m mimo_ext plan` (its --help states it): nothing is measured.
* set-up: process groups, threads and seconds of Megatron-Core's released classes and of ours, on eight gloo ranks of
  this machine, interleaved.

--json writes what all benchmarks write: records of the same keys, null where they do not apply. --details writes them
with figures of their own beside: `seconds_*`, `messages`, `ranks`, and those of each direction. The tables are made of
these: `--from FILE` makes them of details that were written before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from busy import BUSY_LIMIT
from plan_cases import QUICK_REPEATS, QUICK_WORLDS, REPEATS, WORLDS, planning, traffic
from plan_check import check_table
from plan_records import write_json
from plan_setup import setup
from plan_tables import TABLES, tables, write_tables
from records import KEYS, read_json

from mimo_ext.planning import Links

SETUP_REPEATS, QUICK_SETUP_REPEATS = 9, 5


def measure(only: Sequence[str], quick: bool) -> list[dict[str, Any]]:
    """All records asked for."""
    parts = {
        "planning": lambda: planning(QUICK_WORLDS if quick else WORLDS, QUICK_REPEATS if quick else REPEATS),
        "traffic": lambda: traffic(Links()),
        "set-up": lambda: setup(QUICK_SETUP_REPEATS if quick else SETUP_REPEATS),
    }
    records = []
    for name in only:
        part = list(parts[name]())
        records += part
        print(tables(part)[name], flush=True)
        busy = max(item["busy"] or 0.0 for item in part)
        if busy > BUSY_LIMIT:
            print(f"{name}: other work used {busy:.0%} of the machine meanwhile\n", flush=True)
    return records


def part_of(item: dict[str, Any]) -> str:
    """Which part of the benchmark a record is of."""
    return next(name for name in TABLES if item["name"].startswith(name))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer worlds and repeats")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records")
    parser.add_argument(
        "--details", type=Path, metavar="FILE", help="write the records in full; keeps those of parts not in --only"
    )
    parser.add_argument("--tables", type=Path, metavar="FILE", help="write the tables between their marks in a page")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="default: all")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="details to read: nothing is measured")
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="bench_bridge.py's records: --tables compares the model with them"
    )
    options = parser.parse_args(arguments)
    try:
        if options.source is not None:
            records = json.loads(options.source.read_text())
        else:
            records = measure(options.only, options.quick)
            if options.details is not None and len(options.only) < len(TABLES) and options.details.exists():
                kept = [item for item in json.loads(options.details.read_text()) if part_of(item) not in options.only]
                records = sorted([*kept, *records], key=lambda item: TABLES.index(part_of(item)))
        if options.json is not None:
            write_json([{key: item[key] for key in KEYS} for item in records], options.json)
        if options.details is not None:
            write_json(records, options.details)
        if options.tables is not None:
            made = tables(records)
            if options.measured is not None:
                made["emulation"] = check_table(read_json(options.measured))
            write_tables(options.tables, made)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"bench_plan: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
