"""docs/api.toml as rows, and the pages that are made of it and of docs/defects.toml. See check_api.py."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

CALLABLE_KINDS = ("function", "method", "classmethod", "staticmethod")
KINDS = ("class", *CALLABLE_KINDS, "property", "field", "member", "attribute", "datum")
ORIGINS = ("document", "released", "ours")


class Problem(Exception):
    """One line for the person who runs the check."""


# --- the table


@dataclasses.dataclass
class Row:
    """One name of docs/api.toml."""

    module: str
    name: str
    kind: str
    says: str
    extra: str
    why: str
    tests: list[str]

    @property
    def where(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass
class Section:
    """One table of the page: a module, or a part of it, of one origin."""

    title: str
    module: str
    origin: str
    text: str
    rows: list[Row]


def read_table(path: Path) -> list[Section]:
    """Sections of docs/api.toml. Raises Problem for a row that is not well formed."""
    sections = []
    for section in tomllib.loads(path.read_text())["section"]:
        if section["origin"] not in ORIGINS:
            raise Problem(f"{section['title']}: expected an origin among {ORIGINS}, got {section['origin']!r}")
        rows = [read_row(section["module"], dict(entry)) for entry in section["names"]]
        sections.append(
            Section(section["title"], section["module"], section["origin"], section.get("text", "").strip(), rows)
        )
    return sections


def read_row(module: str, entry: dict[str, Any]) -> Row:
    name = entry.pop("name")
    kinds = [key for key in entry if key in KINDS]
    if len(kinds) != 1:
        raise Problem(f"{module}.{name}: expected one of {', '.join(KINDS)}, got {kinds or 'none'}")
    says, tests = entry.pop(kinds[0]), entry.pop("test", [])
    row = Row(
        module=module,
        name=name,
        kind=kinds[0],
        says=says,
        extra=entry.pop("extra", ""),
        why=entry.pop("why", ""),
        tests=[tests] if isinstance(tests, str) else tests,
    )
    if entry:
        raise Problem(f"{row.where}: unknown keys {sorted(entry)}")
    return row


# --- the pages


def api_page(sections: list[Section], introduction: str) -> str:
    lines = [introduction.strip(), ""]
    for section in sections:
        lines += [f"## {section.title}", "", f"Module `{section.module}`. {section.text}".strip(), ""]
        extra = any(row.extra or row.why for row in section.rows)
        head = ["Name", "Parameters, default or value", *(["Ours has more, or differs"] if extra else []), "Tests"]
        lines += [_cells(head), _cells(["---"] * len(head))]
        for row in section.rows:
            says = "property" if row.kind == "property" else row.says
            cells = [f"`{row.name}`", f"`{says}`" if row.kind not in ("property", "attribute") else says]
            if extra:
                cells.append(" ".join(filter(None, [f"`{row.extra}`" if row.extra else "", row.why])))
            lines.append(_cells([*cells, "<br>".join(f"`{test}`" for test in row.tests)]))
        lines.append("")
    return "\n".join(lines)


def _cells(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def defects_page(table: dict[str, Any]) -> str:
    lines = [table["introduction"].strip(), ""]
    for defect in table["defect"]:
        lines += [f"## {defect['number']}. {defect['title']}", ""]
        lines += [f"*Released*: {defect['released'].strip()}", ""]
        lines += ["Seen in: " + ", ".join(f"`{place}`" for place in defect["seen_in"]), ""]
        lines += [f"*Here*: {defect['ours'].strip()}", ""]
        lines += ["Proved by:", "", *(f"* `{test}`" for test in defect["tests"]), ""]
    return "\n".join(lines)
