"""Random states of modules that share their ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


class ModuleRandomState:
    """Random states of one module, apart from those of the process, which are the language model's.

    Inside `own()` the default generator and Megatron's tracked states are the module's: equal on its tensor-parallel
    ranks where Megatron's layers need equal numbers, different where they need different ones. Modules that share their
    ranks cannot share these states: the tensor-parallel ranks of one are data-parallel ranks of the other, draw
    different amounts for it (one has more pictures), and would then drop different elements of the same hidden states.

    The states start from ``torch.initial_seed()``, as `mimo_ext.megatron.cpu.manual_seed` seeds a module on ranks of
    its own, and start anew when that changes. Seed all ranks alike.

    Args:
        tp_rank: of this rank in the module's grid.
    """

    def __init__(self, tp_rank: int) -> None:
        self._tp_rank = tp_rank
        self._seed: int | None = None
        self._states: Any = None

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """The module's states inside; outside all is as if nothing had been drawn."""
        seed, outer = torch.initial_seed(), _capture()
        if seed == self._seed and (self._states[2] is None) == (outer[2] is None):
            _restore(self._states)
        else:
            _seed_anew(seed, self._tp_rank, outer)
        try:
            yield
        finally:
            self._seed, self._states = seed, _capture()
            _restore(outer)


def tp_rank_in(grid: Any) -> int:
    """Coordinate of the current rank in the grid's tp dim; needs no process group."""
    stride = 1
    for dim, size in zip(grid.dim_names, grid.shape, strict=True):  # the first varies fastest
        if dim == "tp":
            return (dist.get_rank() - grid.rank_offset) // stride % size
        stride *= size
    return 0


def _tracker() -> Any:
    """Megatron's tracker where it has been seeded, else None."""
    from megatron.core.tensor_parallel import random

    if not random._CUDA_RNG_STATE_TRACKER_INITIALIZED:
        return None
    tracker = random.get_cuda_rng_tracker()
    return tracker if tracker.get_states() else None


def _capture() -> tuple[torch.Tensor, Any, Any]:
    """(state of the CPU generator, of the CUDA generator or None, tracked states or None)."""
    from megatron.core.tensor_parallel import random

    tracker = _tracker()
    if tracker is not None:
        return random._get_all_rng_states()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None, None


def _restore(states: tuple[torch.Tensor, Any, Any]) -> None:
    from megatron.core.tensor_parallel import random

    cpu, cuda, tracked = states
    if tracked is not None and _tracker() is not None:
        # A copy: the tracker writes into the dictionary that it is given.
        random._set_all_rng_states(cpu, cuda, dict(tracked))
        return
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


def _seed_anew(seed: int, tp_rank: int, outer: tuple[torch.Tensor, Any, Any]) -> None:
    from megatron.core.tensor_parallel import random

    torch.manual_seed(seed)
    if outer[2] is not None:
        random.model_parallel_cuda_manual_seed(seed, tp_rank=tp_rank, ep_rank=0, etp_rank=0)
