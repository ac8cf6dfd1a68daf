"""Gradient correction without a pass of its own: the step of the optimizer multiplies by it.

    optimizer = FoldedMimoOptimizer(get_mimo_optimizer(model, optimizer_config))
    model.config.finalize_model_grads_func = partial(
        finalize_model_grads_multimodule, infra=infra, module_to_grid_tuple=pairs, fold_into=optimizer
    )

Each module's gradients stay as they were reduced, and its factor waits here, pending. The step takes it into whatever
multiplies the gradients anyway: the division by the loss scale, torch's fused optimizers, clipping.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer

_LEAVES = (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer)
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # their fused kernels divide gradients by `grad_scale`

_Factor: TypeAlias = float | torch.Tensor


class FoldedMimoOptimizer(MimoOptimizer):
    """A MimoOptimizer whose step multiplies each module's gradients by the factor that finalizing them left over.

    Steps, norms, clipping, loss scales and checkpoints are those of the MimoOptimizer that it is made of, whose
    optimizers it goes on with; use that one no more. ``step()`` returns the norm of the corrected gradients. Between
    finalization and step, ``main_grad`` holds the uncorrected gradients, and `pending_factor` says what they lack.

    Args:
        optimizer: what ``get_mimo_optimizer`` returned.

    Raises:
        TypeError: it is no MimoOptimizer, or a module's optimizer is of a kind that cannot take a factor.
        ValueError: a module's optimizer is configured so that it cannot (Megatron FSDP, precision-aware gradients).
    """

    def __init__(self, optimizer: MimoOptimizer) -> None:
        if type(optimizer) is not MimoOptimizer:
            raise TypeError(
                f"FoldedMimoOptimizer: expected a MimoOptimizer (of get_mimo_optimizer), got {type(optimizer).__name__}"
            )
        super().__init__(optimizer.module_infos, optimizer.config)
        self._active = {
            name: info.optimizer
            for name, info in optimizer.module_infos.items()
            if info.is_active and info.optimizer is not None
        }
        for name, module_optimizer in self._active.items():
            _check(name, module_optimizer)
        self._pending: dict[str, _Factor] = {}  # from finalization to prepare_grads
        self._written: list[tuple[str, torch.Tensor, int]] = []  # module, gradient buffer, its version when finalized
        self._remaining: dict[str, _Factor] | None = None  # from prepare_grads to the update
        self._clip: dict[str, _Factor] = {}
        self._updating = False
        for name, module_optimizer in self._active.items():
            for leaf in _leaves(module_optimizer):
                if not leaf.is_stub_optimizer:
                    leaf.optimizer.register_step_pre_hook(lambda *_, name=name: self._refuse_other_steps(name))

    # ------------------------------------------------------------------------------------------- from finalization

    def check_no_factor_is_pending(self) -> None:
        """Raises RuntimeError if gradients were finalized and neither a step nor `zero_grad` came since.

        More gradients would have been added to uncorrected ones, of which some are reduced and some are not.
        """
        if self._pending or self._remaining is not None:
            names = sorted(self._pending or self._remaining or {})
            raise RuntimeError(
                f"Rank {dist.get_rank()}, modules {names}: expected a step of the optimizer (or its zero_grad()) after "
                "gradients were finalized, got another finalization. Their factor has not been applied yet."
            )

    def set_pending_factors(self, factors: dict[str, _Factor], modules: dict[str, Any]) -> None:
        """Keep what each module's reduced gradients are to be multiplied by.

        Args:
            factors: module name -> number or 0-d tensor on the gradients' device, which nobody waits for.
            modules: module name -> its DDP, whose gradient buffers must not be written to before the step.
        """
        self.check_no_factor_is_pending()
        self._pending = dict(factors)
        self._written = [
            (name, gradients, gradients._version)
            for name, module in modules.items()
            for gradients in _gradients(module)
        ]

    def pending_factor(self, name: str) -> _Factor:
        """What the gradients of module `name` lack between finalization and step. KeyError if there is nothing."""
        return self._pending[name]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and forget factors that no step has taken (a step that the training loop left out)."""
        self._pending, self._written, self._remaining, self._clip = {}, [], None, {}
        super().zero_grad(set_to_none)

    # ------------------------------------------------------------------------------------------------- to the step

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Take the pending factors; with a loss scale, correct and unscale the gradients in one pass.

        Returns:
            Whether an infinity or NaN was found (only looked for with a loss scale).

        Raises:
            RuntimeError: the gradients of a module have not been finalized since the last step, or were written to
                after they were.
        """
        factors = self._take()
        found_inf = False
        self._remaining = {}
        for name, optimizer in self._active.items():
            scaled = _has_loss_scale(optimizer)
            with _unscaling_by(optimizer, factors[name]) if scaled else contextlib.nullcontext():
                found_inf |= optimizer.prepare_grads()
            self._remaining[name] = 1.0 if scaled else factors[name]
        return found_inf

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """2-norm of all modules' corrected gradients; collective. Computed of the uncorrected ones' norms."""
        factors = self._pending if self._remaining is None else self._remaining
        # A module's ranks all have its norm, the others have 0.
        squares = torch.zeros(len(self.module_infos), dtype=torch.float32, device=torch.cuda.current_device())
        for index, name in enumerate(sorted(self.module_infos)):
            if name in self._active:
                norm = self._active[name].get_grad_norm()
                if norm is not None:
                    squares[index] = (norm * factors.get(name, 1.0)) ** 2
        dist.all_reduce(squares, op=dist.ReduceOp.MAX)
        return float(squares.sum().sqrt())

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, int | None]:
        """Correct, clip and update; collective over the world.

        Returns:
            ``(success, norm, zeros)``: whether all ranks have updated; norm of the corrected gradients before clipping;
            number of zeros in them, with ``log_num_zeros_in_grad`` (zeros that the factor itself makes are not among
            them). Without success because of an infinity or NaN, ``(False, None, None)``.

        Raises:
            RuntimeError: see `prepare_grads`.
        """
        if _on_any_rank(self.prepare_grads()):
            self._remaining = None
            return False, None, None
        norm = self.get_grad_norm()
        for name, optimizer in self._active.items():
            if not optimizer.is_stub_optimizer and optimizer.config.clip_grad > 0.0:
                self._clip[name] = min(1.0, optimizer.config.clip_grad / (norm + 1e-6))
        zeros = self.count_zeros() if self.config.log_num_zeros_in_grad else None
        failed = _on_any_rank(not self.step_with_ready_grads())
        return not failed, norm, zeros

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Update all modules of this rank with prepared gradients.

        Raises:
            RuntimeError: `prepare_grads` has not been called since the last step.
        """
        if self._remaining is None:
            raise RuntimeError(f"Rank {dist.get_rank()}: expected prepare_grads() before each update, got an update")
        factors, self._remaining = self._remaining, None
        clip, self._clip = self._clip, {}
        success = True
        self._updating = True
        try:
            for name, optimizer in self._active.items():
                with _multiplied(optimizer, factors[name] * clip.get(name, 1.0)):
                    success &= optimizer.step_with_ready_grads()
        finally:
            self._updating = False
        return success

    def _take(self) -> dict[str, _Factor]:
        """The pending factors, which are then pending no more."""
        where = f"Rank {dist.get_rank()}"
        missing = [n for n, o in self._active.items() if not o.is_stub_optimizer and n not in self._pending]
        if missing:
            raise RuntimeError(
                f"{where}, modules {missing}: expected their gradients to be finalized before each step, got none "
                "since the last one. finalize_model_grads_multimodule(..., fold_into=optimizer) does it."
            )
        for name, gradients, version in self._written:
            if gradients._version != version:
                raise RuntimeError(
                    f"{where}, module '{name}': expected gradients as they were finalized, got a gradient buffer that "
                    "was written to since. What was added would be multiplied by the pending factor as well."
                )
        factors = {name: self._pending.get(name, 1.0) for name in self._active}
        self._pending, self._written = {}, []
        return factors

    def _refuse_other_steps(self, name: str) -> None:
        """Hook of every torch optimizer: nothing but this class updates a module whose factor waits."""
        waiting = name in self._pending or self._remaining is not None
        if waiting and not self._updating:
            raise RuntimeError(
                f"Rank {dist.get_rank()}, module '{name}': expected the step of FoldedMimoOptimizer, got one of the "
                "module's own optimizer. Its gradients lack a factor that only the former applies."
            )


def _check(name: str, optimizer: Any) -> None:
    """Raise where the optimizer of module `name` cannot take a factor."""
    for leaf in _leaves(optimizer):
        kind = type(leaf).__name__
        if type(leaf) not in _LEAVES:
            raise TypeError(
                f"Module '{name}': expected one of {[c.__name__ for c in _LEAVES]} to take the gradients' factor, got "
                f"{kind}. Finalize without fold_into."
            )
        if leaf.is_stub_optimizer:
            continue
        if leaf.config.use_precision_aware_optimizer:
            raise ValueError(
                f"Module '{name}', {kind}: expected use_precision_aware_optimizer=False, got True. Its gradients, of "
                "another dtype, cannot take a factor. Finalize without fold_into."
            )
        if getattr(getattr(leaf, "ddp_config", None), "use_megatron_fsdp", False):
            raise ValueError(
                f"Module '{name}', {kind}: expected use_megatron_fsdp=False, got True. Finalize without fold_into."
            )
    if len({bool(getattr(leaf, "grad_scaler", None)) for leaf in _leaves(optimizer) if not leaf.is_stub_optimizer}) > 1:
        raise ValueError(f"Module '{name}': expected a loss scale in all of its optimizers or in none, got some")


def _leaves(optimizer: Any) -> list[Any]:
    return list(optimizer.chained_optimizers) if type(optimizer) is ChainedOptimizer else [optimizer]


def _gradients(module: Any) -> list[torch.Tensor]:
    """The tensors that hold all gradients of a DDP-wrapped module."""
    buffers = [*module.buffers, *module.expert_parallel_buffers]
    return [gradients for buffer in buffers for gradients in [buffer.grad_data, *buffer.extra_main_grads]]


def _has_loss_scale(optimizer: Any) -> bool:
    return any(getattr(leaf, "grad_scaler", None) for leaf in _leaves(optimizer) if not leaf.is_stub_optimizer)


class _ScalerWithFactor:
    """A loss scaler; unscaling with it multiplies by a factor as well."""

    def __init__(self, scaler: Any, factor: _Factor) -> None:
        self._scaler = scaler
        self.inv_scale = scaler.inv_scale * factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scaler, name)


@contextlib.contextmanager
def _unscaling_by(optimizer: Any, factor: _Factor) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for leaf in _leaves(optimizer):
            if getattr(leaf, "grad_scaler", None):
                stack.callback(setattr, leaf, "grad_scaler", leaf.grad_scaler)
                leaf.grad_scaler = _ScalerWithFactor(leaf.grad_scaler, factor)
        yield


@contextlib.contextmanager
def _multiplied(optimizer: Any, factor: _Factor) -> Iterator[None]:
    """While open, updates see gradients multiplied by `factor`: by the fused kernels, else by one pass, now."""
    if isinstance(factor, float) and factor == 1.0:
        yield
        return
    with contextlib.ExitStack() as stack:
        for leaf in _leaves(optimizer):
            if leaf.is_stub_optimizer:
                continue
            if _divides_by_grad_scale(leaf.optimizer):
                scale = 1.0 / factor
                if not isinstance(scale, torch.Tensor):
                    scale = torch.full((), scale, dtype=torch.float32, device=torch.cuda.current_device())
                stack.callback(delattr, leaf.optimizer, "grad_scale")
                leaf.optimizer.grad_scale = scale.float()
            else:
                gradients = [p.grad for p in leaf.get_parameters() if p.grad is not None]
                if gradients:
                    torch._foreach_mul_(gradients, factor)
        yield


def _divides_by_grad_scale(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the update multiplies the gradients by 1 / ``grad_scale`` while it reads them."""
    return type(optimizer) in _FUSED and all(group.get("fused") for group in optimizer.param_groups)


def _on_any_rank(flag: bool) -> bool:
    """Whether it is set on any rank of the world; collective."""
    tensor = torch.tensor([float(flag)], device=torch.cuda.current_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor.item() > 0)
