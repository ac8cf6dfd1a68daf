"""The command `python -m mimo_ext flight`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._flight_report import Flight, report, report_dict
from .flight import table

DESCRIPTION = """\
Merge the flight recorders of all ranks of a job and say which rank waits for which: through which operation of which
bridge and microbatch, in cycles or down to the rank that all others wait for, and which ranks left no file.
"""
EPILOG = """\
A rank writes its file when a bridge fails while MIMO_EXT_FLIGHT_DIR names a folder, and when a signal comes while
mimo_ext.flight.dump_on_signal() is on. Dump all ranks before you judge: of a rank without a file nothing is known.

exit status: 0 no rank waits for another, 1 some do (or gave up), 2 the files cannot be read

example:
  pkill -USR1 -f train.py; sleep 1; python -m mimo_ext flight flight/
"""


def add_to(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to those of `python -m mimo_ext`."""
    parser = commands.add_parser(
        "flight",
        help="which rank waits for which, from the flight recorders of a job that hangs or failed",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="rank_N.json, or folders of them")
    parser.add_argument("--tables", action="store_true", help="also print what each rank did last")
    parser.add_argument(
        "--last", type=int, default=20, help="operations per bridge in the tables (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print who waits for whom as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry the command out; the exit status."""
    try:
        snapshots = [_read(path) for path in _files(options.files)]
        flight = Flight(snapshots)
        if options.json:
            text = json.dumps(report_dict(flight), indent=2)
        else:
            tables = [table(flight.ranks[rank], max(0, options.last)) for rank in sorted(flight.ranks)]
            text = "\n\n".join([*(tables if options.tables else []), report(flight)])
    except (OSError, ValueError) as error:
        print(f"mimo_ext flight: {error}", file=sys.stderr)
        return 2
    print(text)
    return 1 if flight.waiting() else 0


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("rank_*.json")) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"expected files rank_*.json in the folder {path}")
        found += [file for file in inside if file not in found]
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(found, dict) or not {"version", "rank", "bridges"} <= found.keys():
        raise ValueError(f"{path}: expected a dump of the flight recorder")
    return found
