"""Factors that are known before gradients are reduced, multiplied by NCCL while it reduces.

    premultiply_in_reduction(infra, module_to_grid_tuple, calculate_per_token_loss=True)

after the model is wrapped with DDP takes the place of two passes over the gradient buffers: DDP's own (by one over the
data-parallel ranks) and the constant part of the correction that `finalize_model_grads_multimodule` makes or folds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mimo_ext.megatron.parallel_utils import _PREMULTIPLIED, _constant_correction, is_current_rank_in_grid
from mimo_ext.megatron.role import MIMO_LANGUAGE_MODULE_KEY

_DTYPES = (torch.float32, torch.float64)
_REDUCTIONS = frozenset(
    {
        "allreduce",
        "allreduce_coalesced",
        "_reduce_scatter_base",
        "reduce_scatter_single",
        "reduce_scatter_single_coalesced",
        "reduce_scatter_tensor_coalesced",
    }
)


def premultiply_in_reduction(
    infra: Any, module_to_grid_tuple: list[tuple[Any, Any]], *, calculate_per_token_loss: bool
) -> dict[str, float]:
    """Let NCCL multiply gradients while it sums them (``PREMUL_SUM``), for each of this rank's modules; once per model.

    Args:
        infra: MimoModelInfra, as for the gradient hooks.
        module_to_grid_tuple: this rank's ``(module, grid)`` pairs, each module wrapped with DDP.
        calculate_per_token_loss: the language model's. Then the number of tokens stays to be divided by.

    Returns:
        Module name -> by how much more than DDP's own factor its reduced gradients are multiplied; finalization leaves
        that out.

    Raises:
        ValueError: a module's reduction cannot multiply: another backend than NCCL, other gradients than float32 or
            float64, an average instead of a sum, sums accumulated outside of NCCL, several optimizer instances, or it
            does so already. Nothing has been changed then.
        RuntimeError: this PyTorch has no way to ask for it.
    """
    if getattr(dist, "_make_nccl_premul_sum", None) is None:
        raise RuntimeError(f"PyTorch {torch.__version__} cannot make NCCL's PREMUL_SUM (_make_nccl_premul_sum)")
    language_grid = infra.module_to_grid_map.get(MIMO_LANGUAGE_MODULE_KEY)
    chosen: list[tuple[str, Any, float]] = []
    for module, grid in module_to_grid_tuple:
        if module is None or not is_current_rank_in_grid(grid):
            continue
        name = next((n for n, known in infra.module_to_grid_map.items() if known is grid), None)
        if name is None:
            continue
        _check(name, module)
        factor = _constant_correction(name, module, grid, language_grid, calculate_per_token_loss)
        chosen.append((name, module, factor))
    for _, module, factor in chosen:
        for bucket_group in _bucket_groups(module):
            _multiply_in(bucket_group, factor)
        setattr(module, _PREMULTIPLIED, factor)
    return {name: factor for name, _, factor in chosen}


class PremultiplyingGroup:
    """An NCCL process group whose sums multiply every rank's part by `factor` first; all else is the group's.

    `torch.distributed`'s functions take it wherever they take the group itself.
    """

    def __init__(self, group: Any, factor: float) -> None:
        self.group = group
        self.factor = factor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.group, name)
        if name not in _REDUCTIONS:
            return method

        def reduce(*args: Any, **kwargs: Any) -> Any:
            options = kwargs["opts"] if "opts" in kwargs else args[-1]
            if options.reduceOp != dist.ReduceOp.SUM:
                raise ValueError(f"{name}: expected a sum of gradients, to be multiplied, got {options.reduceOp}")
            options.reduceOp = dist._make_nccl_premul_sum(self.factor)
            return method(*args, **kwargs)

        return reduce


def _bucket_groups(module: Any) -> list[Any]:
    return [*module.bucket_groups, *module.expert_parallel_bucket_groups]


def _group_attribute(bucket_group: Any) -> str:
    """The name under which Megatron keeps the process group of the bucket group's reduction."""
    distributed = bucket_group.ddp_config.use_distributed_optimizer
    return "intra_distributed_optimizer_instance_group" if distributed else "data_parallel_group"


def _multiply_in(bucket_group: Any, factor: float) -> None:
    attribute = _group_attribute(bucket_group)
    group = getattr(bucket_group, attribute)
    own = bucket_group.buckets[0].gradient_scaling_factor
    if own * factor != 1.0:
        setattr(bucket_group, attribute, PremultiplyingGroup(group, own * factor))
    for bucket in bucket_group.buckets:
        bucket.gradient_scaling_factor = 1.0


def _check(name: str, module: Any) -> None:
    """Raise where the reductions of the module cannot multiply."""
    where = f"Rank {dist.get_rank()}, module '{name}'"
    if _PREMULTIPLIED in vars(module):
        raise ValueError(f"{where}: expected a reduction that multiplies nothing yet, got one that does")
    for setting, expected in (
        ("average_in_collective", False),
        ("reduce_scatter_with_fp32_accumulation", False),
        ("num_distributed_optimizer_instances", 1),
    ):
        got = getattr(module.ddp_config, setting, expected)
        if got != expected:
            raise ValueError(f"{where}: expected {setting}={expected} for a reduction that multiplies, got {got}")
    for bucket_group in _bucket_groups(module):
        backend = dist.get_backend(getattr(bucket_group, _group_attribute(bucket_group)))
        if backend != "nccl":
            raise ValueError(f"{where}: expected NCCL to multiply in the reduction (PREMUL_SUM), got {backend}")
        for bucket in bucket_group.buckets:
            if bucket.grad_data.dtype not in _DTYPES:
                raise ValueError(
                    f"{where}: expected gradients of float32 or float64 to be multiplied in the reduction, got "
                    f"{bucket.grad_data.dtype}; grad_reduce_in_fp32=True reduces in float32"
                )
        if len({bucket.gradient_scaling_factor for bucket in bucket_group.buckets}) > 1:
            raise ValueError(f"{where}: expected one factor for buckets that are reduced together, got several")
