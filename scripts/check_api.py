"""Check the tables of docs/: every name exists as written there and has a test. `make check-api` runs this.

`docs/api.toml` lists the names of the Megatron layer: what the API documents say of each (parameters in order, kinds
and defaults), what ours adds, and the tests that prove it. `docs/defects.toml` lists the known defects of the released
classes with their tests. Checked are, in a few seconds and without any rank:

* each name exists, and its parameters, default or value are the ones written down;
* each has a test, and each test that is named exists;
* each public name of these modules and of their classes is in the table, so that new ones are documented;
* the places in the released packages that the defects name hold what they should, where those are installed;
* `docs/api.md` and `docs/defects.md` are what the two files make.

    python scripts/check_api.py            check; exit status 1 and one line per problem
    python scripts/check_api.py --write    write the two pages anew
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import enum
import functools
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
import textwrap
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from api_table import CALLABLE_KINDS, ORIGINS, Problem, Row, Section, api_page, defects_page, read_row, read_table

__all__ = ["Problem", "Row", "Section", "check", "check_place", "check_row", "check_tests", "missing_names", "read_row"]

ROOT = Path(__file__).resolve().parent.parent
RELEASE = "0.19.2"  # of Megatron-Core, whose lines docs/defects.toml names


# --- names and signatures


def check_row(row: Row) -> None:
    """Raise Problem where the name is missing or is not what the row says."""
    module = importlib.import_module(row.module)
    owner, found = _look_up(module, row)
    if row.kind in CALLABLE_KINDS or row.kind == "class":
        _check_kind(row, owner)
        _compare(row, _expected(row, module), _actual(row, found))
    elif row.kind == "property":
        if not isinstance(
            inspect.getattr_static(owner, row.name.rpartition(".")[2]), property | functools.cached_property
        ):
            raise Problem(f"{row.where}: expected a property, got {type(found).__name__}")
    elif row.kind == "field":
        got, expected = found, _value(row, module)
        if got != expected and not (got is dataclasses.MISSING and row.says == "required"):
            raise Problem(f"{row.where}: expected the default {row.says}, got {_show_default(got)}")
    elif row.kind == "member":
        if not isinstance(found, enum.Enum) or found.value != _value(row, module):
            raise Problem(f"{row.where}: expected a member with the value {row.says}, got {found!r}")
    elif row.kind == "datum" and not _is_datum(found, row, module):
        raise Problem(f"{row.where}: expected {row.says}, got {found!r}")


def _look_up(module: Any, row: Row) -> tuple[Any, Any]:
    """(owner, what the name stands for); for a dataclass field its default, for an attribute of instances None."""
    owner, _, last = row.name.rpartition(".")
    holder = functools.reduce(getattr, owner.split("."), module) if owner else module
    if row.kind == "field":
        fields = {field.name: field for field in dataclasses.fields(holder)}
        if last not in fields:
            raise Problem(f"{row.where}: no such field; there are {sorted(fields)}")
        return holder, _default_of(fields[last])
    if row.kind == "attribute":
        if not _is_set_in(holder, last):
            raise Problem(f"{row.where}: no method of the class sets self.{last}")
        return holder, None
    try:
        return holder, getattr(holder, last)
    except AttributeError:
        raise Problem(f"{row.where}: no such name") from None


def _default_of(field: Any) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _is_set_in(holder: type, attribute: str) -> bool:
    """Whether a method of the class or of a base of ours assigns `self.attribute`."""
    for base in holder.__mro__:
        if not base.__module__.startswith("mimo_ext"):
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if isinstance(node, ast.Attribute) and node.attr == attribute and isinstance(node.ctx, ast.Store):
                return True
    return False


def _check_kind(row: Row, owner: Any) -> None:
    static = inspect.getattr_static(owner, row.name.rpartition(".")[2], None)
    got = {staticmethod: "staticmethod", classmethod: "classmethod"}.get(type(static))
    if got is None:
        got = "class" if isinstance(static, type) else "method" if isinstance(owner, type) else "function"
    if not callable(static) and got not in ("staticmethod", "classmethod"):
        # A module may hand its names out by __getattr__.
        got = "class" if isinstance(getattr(owner, row.name, None), type) else row.kind
    if got != row.kind:
        raise Problem(f"{row.where}: expected a {row.kind}, got a {got}")


def _actual(row: Row, found: Any) -> list[inspect.Parameter]:
    if row.kind == "class" and dataclasses.is_dataclass(found):
        return _parameters_of_fields(found)
    if row.kind == "class" and issubclass(found, enum.Enum):
        return []
    parameters = list(inspect.signature(found).parameters.values())
    if row.kind == "method":
        parameters = parameters[1:]
    return [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]


def _parameters_of_fields(found: Any) -> list[inspect.Parameter]:
    """A dataclass's constructor, with the defaults that factories make."""
    made = []
    for field in dataclasses.fields(found):
        if not field.init:
            continue
        kind = inspect.Parameter.KEYWORD_ONLY if field.kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = _default_of(field)
        empty = inspect.Parameter.empty
        made.append(inspect.Parameter(field.name, kind, default=empty if default is dataclasses.MISSING else default))
    return sorted(made, key=lambda parameter: parameter.kind)


def _expected(row: Row, module: Any) -> list[inspect.Parameter]:
    return _parse(row.says, module, row) + (_parse(row.extra, module, row) if row.extra else [])


def _parse(text: str, module: Any, row: Row) -> list[inspect.Parameter]:
    namespace: dict[str, Any] = {}
    try:
        exec(f"def function{text}: ...", dict(vars(module)), namespace)
    except Exception as error:
        raise Problem(f"{row.where}: {text!r} is no signature ({error})") from None
    return list(inspect.signature(namespace["function"]).parameters.values())


def _compare(row: Row, expected: list[inspect.Parameter], got: list[inspect.Parameter]) -> None:
    # Keyword-only parameters have no order, and what takes all other keywords comes last.
    def in_order(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
        free = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
        return [p for p in parameters if p.kind not in free] + sorted(
            (p for p in parameters if p.kind in free), key=lambda p: (p.kind, p.name)
        )

    expected, got = in_order(expected), in_order(got)
    if expected != got:
        raise Problem(f"{row.where}: expected {_show(expected)}, got {_show(got)}")
    for parameter in _parse(row.extra, importlib.import_module(row.module), row) if row.extra else []:
        variadic = parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        if parameter.default is inspect.Parameter.empty and not variadic:
            raise Problem(f"{row.where}: what we add must be optional, but {parameter.name} has no default")


def _show(parameters: list[inspect.Parameter]) -> str:
    parts, star = [], False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        parts.append(str(parameter))
    return f"({', '.join(parts)})"


def _show_default(value: Any) -> str:
    return "none (it is required)" if value is dataclasses.MISSING else repr(value)


def _value(row: Row, module: Any) -> Any:
    """What the row's text means in its module; MISSING for `required`."""
    if row.says == "required":
        return dataclasses.MISSING
    return eval(row.says, dict(vars(module)))


def _is_datum(found: Any, row: Row, module: Any) -> bool:
    if row.says.startswith("a "):
        return type(found).__name__ == row.says.split()[1]
    return bool(found == _value(row, module))


# --- completeness


def missing_names(sections: list[Section]) -> Iterator[str]:
    """Public names of the modules, and of their classes, that no row has."""
    listed = {row.where for section in sections for row in section.rows}
    for module_name in dict.fromkeys(section.module for section in sections):
        module = importlib.import_module(module_name)
        for name in public_names(module):
            if f"{module_name}.{name}" not in listed:
                yield f"{module_name}.{name}"
            found = getattr(module, name)
            if isinstance(found, type) and found.__module__.startswith("mimo_ext"):
                yield from (
                    f"{module_name}.{name}.{member}"
                    for member in public_members(found)
                    if f"{module_name}.{name}.{member}" not in listed and not _alias(sections, module_name, found, name)
                )


def _alias(sections: list[Section], module_name: str, found: type, name: str) -> bool:
    """Whether the class is another name of one whose members are listed."""
    return found.__name__ != name and any(
        row.where == f"{module_name}.{found.__name__}" for section in sections for row in section.rows
    )


def public_names(module: Any) -> list[str]:
    """`__all__`, or what the module's own source defines at its top level without an underscore."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    names: dict[str, None] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = None
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update((target.id, None) for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            # `from x import y as y` hands y out on purpose.
            names.update((alias.name, None) for alias in node.names if alias.name == alias.asname)
    return [name for name in names if not name.startswith("_")]


def public_members(found: type) -> list[str]:
    """Members without an underscore that the class itself defines, dataclass fields included."""
    own = list(vars(found))
    if dataclasses.is_dataclass(found):
        own += [name for name in inspect.get_annotations(found) if name in found.__dataclass_fields__]
    if issubclass(found, enum.Enum):
        own = list(found.__members__)
    return [name for name in dict.fromkeys(own) if not name.startswith("_")]


# --- tests


@functools.cache
def tests_in(path: Path) -> frozenset[str]:
    """`test_x` and `TestClass::test_x` of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            names.update(
                f"{node.name}::{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef) and inner.name.startswith("test")
            )
    return frozenset(names)


def check_tests(where: str, tests: list[str]) -> None:
    """Raise Problem where there is no test, or one that does not exist. Tests are written relative to tests/."""
    if not tests:
        raise Problem(f"{where}: no test is named")
    for test in tests:
        file, separator, name = test.partition("::")
        path = ROOT / "tests" / file
        if not separator or not path.is_file():
            raise Problem(f"{where}: test {test!r}: no such file {path.relative_to(ROOT)}")
        if name not in tests_in(path):
            raise Problem(f"{where}: test {test!r} does not exist")


# --- places in the released packages


def check_place(where: str, place: str) -> bool:
    """Whether the place could be looked up. Raises Problem where that line does not hold the word.

    Only the very releases that the table speaks of are looked at: Megatron-Core where it is installed, Megatron-Bridge
    in the folder that the environment variable MIMO_EXT_MEGATRON_BRIDGE names.
    """
    match = re.fullmatch(r"(\S+):(\d+) (\S+)", place)
    if match is None:
        raise Problem(f"{where}: {place!r}: expected file:line and a word of that line")
    file, line, word = match.groups()
    folder = _folder_of_release(file)
    if folder is None:
        return False
    lines = (folder / file).read_text().splitlines()
    if int(line) > len(lines) or word not in lines[int(line) - 1]:
        raise Problem(f"{where}: {file}:{line} does not hold {word!r}")
    return True


@functools.cache
def _folder_of_release(file: str) -> Path | None:
    if file.startswith("megatron/bridge/"):
        folder = os.environ.get("MIMO_EXT_MEGATRON_BRIDGE")
        return Path(folder) if folder else None
    found = importlib.util.find_spec("megatron.core")
    if found is None or found.origin is None or importlib.metadata.version("megatron-core") != RELEASE:
        return None
    return Path(found.origin).parents[2]


# --- the command


def check(write: bool = False) -> list[str]:
    """All problems, one line each."""
    problems: list[str] = []
    api, defects = ROOT / "docs" / "api.toml", ROOT / "docs" / "defects.toml"
    try:
        sections = read_table(api)
    except Problem as problem:
        return [str(problem)]
    seen: set[str] = set()
    for row in (row for section in sections for row in section.rows):
        if row.where in seen:
            problems.append(f"{row.where}: listed twice")
        seen.add(row.where)
        problems += _problems_of(lambda row=row: check_row(row))
        problems += _problems_of(lambda row=row: check_tests(row.where, row.tests))
    problems += [f"{name}: public, and not in docs/api.toml" for name in missing_names(sections)]

    table = tomllib.loads(defects.read_text())
    for defect in table["defect"]:
        name = f"defect {defect['number']}"
        problems += _problems_of(lambda name=name, defect=defect: check_tests(name, defect["tests"]))
        for place in defect["seen_in"]:
            problems += _problems_of(lambda name=name, place=place: check_place(name, place))
    if [defect["number"] for defect in table["defect"]] != list(range(1, len(table["defect"]) + 1)):
        problems.append("docs/defects.toml: expected the defects numbered 1, 2, ...")
    pages = {
        "api.md": api_page(sections, tomllib.loads(api.read_text())["introduction"]),
        "defects.md": defects_page(table),
    }
    for name, text in pages.items():
        path = ROOT / "docs" / name
        if write:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            problems.append(f"docs/{name} is not what docs/{name[:-3]}.toml makes: run scripts/check_api.py --write")
    if not problems:
        tests = {test for section in sections for row in section.rows for test in row.tests}
        tests |= {test for defect in table["defect"] for test in defect["tests"]}
        counts = {o: sum(len(s.rows) for s in sections if s.origin == o) for o in ORIGINS}
        print(
            f"check-api: {len(seen)} names ({counts['document']} of the documents, {counts['released']} of the "
            f"released classes, {counts['ours']} ours) and {len(table['defect'])} defects, proved by {len(tests)} tests"
        )
    return problems


def _problems_of(test: Callable[[], object]) -> list[str]:
    try:
        test()
    except Problem as problem:
        return [str(problem)]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/api.md and docs/defects.md anew")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # what Megatron says while it is imported
    problems = check(arguments.write)
    for problem in problems:
        print(problem)
    if problems:
        print(f"check-api: {len(problems)} problem(s)")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
