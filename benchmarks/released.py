"""Megatron-Core's own bridge on gloo: what its module says of CUDA and NCCL is replaced, nothing else."""

from __future__ import annotations

import contextlib
import importlib.util
import types
from collections.abc import Iterator
from datetime import timedelta
from typing import Any


class ReleasedUnavailable(RuntimeError):
    """There is nothing to compare with; the text says why."""


def require_released() -> None:
    """Raises ReleasedUnavailable where Megatron-Core is not installed."""
    try:
        found = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ReleasedUnavailable("megatron-core is not installed: see README, 'Install'")


def copy_of(module: types.ModuleType, **replaced: Any) -> types.ModuleType:
    """A module object with the same names: looking one up costs what it costs in the original."""
    copy = types.ModuleType(module.__name__)
    vars(copy).update(vars(module))
    vars(copy).update(replaced)
    return copy


@contextlib.contextmanager
def on_gloo(timeout: timedelta, backend: str = "gloo", **torch_names: Any) -> Iterator[type]:
    """The released `BridgeCommunicator`, working on CPU tensors inside of the block.

    Args:
        timeout: of its process groups.
        backend: of its process groups.
        torch_names: further names of `torch` to replace in its module.
    """
    import torch
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import bridge_communicator as module

    def new_group(ranks: Any = None, **options: Any) -> Any:
        return dist.new_group(ranks, timeout=timeout, **{**options, "backend": backend})

    def new_subgroups(ranks: Any, **options: Any) -> Any:
        return dist.new_subgroups_by_enumeration(ranks, timeout=timeout, **{**options, "backend": backend})

    cpu = torch.device("cpu")
    names = {
        "torch": copy_of(torch, cuda=types.SimpleNamespace(current_device=lambda: cpu), **torch_names),
        "dist": copy_of(dist, new_group=new_group, new_subgroups_by_enumeration=new_subgroups),
    }
    before = {name: vars(module)[name] for name in names}
    vars(module).update(names)
    try:
        yield module.BridgeCommunicator
    finally:
        module.BridgeCommunicator.destroy_broadcast_pgs()
        module.BridgeCommunicator.destroy_bridge_pgs()
        vars(module).update(before)


def grid_of(tp: int, dp: int, rank_offset: int) -> Any:
    """Megatron's grid of a module without pipeline stages."""
    from megatron.core.hyper_comm_grid import HyperCommGrid

    return HyperCommGrid([tp, 1, dp, 1], ["tp", "cp", "dp", "pp"], rank_offset, backend="gloo")
