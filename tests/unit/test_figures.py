"""The README's performance figures: made of the committed records, and not older than these."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import figures  # noqa: E402
from records import Record, read_json, write_json  # noqa: E402


def sample(**changes: object) -> Record:
    values = {
        "name": "transfer",
        "layout": "tp4-tp4",
        "bytes": 4 << 20,
        "method": "sharded",
        "ratio_median": 5.254,
        "ratio_lo": 5.0,
        "ratio_hi": 5.506,
        "efficiency": 0.981,
        "repeats": 5,
        "busy": 0.034,
    }
    return Record(**{**values, **changes})  # type: ignore[arg-type]


def test_the_committed_pages_say_what_the_committed_records_say() -> None:
    assert figures.main(["--check"]) == 0
    shown = {name for page in figures.PAGES for name, _ in figures.MARKS.findall(page.read_text())}
    assert shown == set(figures.BLOCKS)


def test_no_ratio_is_typed_by_hand() -> None:
    for page in (*figures.PAGES, ROOT / "benchmarks" / "README.md"):
        by_hand = figures.MARKS.sub("", page.read_text())
        assert not re.search(r"\d(\.\d+)?( times|x) (as fast|faster)|\d\.\d+x", by_hand), page


def test_a_table_shows_each_case_once_with_both_deliveries() -> None:
    records = [
        sample(method="replicated", ratio_median=4.1, ratio_lo=4.0, ratio_hi=4.2, efficiency=0.8),
        sample(),
        sample(name="steady-1f1b", method="sharded-static", bytes=8 << 20),
    ]
    assert figures.transfers(records).splitlines()[2:] == [
        "| transfer | `tp4-tp4` | 4 MiB | 4.10x (4.00 .. 4.20) | 0.80 | 5.25x (5.00 .. 5.51) | 0.98 |",
        "| steady-1f1b, static shapes | `tp4-tp4` | 8 MiB |  |  | 5.25x (5.00 .. 5.51) | 0.98 |",
    ]


def test_what_loses_is_named_and_what_is_not_measured_too(tmp_path: Path) -> None:
    write_json(
        [
            sample(),
            sample(name="small", ratio_lo=0.9, efficiency=None, repeats=7, busy=0.121),
            sample(name="small", ratio_median=None, ratio_lo=None, ratio_hi=None),
        ],
        tmp_path / "bridge.json",
    )
    assert figures.block("training", tmp_path) == "Not measured yet.\n"
    table, foot = figures.block("small", tmp_path).split("\n\n")
    assert table.splitlines()[2:] == ["| small | `tp4-tp4` | 4 MiB | sharded | 5.25x (0.90 .. 5.51) |"]
    assert foot == (
        "Median of 7 pairs (smallest .. largest). Other work used at most 12% of the machine meanwhile. Ours may be "
        "slower (smallest ratio below 0.97) in: small tp4-tp4 4 MiB sharded.\n"
    )
    assert figures.block("bridge", tmp_path).endswith("No smallest ratio is below 0.97.\n")


def test_other_records_make_a_page_stale_until_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, page = tmp_path / "results", tmp_path / "page.md"
    shutil.copytree(figures.RESULTS, results)
    shutil.copy(ROOT / "README.md", page)
    arguments = ["--results", str(results), str(page)]
    assert figures.main(arguments) == 0
    first, *others = read_json(results / "bridge.json")
    write_json([dataclasses.replace(first, ratio_median=77.125, ratio_hi=78.0), *others], results / "bridge.json")
    assert figures.main(arguments) == 1
    assert "page.md does not say what" in capsys.readouterr().err
    assert "77.12x" not in page.read_text()
    (results / "bridge.png").unlink()
    assert figures.main(["--write", *arguments]) == 0
    assert "77.12x" in page.read_text()
    assert (results / "bridge.png").read_bytes().startswith(b"\x89PNG")
    assert figures.main(arguments) == 0


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<!-- figures: bridge -->\n", "expected each '<!-- figures: NAME -->'"),
        ("<!-- end of figures -->\n", "expected each '<!-- figures: NAME -->'"),
        ("<!-- figures: bridges -->\n<!-- end of figures -->\n", "expected figures among.*got 'bridges'"),
    ],
)
def test_a_page_with_other_marks_is_refused(
    text: str, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert figures.main(["--write", str(page)]) == 1
    assert re.search(error, capsys.readouterr().err)
    assert page.read_text() == text
