"""Megatron-Bridge's sources on a CPU: modules are imported without what their packages' `__init__` would import.

`import megatron.bridge` needs Transformer Engine. Its MIMO modules need it not, once their parent packages are empty.
"""

from __future__ import annotations

import os
import sys
import types
import typing
from pathlib import Path

import pytest
import typing_extensions

FOLDER = os.environ.get("MIMO_EXT_MEGATRON_BRIDGE", "")
_PACKAGES = ["", ".models", ".models.megatron_mimo", ".models.mimo", ".models.common", ".training", ".utils"]


def require() -> Path:
    """The folder with the sources. Skips the test where none is named; on CI that is a failure."""
    if Path(FOLDER, "megatron", "bridge").is_dir():
        return Path(FOLDER).resolve()
    reason = f"MIMO_EXT_MEGATRON_BRIDGE is {FOLDER!r}: expected a folder with Megatron-Bridge's sources (pip install "
    reason += "--no-deps --target FOLDER megatron-bridge==0.6.2)"
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(reason)
    pytest.skip(reason)


def use(folder: str) -> None:
    """Make the MIMO modules of Megatron-Bridge importable, for good: call it in a process of its own."""
    if sys.version_info < (3, 12):
        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    sys.path.insert(0, folder)
    import megatron

    for suffix in _PACKAGES:
        name = "megatron.bridge" + suffix
        package = types.ModuleType(name)
        package.__path__ = [str(Path(folder, *name.split(".")))]
        sys.modules[name] = package
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent] if parent != "megatron" else megatron, child, package)
