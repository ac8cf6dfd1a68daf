"""Names replaced in loaded modules and in modules yet to be loaded, and put back exactly."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

ABSENT = object()


@dataclass(frozen=True)
class Replacement:
    """One name that was given another value.

    Attributes:
        place: name of the module (or ``module.Class``) that has the name; "sys.modules" for a module that was supplied.
        name: the name there.
        old: what it was; `ABSENT` where there was nothing.
        new: what it is now.
    """

    place: str
    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        was = "was not there" if self.old is ABSENT else f"was {_text(self.old)}"
        return f"{self.place}.{self.name} = {_text(self.new)} ({was})"


class Patches:
    """Replacements under way. Not thread-safe: the caller holds a lock.

    Args:
        is_skipped: whether a module, by name, is never touched.
        left_alone: ``(module, name)`` that keep what they have.
    """

    def __init__(self, is_skipped: Callable[[str], bool], left_alone: Iterable[tuple[str, str]]) -> None:
        self.done: list[Replacement] = []
        self._owners: list[Any] = []  # of each of `done`
        self._is_skipped = is_skipped
        self._left_alone = set(left_alone)
        self._new_of: dict[int, tuple[Any, Any]] = {}  # id(old) -> (old, new)
        # (id of module, name) that held a new value of itself: it was imported from here on purpose, and stays.
        self._on_purpose: set[tuple[int, str]] = set()

    @property
    def replaced(self) -> list[Any]:
        """The objects that stood where others stand now."""
        return [old for old, _ in self._new_of.values()]

    def put(self, owner: Any, place: str, name: str, new: Any) -> None:
        """Give one name of a module, of a class, or of `sys.modules` another value."""
        old = _namespace(owner).get(name, ABSENT)
        if old is new:
            return
        _set(owner, name, new)
        self._owners.append(owner)
        self.done.append(Replacement(place, name, old, new))

    def replace_everywhere(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Put `new` wherever a module has `old` under any name, for each pair ``(old, new)``."""
        added = {id(old): (old, new) for old, new in pairs if old is not new}
        self._new_of.update(added)
        news = {id(new) for _, new in added.values()}
        for module_name, module in self._modules():
            for name, value in list(_namespace(module).items()):
                if id(value) in news:
                    self._on_purpose.add((id(module), name))
                elif id(value) in added and (module_name, name) not in self._left_alone:
                    self.put(module, module_name, name, added[id(value)][1])

    def undo(self) -> list[str]:
        """Put everything back. Returns the places where somebody has put something else since, which stays."""
        kept = []
        for record in reversed(self.done):
            owner = self._owners.pop()
            now = _namespace(owner).get(record.name, ABSENT)
            if now is record.new:
                _set(owner, record.name, record.old)
            elif now is not record.old:
                kept.append(f"{record.place}.{record.name}: {'gone' if now is ABSENT else _text(now)}")
        # Modules imported meanwhile took the new values from where they were put.
        old_of = {id(new): old for old, new in self._new_of.values()}
        for _, module in self._modules():
            for name, value in list(_namespace(module).items()):
                if id(value) in old_of and (id(module), name) not in self._on_purpose:
                    _set(module, name, old_of[id(value)])
        return kept

    def _modules(self) -> Iterator[tuple[str, types.ModuleType]]:
        seen: set[int] = set()
        for name, module in list(sys.modules.items()):
            if not _is(module, types.ModuleType) or id(module) in seen:
                continue
            seen.add(id(module))
            # A module may also be found under another name than its own.
            own_name = _namespace(module).get("__name__")
            if not self._is_skipped(name) and not (isinstance(own_name, str) and self._is_skipped(own_name)):
                yield name, module


def _is(thing: Any, kind: type) -> bool:
    """isinstance that does not ask for ``__class__``: a module that loads itself on first use would load."""
    return issubclass(type(thing), kind)


def _namespace(owner: Any) -> Any:
    if _is(owner, dict):
        return owner
    return object.__getattribute__(owner, "__dict__") if _is(owner, types.ModuleType) else vars(owner)


def _set(owner: Any, name: str, value: Any) -> None:
    if _is(owner, dict):
        if value is ABSENT:
            del owner[name]
        else:
            owner[name] = value
    elif value is ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _text(value: Any) -> str:
    value = value.__func__ if isinstance(value, classmethod) else value
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return f"{module}.{name}" if module and name else str(getattr(value, "__name__", value))


# --- modules yet to be loaded


def find_spec(fullname: str, *, but: Any = None) -> importlib.machinery.ModuleSpec | None:
    """Spec of a module, without importing its parents (which `importlib.util.find_spec` does).

    Args:
        fullname: dotted name.
        but: entry of `sys.meta_path` that is not asked.
    """
    path: Any = None
    spec = None
    parts = fullname.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        loaded = sys.modules.get(name)
        if loaded is not None and depth < len(parts):
            path = getattr(loaded, "__path__", None)
        else:
            spec = _ask_finders(name, path, but)
            if spec is None:
                return None
            path = spec.submodule_search_locations
        if path is None and depth < len(parts):
            return None
    return spec


def _ask_finders(name: str, path: Any, but: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
    for finder in list(sys.meta_path):
        ask = getattr(finder, "find_spec", None)
        if finder is but or ask is None:
            continue
        spec = ask(name, path, target)
        if spec is not None:
            return spec
    return None


class LoadHook(importlib.abc.MetaPathFinder):
    """Entry of `sys.meta_path`: calls `on_load(module)` when one of some modules has been loaded, and supplies others.

    Args:
        watched: names of the modules whose loading is reported. They are found and loaded as they would be anyway.
        supplied: name of a module that does not exist -> name of the module that is found under it.
        on_load: called within the import of a watched module, when its code has run.
    """

    def __init__(
        self, watched: Iterable[str], supplied: dict[str, str], on_load: Callable[[types.ModuleType], None]
    ) -> None:
        self._watched = set(watched)
        self._supplied = dict(supplied)
        self._on_load = on_load

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Part of the import system."""
        if fullname in self._supplied:
            return importlib.machinery.ModuleSpec(fullname, _SupplyingLoader(self._supplied[fullname]))
        if fullname not in self._watched:
            return None
        spec = _ask_finders(fullname, path, self, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ReportingLoader(spec.loader, self._on_load)
        return spec


class _ReportingLoader(importlib.abc.Loader):
    """A module's own loader, and a call after it."""

    def __init__(self, loader: Any, on_load: Callable[[types.ModuleType], None]) -> None:
        self._loader = loader
        self._on_load = on_load

    def create_module(self, spec: Any) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        # The module is to look as without us: tools ask its loader for the source.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._on_load(module)


class _SupplyingLoader(importlib.abc.Loader):
    """A module that is there already, under another name."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._spec: Any = None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        # The import system has set the spec of the other name.
        module.__spec__ = self._spec


# --- what a replacement in modules does not reach


def holders(objects: list[Any], is_skipped: Callable[[str], bool]) -> list[str]:
    """Where else than in modules any of the objects is held: in words, one place each."""
    wanted = {id(thing) for thing in objects}
    classes = {thing for thing in objects if isinstance(thing, type)}
    # There are some hundred thousand objects, of few kinds.
    kinds: dict[type, Callable[[Any], Iterable[str]] | None] = dict.fromkeys(classes, _as_object)
    kinds[types.FunctionType] = functools.partial(_in_function, wanted)
    kinds[functools.partial] = lambda thing: ["functools.partial of " + _text(thing.func)] * (id(thing.func) in wanted)
    in_class = functools.partial(_in_class, wanted, classes)
    found: list[str] = []
    for thing in gc.get_objects():
        kind = type(thing)
        if kind not in kinds:
            kinds[kind] = in_class if issubclass(kind, type) else None
        look = kinds[kind]
        if look is not None and (lines := look(thing)) and not is_skipped(_module_of(thing)):
            found += lines
    objects_of = {line: found.count(line) for line in found}
    return sorted(f"{count} {line}" if line.startswith("object(s)") else line for line, count in objects_of.items())


def _module_of(thing: Any) -> str:
    module = thing.__module__ if _is(thing, type) or _is(thing, types.FunctionType) else None
    return module if isinstance(module, str) else ""


def _as_object(thing: Any) -> list[str]:
    return [f"object(s) of class {_text(type(thing))}"]


def _in_function(wanted: set[int], function: types.FunctionType) -> list[str]:
    found = []
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if any(id(value) in wanted for value in defaults):
        found.append(f"default argument of {_text(function)}")
    if function.__closure__ and any(id(value) in wanted for value in _cells(function)):
        found.append(f"closure of {_text(function)}")
    return found


def _in_class(wanted: set[int], replaced: set[type], kind: type) -> list[str]:
    if kind in replaced:
        return []
    found = [f"base class of {_text(kind)}" for base in kind.__bases__ if id(base) in wanted]
    names = [name for name, value in list(vars(kind).items()) if id(value) in wanted]
    return found + [f"class attribute {_text(kind)}.{name}" for name in names]


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name == "__class__":
            continue  # the class that the method itself belongs to, for super()
        try:
            yield cell.cell_contents
        except ValueError:
            continue  # not yet assigned
