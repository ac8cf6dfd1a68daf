"""Every promise of docs/promises.md is held by tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "promises.md"
TEST = re.compile(r"`([^`\s]+\.(?:py|cpp))::([^`\s]+)`")

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the repository")


@cache
def found_in(file: Path) -> set[str]:
    """Names of its test functions, of those in classes, too; of a C++ file the names of its GoogleTests."""
    if file.suffix == ".cpp":
        return {
            f"{suite}.{name}" for suite, name in re.findall(r"^TEST(?:_[FP])?\((\w+), (\w+)\)", file.read_text(), re.M)
        }
    functions = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef))
    return {function.name for function in functions if function.name.startswith("test_")}


def rows() -> list[list[str]]:
    """The cells of every row of a table, but for the heads."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = {index - 1 for index, row in enumerate(cells) if set("".join(row)) == {"-"}}
    return [row for index, row in enumerate(cells) if index not in heads and set("".join(row)) != {"-"}]


def test_every_named_test_exists() -> None:
    named = TEST.findall(PAGE.read_text())
    assert len(named) > 30
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not (ROOT / "tests" / file).exists() or test.split("[")[0] not in found_in(ROOT / "tests" / file)
    ]
    assert not missing, missing


def test_every_promise_has_a_test() -> None:
    assert len(rows()) > 15
    without = [row[0] for row in rows() if not TEST.search(row[-1])]
    assert not without, without
