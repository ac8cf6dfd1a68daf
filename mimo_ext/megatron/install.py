"""Run unmodified Megatron programs on our classes.

    import mimo_ext.megatron

    with mimo_ext.megatron.install():         # or install() ... mimo_ext.megatron.uninstall()
        ...                                   # Megatron's names are ours now, wherever they were imported before

A script that is not to be changed at all is started through this module, by itself or on the ranks of torchrun::

    python -m mimo_ext.megatron.install train.py --its --own --arguments
    torchrun --nproc-per-node 8 -m mimo_ext.megatron.install train.py

What is replaced, in the modules that define the names and in all that have imported them, ``__main__`` included:

* Megatron-Core: ``MultiModulePipelineCommunicator``, ``RankModuleInfo``, ``BridgeCommunicator``, the two adapters of
  tensors, ``MimoModel``; the class methods of ``RankRole`` (``ModuleLayout`` and ``RankRole`` themselves stay, as
  members are compared by identity; ``ModuleLayout.UNIFIED`` becomes another name of COLOCATED);
* Megatron-Bridge, where it is installed: provider, infra, parallelism configs, builder, DDP wrapping and the functions
  of ``megatron_mimo_parallel_utils``. Modules of it that are imported later are changed when they are loaded; it is not
  imported for this;
* with ``install(overlap=True)`` (``--overlap``) also Megatron-Core's 1F1B schedule,
  ``forward_backward_pipelining_without_interleaving``: it posts receives ahead, see `mimo_ext.megatron.overlap`;
* import paths that only other versions have (``megatron.bridge.models.mimo.mimo_provider``, ``.mimo_builder``,
  ``.mimo_config``) lead to our modules. Without Megatron-Bridge there is still no ``megatron.bridge`` then, and
  ``from megatron.bridge.models.mimo.mimo_provider import ...`` is the form that works.

Names imported while this is in effect come from these modules, hence are ours, and are put back with the others. A
module that took a class from `mimo_ext` itself before keeps it; one that may do so meanwhile is named in `exclude`.
Not reached, and listed in `Installation.not_reached`: default arguments, closures, base classes and attributes of
classes, partial functions, existing objects. Values that a program or a test puts into Megatron-Bridge's modules for
its functions to find (``patch("megatron.bridge....MimoModel")``) are not seen by ours, which look into their own
modules: patch them there, or at the documents' import paths. Processes that the program starts with multiprocessing
start without it.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import runpy
import sys
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any

from mimo_ext.megatron._patching import LoadHook, Patches, Replacement, find_spec, holders
from mimo_ext.megatron.overlap import overlapped

__all__ = ["Installation", "Replacement", "install", "installed", "uninstall"]

logger = logging.getLogger(__name__)

_PACKAGE = "mimo_ext.megatron"
_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_SCHEDULE = "forward_backward_pipelining_without_interleaving"
_lock = threading.RLock()
_active: Installation | None = None
_depth = 0


class Installation:
    """What `install` did; ``str()`` of it is a text for people. A context manager that uninstalls at its end.

    Attributes:
        replaced: names that were given another value; more of them when a module of Megatron-Bridge is loaded later.
        pending: modules that will be changed when the program imports them.
        left_alone: ``(module.name, reason)`` of names that keep Megatron's object.
        not_reached: places outside of modules that hold Megatron's objects, in words. Looked for at each reading, which
            takes a fraction of a second.
        overlap: whether the 1F1B schedule posts receives ahead.
        kept: after the end, places where somebody else has put another value in the meantime. It was not touched.
    """

    def __init__(self, exclude: Iterable[str], overlap: bool = False) -> None:
        self.exclude = frozenset(exclude)
        self.overlap = overlap
        self.pending: list[str] = []
        self.left_alone: list[tuple[str, str]] = []
        self.kept: list[str] = []
        self._stand_ins: Any = importlib.import_module(f"{_PACKAGE}._stand_ins")
        self._patches = Patches(self._is_skipped, self._stand_ins.LEFT_ALONE)
        self._hook: LoadHook | None = None

    @property
    def replaced(self) -> list[Replacement]:
        return list(self._patches.done)

    @property
    def not_reached(self) -> list[str]:
        return holders(self._patches.replaced, self._is_skipped)

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_: object) -> None:
        uninstall()

    def __repr__(self) -> str:
        return f"<Installation: {len(self.replaced)} names replaced; print it for the list>"

    def __str__(self) -> str:
        def block(title: str, lines: Iterable[Any]) -> list[str]:
            return [title, *(f"  {line}" for line in lines)]

        lines = block(f"replaced ({len(self.replaced)}):", self.replaced)
        lines += block("replaced when imported:", self.pending) if self.pending else []
        lines += block("left alone:", (f"{name}: {reason}" for name, reason in self.left_alone))
        lines += block("not reached:", not_reached) if (not_reached := self.not_reached) else []
        return "\n".join(lines)

    def _is_skipped(self, module_name: str) -> bool:
        # An interactive Python keeps the last result in builtins._ and sets it at will.
        if module_name == "builtins":
            return True
        return any(module_name == name or module_name.startswith(name + ".") for name in ("mimo_ext", *self.exclude))

    # --- called with the lock held

    def _begin(self) -> None:
        tables = self._stand_ins
        for home in tables.HOMES:
            self._replace(sys.modules[home], tables.HOMES[home])
        if self.overlap:
            schedule = getattr(sys.modules[_SCHEDULES], _SCHEDULE)
            self._patches.replace_everywhere([(schedule, overlapped(schedule))])
        for owner, name, value in tables.attributes():
            self._patches.put(owner, f"{owner.__module__}.{owner.__qualname__}", name, value)

        loaded = _loaded(tables.BRIDGE_HOMES)
        later = [home for home in tables.BRIDGE_HOMES if home not in loaded and find_spec(home) is not None]
        absent = tables.BRIDGE_HOMES.keys() - loaded.keys() - set(later)
        supplied = {name: f"{_PACKAGE}.{ours}" for name, ours in tables.SUPPLIED.items() if name in absent}
        for home, module in loaded.items():
            self._replace(module, tables.BRIDGE_HOMES[home])
        if _has_bridge():
            # Their parents are imported as usual; the hook gives our modules where there is no file.
            self._hook = LoadHook(later, supplied, self._on_load)
            sys.meta_path.insert(0, self._hook)
            self.pending = [*later, *supplied]
        else:
            for name, ours in supplied.items():
                self._patches.put(sys.modules, "sys.modules", name, importlib.import_module(ours))

        for (home, name), reason in tables.LEFT_ALONE.items():
            self.left_alone.append((f"{home}.{name}", reason))

    def _replace(self, home: types.ModuleType, names: dict[str, str]) -> None:
        pairs = []
        for name, ours in names.items():
            new = getattr(importlib.import_module(f"{_PACKAGE}.{ours}"), name, None)
            if new is None or name not in vars(home):
                lacking = home.__name__ if new is not None else f"{_PACKAGE}.{ours}"
                self.left_alone.append((f"{home.__name__}.{name}", f"{lacking} has no such name"))
                continue
            pairs.append((vars(home)[name], new))
        self._patches.replace_everywhere(pairs)

    def _on_load(self, module: types.ModuleType) -> None:
        names = self._stand_ins.BRIDGE_HOMES[module.__name__]
        for ours in set(names.values()):
            importlib.import_module(f"{_PACKAGE}.{ours}")  # imports wait for one another; not under our lock
        with _lock:
            if self is not _active:
                return
            before = len(self._patches.done)
            self._replace(module, names)
            self.pending = [name for name in self.pending if name != module.__name__]
            logger.info("%s", "\n  ".join(["replaced on import:", *map(str, self._patches.done[before:])]))

    def _end(self) -> None:
        if self._hook is not None:
            if self._hook in sys.meta_path:
                sys.meta_path.remove(self._hook)
            self._withdraw_supplied()
        self._hook = None
        self.pending = []
        self.kept = self._patches.undo()

    def _withdraw_supplied(self) -> None:
        """Undo what the import system did for modules that the hook gave."""
        for name, ours in self._stand_ins.SUPPLIED.items():
            module = sys.modules.get(f"{_PACKAGE}.{ours}")
            if module is None or sys.modules.get(name) is not module:
                continue
            del sys.modules[name]
            parent, _, leaf = name.rpartition(".")
            if parent in sys.modules and vars(sys.modules[parent]).get(leaf) is module:
                delattr(sys.modules[parent], leaf)


def install(exclude: Iterable[str] = (), overlap: bool = False) -> Installation:
    """Put our classes and functions in place of Megatron's. Each call needs one `uninstall`.

    Takes a fraction of a second; needs no process group. Call it on every rank, before models and communicators are
    made: existing objects stay what they are.

    Args:
        exclude: modules (and their submodules) in which nothing is touched. A nested call cannot exclude anything else
            than the outermost one.
        overlap: let transfers between modules run while the ranks compute: Megatron-Core's 1F1B schedule posts receives
            ahead, wherever it was imported. The same values. A nested call cannot switch it on.

    Returns:
        What was done. It is logged too, at level INFO.

    Raises:
        ImportError: megatron-core cannot be imported.
        ValueError: a nested call with another `exclude`, or with `overlap` where the outermost had none.
        TypeError: `exclude` is neither a name nor a collection of names; nothing was replaced then.
    """
    global _active, _depth
    exclude = _names_of(exclude)
    _import_ours()
    with _lock:
        if _active is not None:
            if exclude - _active.exclude:
                raise ValueError(
                    f"exclude of a nested install(): expected names of the first call's {sorted(_active.exclude)}, "
                    f"got also {sorted(exclude - _active.exclude)}"
                )
            if overlap and not _active.overlap:
                raise ValueError("overlap of a nested install(): expected False, as in the first call, got True")
            _depth += 1
            return _active
        made = Installation(exclude, overlap)
        # Set first: what is imported meanwhile may report to it.
        _active = made
        try:
            made._begin()
        except BaseException:
            _active = None
            made._end()
            raise
        _depth = 1
    logger.info("mimo_ext.megatron.install(): %s", made)
    return made


def _names_of(exclude: Any) -> frozenset[str]:
    try:
        names = [exclude] if isinstance(exclude, str) else list(exclude)
        if not all(isinstance(name, str) for name in names):
            raise TypeError
    except TypeError:
        raise TypeError(f"exclude: expected names of modules, got {exclude!r} ({type(exclude).__name__})") from None
    return frozenset(names)


def uninstall() -> list[str]:
    """Undo `install`, when this is the last of the nested calls.

    Returns:
        Places that were left as they are, as somebody else has replaced our object there in the meantime.

    Raises:
        RuntimeError: nothing is installed.
    """
    global _active, _depth
    with _lock:
        if _active is None:
            raise RuntimeError("mimo_ext.megatron.uninstall() was called without install()")
        _depth -= 1
        if _depth > 0:
            return []
        ended, _active = _active, None
        ended._end()
    for place in ended.kept:
        logger.warning("mimo_ext.megatron.uninstall(): replaced by somebody else meanwhile, left: %s", place)
    return list(ended.kept)


def installed() -> Installation | None:
    """The installation in effect, or None."""
    return _active


def _import_ours() -> None:
    """Import what will be put in place, and what it derives from, before any name is replaced and without our lock.

    Not the provider, unless it is needed now: it imports Megatron-Bridge where that is installed, and whether to do so
    is the program's decision.
    """
    try:
        importlib.import_module("megatron.core")
    except ImportError as error:
        raise ImportError(
            f"mimo_ext.megatron.install() replaces Megatron's classes, and megatron-core cannot be imported ({error}). "
            "Install it: pip install --no-deps --ignore-requires-python megatron-core==0.19.2, and packaging and triton"
        ) from error
    stand_ins = importlib.import_module(f"{_PACKAGE}._stand_ins")
    for home in (*stand_ins.HOMES, _SCHEDULES):
        importlib.import_module(home)
    tables = [*stand_ins.HOMES.values(), *stand_ins.BRIDGE_HOMES.values()]
    needed = {name for names in tables for name in names.values()}
    replaced_now = [stand_ins.BRIDGE_HOMES[home].values() for home in _loaded(stand_ins.BRIDGE_HOMES)]
    if _has_bridge() and not any("provider" in names for names in replaced_now):
        needed.discard("provider")
    for ours in sorted(needed):
        importlib.import_module(f"{_PACKAGE}.{ours}")


def _loaded(names: Iterable[str]) -> dict[str, types.ModuleType]:
    """Those of the modules that are loaded. (An entry may be None, or the stand-in of a test.)"""
    found = {name: sys.modules.get(name) for name in names}
    return {name: module for name, module in found.items() if isinstance(module, types.ModuleType)}


def _has_bridge() -> bool:
    return bool(_loaded(["megatron.bridge"])) or find_spec("megatron.bridge") is not None


def main(arguments: list[str] | None = None) -> None:
    """Run a script, or a module with ``-m``, as Python would, on our classes."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__name__ if __name__ != '__main__' else _PACKAGE + '.install'}",
        description="Run an unmodified Megatron script on the classes of mimo_ext.",
    )
    parser.add_argument("--cpu", action="store_true", help="train on CPU and gloo (see mimo_ext.megatron.cpu)")
    parser.add_argument("--overlap", action="store_true", help="let transfers run while the ranks compute")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what was replaced")
    parser.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)

    if options.cpu:
        importlib.import_module(f"{_PACKAGE}.cpu").enable()
    done = install(overlap=options.overlap)
    if options.verbose:
        print(done, file=sys.stderr, flush=True)
    sys.argv = [options.script, *options.arguments]
    if options.is_module:
        runpy.run_module(options.script, run_name="__main__", alter_sys=True)
        return
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.abspath(options.script))
    runpy.run_path(options.script, run_name="__main__")


class _Callable(types.ModuleType):
    """This module, which can be called like its function `install`."""

    __call__: Callable[..., Installation]

    def __call__(self, exclude: Iterable[str] = (), overlap: bool = False) -> Installation:  # type: ignore[no-redef]
        return install(exclude, overlap)


if __name__ == "__main__":
    # The module that programs import, and not this second copy of it, must know what is installed.
    importlib.import_module(f"{_PACKAGE}.install").main()
else:
    sys.modules[__name__].__class__ = _Callable
