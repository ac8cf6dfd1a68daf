"""Train Megatron on CPU and gloo: one switch, which this module is.

    import mimo_ext.megatron

    with mimo_ext.megatron.cpu():            # or mimo_ext.megatron.cpu.enable() ... .disable()
        mimo_ext.megatron.cpu.manual_seed(1234, infra.pg_collections["language"])
        ...                                  # build, train

Megatron names CUDA in many places. While the switch is on, in this process:

=============================================== ====================================================================
what Megatron does                              what happens
=============================================== ====================================================================
``torch.cuda.current_device()``                 ``torch.device("cpu")``
``torch.cuda.current_stream()``                 a stream object that does nothing
``torch.cuda.synchronize()``                    nothing
``device="cuda"`` in torch.zeros, empty, ...    the CPU; ``pin_memory`` is not heeded
``tensor.cuda()``                               the tensor itself
``tensor.type()`` of a CPU tensor               ``torch.cuda...``, as the optimizers compare it
``torch.cuda`` random state                     the CPU generator's
RNG tracker                                     one on the CPU generator, with the usual named states
global memory buffer                            exists, also where model-parallel state was never initialized
``HyperCommGrid(backend="nccl")``               the default process group's backend
functions under torch.compile                   run eagerly (the fused kernels' compiler is slower than their gain)
norm behind the last layer of a local spec      works with sequence parallelism, see `mimo_ext.megatron.cpu_layers`
=============================================== ====================================================================

It changes nothing where CUDA is available, may be nested, and is undone exactly on exit. It patches the process, not a
thread: other code in the process sees the same torch.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
)

_depth = 0
_undo: contextlib.ExitStack | None = None


def enable() -> None:
    """Switch on. Each call needs one `disable`."""
    global _depth, _undo
    if _depth == 0 and not torch.cuda.is_available():
        with contextlib.ExitStack() as stack:
            _patch_all(stack)
            _undo = stack.pop_all()
    _depth += 1


def disable() -> None:
    """Switch off, when this is the last of the nested calls. Raises RuntimeError without an `enable`."""
    global _depth, _undo
    if _depth == 0:
        raise RuntimeError("mimo_ext.megatron.cpu.disable() was called without enable()")
    _depth -= 1
    if _depth == 0 and _undo is not None:
        undo, _undo = _undo, None
        undo.close()


def is_enabled() -> bool:
    """Whether the switch is on and in effect (it has no effect where CUDA is available)."""
    return _undo is not None


@contextlib.contextmanager
def switched() -> Iterator[None]:
    """The switch as a context manager; ``mimo_ext.megatron.cpu()`` is this."""
    enable()
    try:
        yield
    finally:
        disable()


def manual_seed(seed: int, pg_collection: Any = None) -> None:
    """Seed a module's random states by its own process groups: on CPU under the switch, on CUDA everywhere.

    Data-parallel replicas start equal, the shards of tensor-parallel weights and the pipeline stages differ. Megatron's
    own function takes the ranks from its global model-parallel state, which modules with own grids do not have.

    Args:
        seed: the same number on all ranks of the module.
        pg_collection: the module's ProcessGroupCollection; None seeds a module that is on one rank.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    def rank_in(name: str) -> int:
        group = getattr(pg_collection, name, None)
        return group.rank() if group is not None else 0

    seed += 100 * rank_in("pp")
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed, tp_rank=rank_in("tp"), ep_rank=rank_in("ep"), etp_rank=rank_in("expt_tp"), force_reset_rng=True
    )


def _patch_all(stack: contextlib.ExitStack) -> None:
    # torch.compile's tables list torch's own functions: they must be complete before one is replaced.
    import torch._dynamo
    from megatron.core import hyper_comm_grid, parallel_state
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from mimo_ext.megatron.cpu_layers import TorchNorm

    def patch(owner: Any, name: str, value: Any) -> None:
        # What was inherited (or absent) in the owner's own namespace is deleted again, not set.
        own = vars(owner)
        if name in own:
            stack.callback(setattr, owner, name, own[name])
        else:
            stack.callback(delattr, owner, name)
        setattr(owner, name, value)

    stack.enter_context(_compiled_functions_run_eagerly())
    for name in _FACTORIES:
        patch(torch, name, _on_cpu(getattr(torch, name)))
    patch(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    patch(torch.Tensor, "type", _type_as_on_cuda(torch.Tensor.type))

    device, stream = torch.device("cpu"), _Stream()
    patch(torch.cuda, "current_device", lambda: device)
    patch(torch.cuda, "current_stream", lambda device=None: stream)
    patch(torch.cuda, "synchronize", lambda device=None: None)
    patch(torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed) and None)
    patch(torch.cuda, "get_rng_state", lambda device="cuda": torch.get_rng_state())
    patch(torch.cuda, "set_rng_state", lambda new_state, device="cuda": torch.set_rng_state(new_state))

    patch(megatron_random, "_get_cuda_rng_state", _get_rng_state)
    patch(megatron_random, "_set_cuda_rng_state", _set_rng_state)
    tracker = _tracker_class(megatron_random)
    patch(megatron_random, "CudaRNGStatesTracker", tracker)
    patch(megatron_random, "_CUDA_RNG_STATE_TRACKER", tracker())
    patch(megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True)

    _provide_memory_buffer(parallel_state, stack, patch)
    if transformer_block.LayerNormImpl is WrappedTorchNorm:
        patch(transformer_block, "LayerNormImpl", TorchNorm)
    grid = hyper_comm_grid.HyperCommGrid
    patch(grid, "__init__", _backend_of_default_group(grid.__init__))


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int)  # torch takes a plain number as an accelerator's index


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The factory function with "cuda" read as "cpu"."""

    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and _is_cuda(device):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)  # memory is pinned for an accelerator
        return factory(*args, **kwargs)

    return on_cpu


def _type_as_on_cuda(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type`` that names CPU tensors as if they were on CUDA, and casts to such names on the CPU."""

    @functools.wraps(tensor_type)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        result = tensor_type(self, dtype, *args, **kwargs)
        if isinstance(result, str) and self.device.type == "cpu":
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    return type_


class _Stream:
    """A stream on which nothing is ever pending."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Any = None) -> Any:
        """Nothing to record."""
        return event


@contextlib.contextmanager
def _compiled_functions_run_eagerly() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _tracker_class(megatron_random: types.ModuleType) -> type:
    """Megatron's tracker of named random states, on the CPU generator."""
    base: Any = megatron_random.CudaRNGStatesTracker
    default_name = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME

    class CpuRNGStatesTracker(base):
        """Named random states. A state that was never seeded starts from ``torch.initial_seed()``, with a warning."""

        _current_state_name: str

        @contextlib.contextmanager
        def fork(self, name: str = default_name) -> Iterator[None]:
            if name not in self.states_:
                logger.warning(
                    "random state '%s' was never seeded; tensor-parallel ranks draw equal numbers. "
                    "Call mimo_ext.megatron.cpu.manual_seed().",
                    name,
                )
                self.add(name, torch.initial_seed() + 2718 + len(self.states_))
            outer_name, outer_state = self._current_state_name, torch.get_rng_state()
            # Kept by name: an inner fork of the same state must go on where the outer one stands, and the reverse.
            if outer_name in self.states_:
                self.states_[outer_name] = outer_state
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(self.states_.get(outer_name, outer_state))
                self._current_state_name = outer_name

    return CpuRNGStatesTracker


def _provide_memory_buffer(
    parallel_state: Any, stack: contextlib.ExitStack, patch: Callable[[Any, str, Any], None]
) -> None:
    """A global memory buffer, before and after ``initialize_model_parallel``, which insists on making its own."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is not None:
        return
    from megatron.core.utils import GlobalMemoryBuffer

    ours = GlobalMemoryBuffer()
    original = parallel_state._set_global_memory_buffer

    def take_back() -> None:
        if parallel_state._GLOBAL_MEMORY_BUFFER is ours:
            parallel_state._GLOBAL_MEMORY_BUFFER = None

    def set_buffer() -> None:
        take_back()
        original()

    stack.callback(take_back)
    parallel_state._GLOBAL_MEMORY_BUFFER = ours
    patch(parallel_state, "_set_global_memory_buffer", set_buffer)


def _backend_of_default_group(init: Callable[..., None]) -> Callable[..., None]:
    """``HyperCommGrid.__init__`` that takes "nccl" for whatever the default process group uses."""

    @functools.wraps(init)
    def init_grid(
        self: Any, shape: Any, dim_names: Any, rank_offset: int = 0, backend: str | None = None, **kwargs: Any
    ) -> None:
        if backend == "nccl":
            backend = dist.get_backend() if dist.is_initialized() else "gloo"
        init(self, shape, dim_names, rank_offset, backend, **kwargs)

    return init_grid


class _Switch(types.ModuleType):
    """This module, which can be called."""

    def __call__(self) -> contextlib.AbstractContextManager[None]:
        return switched()


sys.modules[__name__].__class__ = _Switch
