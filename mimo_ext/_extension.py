"""Loads the C++ side. Everything else in the package takes `_C` from here."""

from __future__ import annotations

import torch

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"the C++ extension of mimo_ext could not be loaded ({error}).\n"
        "In a source tree build it first: `python setup.py build_ext --inplace`; to install: "
        "`pip install --no-build-isolation .` in an environment that has torch."
    ) from error


def _check_torch_version() -> None:
    """C++ classes of torch change their layout between minor releases: a mismatch would crash later, somewhere else."""
    built, running = _C.TORCH_VERSION, torch.__version__
    if built.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(
            f"mimo_ext was built against torch {built} but runs with torch {running}; "
            "rebuild it here: `pip install --no-build-isolation --force-reinstall --no-deps .`"
        )


_check_torch_version()


def has_cuda() -> bool:
    """Whether the extension was built with its CUDA kernels."""
    return bool(_C.WITH_CUDA)
