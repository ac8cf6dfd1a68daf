"""The Megatron layer: MimoModel with its own parallelism per module, on our bridge.

Importing this package imports no Megatron; the names below load their module on first use.
``mimo_ext.megatron.cpu()`` lets Megatron train on CPU and gloo, see `mimo_ext.megatron.cpu`;
``mimo_ext.megatron.install()`` runs unmodified Megatron programs on our classes, see `mimo_ext.megatron.install`.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "MIMO_LANGUAGE_MODULE_KEY": "role",
    "ModuleLayout": "role",
    "ModuleStageInfo": "role",
    "RankRole": "role",
    "MegatronMIMOParallelismConfig": "config",
    "MimoParallelismConfig": "config",
    "ModuleParallelismConfig": "config",
    "build_hypercomm_grids": "builder",
    "BridgeCommunicator": "communicator",
    "MultiModulePipelineCommunicator": "communicator",
    "MimoModel": "model",
    "MegatronMIMOInfra": "provider",
    "MegatronMIMOProvider": "provider",
    "MimoModelInfra": "provider",
    "MimoModelProvider": "provider",
    "FoldedMimoOptimizer": "folding",
    "overlapped": "overlap",
    "premultiply_in_reduction": "premultiply",
    "uninstall": "install",
}
_MODULES = (
    "builder",
    "communicator",
    "config",
    "cpu",
    "cpu_layers",
    "ddp",
    "folding",
    "install",
    "model",
    "overlap",
    "parallel_utils",
    "premultiply",
    "provider",
    "role",
)

__all__ = [*sorted(_HOME), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
