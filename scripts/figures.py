"""The performance figures in README.md and docs/speed.md, made of the records in benchmarks/results.

    python scripts/figures.py            check; exit status 1 where a page does not say what the records say
    python scripts/figures.py --write    write the figures anew, and draw the picture (`make figures`)

Records are what the benchmarks' --json writes (see benchmarks/README.md): bridge.json, host.json, training.json,
telemetry.json and plan.json. A page holds a block between `<!-- figures: NAME -->` and `<!-- end of figures -->` for
each of `BLOCKS` that it shows; nothing in there is typed by hand. Where there are no records yet, the block says so.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from records import Record, read_json, size_text, slower  # noqa: E402

PAGES = (ROOT / "README.md", ROOT / "docs" / "speed.md")
RESULTS = ROOT / "benchmarks" / "results"
MARKS = re.compile(r"<!-- figures: (?P<name>[a-z-]+) -->\n(?P<text>.*?)<!-- end of figures -->\n", re.DOTALL)
LIMIT = 0.97


def transfers(records: Sequence[Record]) -> str:
    """A line for each case, the two deliveries beside one another."""
    cases = dict.fromkeys((one.name, one.layout, one.bytes, _suffix(one)) for one in records)
    rows = []
    for name, layout, size, suffix in cases:
        row = [f"{name}{', static shapes' if suffix else ''}", f"`{layout}`", size_text(size)]
        for delivery in ("replicated", "sharded"):
            found = [
                one
                for one in records
                if (one.name, one.layout, one.bytes, one.method) == (name, layout, size, delivery + suffix)
            ]
            row += [_ratio(found[0]), _efficiency(found[0])] if found else ["", ""]
        rows.append(row)
    return _table(["case", "layout", "payload", "replicated", "links", "sharded", "links"], rows, left=3)


def each(records: Sequence[Record]) -> str:
    """A line for each record."""
    rows = [
        [one.name, f"`{one.layout}`", size_text(one.bytes), one.method, _ratio(one), _efficiency(one)]
        for one in records
    ]
    shown = [row if any(row[5] for row in rows) else row[:5] for row in rows]
    head = ["case", "layout", "payload", "method", "released / ours", "efficiency"][: len(shown[0])]
    return _table(head, shown, left=4)


def telemetry(records: Sequence[Record]) -> str:
    """A line for each record: what there is none of but the ratio."""
    names = {
        "off": "counters (no trace, no profiler)",
        "trace": "counters and a trace",
        "nothing": "none either: what cannot be told apart",
    }
    return _table(["telemetry", "none / this"], [[names[one.method], _ratio(one)] for one in records], left=1)


class Block(NamedTuple):
    """Which records a block shows, and how."""

    file: str
    takes: Callable[[Record], bool]
    make: Callable[[Sequence[Record]], str]


SMALL = ("small", "loopback")  # cases of a few KiB

BLOCKS = {
    "bridge": Block("bridge", lambda one: one.name not in SMALL, transfers),
    "small": Block("bridge", lambda one: one.name in SMALL, each),
    "training": Block("training", lambda one: True, each),
    "host": Block("host", lambda one: True, each),
    "telemetry": Block("telemetry", lambda one: True, telemetry),
    "set-up": Block("plan", lambda one: one.name.startswith("set-up"), each),
}


def block(name: str, results: Path) -> str:
    """The text of a block.

    Raises:
        ValueError: there is no such block, or the records are not well formed.
    """
    if name not in BLOCKS:
        raise ValueError(f"expected figures among {sorted(BLOCKS)}, got {name!r}")
    file = results / f"{BLOCKS[name].file}.json"
    records = read_json(file) if file.exists() else []
    shown = [one for one in records if one.ratio_median is not None and BLOCKS[name].takes(one)]
    if not shown:
        return "Not measured yet.\n"
    return f"{BLOCKS[name].make(shown)}\n\n{_foot(shown)}\n"


def _foot(records: Sequence[Record]) -> str:
    """What holds for a whole table."""
    repeats = sorted({one.repeats for one in records if one.repeats})
    busy = [one.busy for one in records if one.busy is not None]
    lost = slower([one for one in records if not one.name.startswith("exposed")], LIMIT)
    pairs = f"{repeats[0]} to {repeats[-1]}" if len(repeats) > 1 else "".join(map(str, repeats))
    text = f"Median of {pairs} pairs (smallest .. largest)."
    if busy:
        text += f" Other work used at most {max(busy):.0%} of the machine meanwhile."
    if all(one.name == "telemetry" for one in records):
        return text
    if lost:
        return f"{text} Ours may be slower (smallest ratio below {LIMIT}) in: {'; '.join(lost)}."
    return f"{text} No smallest ratio is below {LIMIT}."


def _suffix(record: Record) -> str:
    """ "-static" of "sharded-static"."""
    return record.method.removeprefix("replicated").removeprefix("sharded")


def _ratio(record: Record) -> str:
    return f"{record.ratio_median:.2f}x ({record.ratio_lo:.2f} .. {record.ratio_hi:.2f})"


def _efficiency(record: Record) -> str:
    return "" if record.efficiency is None else f"{record.efficiency:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Markdown; the first `left` columns are text, the others figures."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def filled(page: str, results: Path) -> str:
    """The page with all its blocks as the records say.

    Raises:
        ValueError: a mark without its other one, or as `block`.
    """
    if len(MARKS.findall(page)) != max(page.count("<!-- figures:"), page.count("<!-- end of figures -->")):
        raise ValueError("expected each '<!-- figures: NAME -->' to be followed by '<!-- end of figures -->'")
    return MARKS.sub(
        lambda found: f"<!-- figures: {found['name']} -->\n{block(found['name'], results)}<!-- end of figures -->\n",
        page,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the figures in place of checking them")
    parser.add_argument("--check", action="store_true", help="the default")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("pages", type=Path, nargs="*", default=list(PAGES), help="default: README.md and docs/speed.md")
    options = parser.parse_args(arguments)
    stale = []
    try:
        for page in options.pages:
            before = page.read_text()
            after = filled(before, options.results)
            if before == after:
                continue
            if options.write:
                page.write_text(after)
            else:
                stale.append(page)
        if options.write and (options.results / "bridge.json").exists():
            from picture import draw

            draw(read_json(options.results / "bridge.json"), options.results / "bridge.png")
    except (OSError, ValueError) as error:
        print(f"figures: {error}", file=sys.stderr)
        return 1
    for page in stale:
        print(f"figures: {page} does not say what {options.results} says: make figures", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
