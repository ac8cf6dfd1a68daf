"""What a training loop needs for modules with their own parallelism: schedule groups, gradient hooks, checks.

The functions given to Megatron's schedule are bound with `functools.partial`:

    model.config.no_sync_func = partial(multimodule_no_sync, module_to_grid_tuple=pairs)
    model.config.finalize_model_grads_func = partial(
        finalize_model_grads_multimodule, infra=infra, module_to_grid_tuple=pairs
    )

Gradients follow one formula. A module's DDP has multiplied the sum over its ranks by ``p``: 1 with
``calculate_per_token_loss``, else 1 / (DP x CP of its grid). Wanted is ``target`` times that sum: 1 / N with N tokens
in the global batch where the loss is per token, else 1 / (DP x CP of the language module). So every module is rescaled
by ``target / p``, whatever its sizes and flag. The sum counts an encoder that is replicated over CP once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed.finalize_model_grads import finalize_model_grads as _finalize_model_grads
from megatron.core.models.mimo import MimoModel
from megatron.core.utils import get_model_config

from mimo_ext._arguments import checked_int
from mimo_ext.megatron.role import MIMO_LANGUAGE_MODULE_KEY

logger = logging.getLogger(__name__)

_PREMULTIPLIED = "gradient_premultiplier"  # attribute of a DDP whose reduction has multiplied by more than DDP's factor


def _get_dp_size_from_grid(grid: Any) -> int:
    """DP size from the grid's shape: needs no process group, so it works on ranks outside the grid too."""
    return grid.shape[grid.dim_names.index("dp")]


def unwrap_megatron_mimo_model(model: Any) -> Any:
    """The MimoModel inside Float16Module, DDP and other wrappers.

    Raises:
        RuntimeError: there is none inside.
    """
    unwrapped = model
    while not isinstance(unwrapped, MimoModel):
        if not hasattr(unwrapped, "module"):
            raise RuntimeError(
                f"Failed to unwrap model to MimoModel: expected one inside {type(model).__name__}, "
                f"got {type(unwrapped).__name__}"
            )
        unwrapped = unwrapped.module
    return unwrapped


def is_current_rank_in_grid(grid: Any) -> bool:
    """Whether this rank is one of the grid's."""
    return bool(grid.rank_offset <= dist.get_rank() < grid.rank_offset + grid.size)


def get_active_module_pg(megatron_mimo_infra: Any) -> tuple[str, Any]:
    """``(name, process groups)`` of the one module of this rank.

    Raises:
        AssertionError: this rank has no module, or several (colocated modules).
    """
    active = [(name, groups) for name, groups in megatron_mimo_infra.pg_collections.items() if groups is not None]
    if len(active) != 1:
        raise AssertionError(
            "expected exactly one module with process groups on this rank, "
            f"got {len(active)}: {[name for name, _ in active]}"
        )
    return active[0]


def get_module_to_grid_tuple(megatron_mimo_model: Any, infra: Any) -> list[tuple[Any, Any]]:
    """``(module, grid)`` of each of this rank's modules, as the gradient hooks take them.

    Args:
        megatron_mimo_model: the MimoModel, wrapped or not.
        infra: MimoModelInfra; give the same object to the hooks, which find a module's name by its grid.
    """
    model = unwrap_megatron_mimo_model(megatron_mimo_model)
    pairs = []
    for name, grid in infra.module_to_grid_map.items():
        if not is_current_rank_in_grid(grid):
            continue
        if name == MIMO_LANGUAGE_MODULE_KEY:
            pairs.append((model.language_model, grid))
        elif name in getattr(model, "modality_submodules", {}):
            pairs.append((model.modality_submodules[name], grid))
        else:
            logger.warning("rank %d: module '%s' is not in the MimoModel and is left out", dist.get_rank(), name)
    return pairs


def build_pg_collection_for_schedule(infra: Any) -> Any:
    """Process groups in the form that Megatron's schedules take.

    Returns:
        MultiModuleProcessGroupCollection of this rank's modules; a list of their ProcessGroupCollections where that
        class is missing or refuses them.
    """
    active = {name: groups for name, groups in infra.pg_collections.items() if groups is not None}
    try:
        from megatron.core.process_groups_config import MultiModuleProcessGroupCollection

        return MultiModuleProcessGroupCollection(
            module_pgs=active,
            language_model_module_name=MIMO_LANGUAGE_MODULE_KEY if MIMO_LANGUAGE_MODULE_KEY in active else None,
        )
    except (ImportError, TypeError, ValueError) as error:
        logger.warning("MultiModuleProcessGroupCollection failed (%s); the schedule gets a list", error)
        return list(active.values())


@contextlib.contextmanager
def multimodule_no_sync(*, module_to_grid_tuple: list[tuple[Any, Any]]) -> Iterator[None]:
    """Hold back the gradient reduction of all of this rank's modules.

    Modules without ``no_sync`` (not wrapped with DDP) are passed over. Every entered context is left again, also when
    entering another one or the body raises.
    """
    with contextlib.ExitStack() as stack:
        for module in _participating(module_to_grid_tuple):
            if hasattr(module, "no_sync"):
                context = module.no_sync()
                context.__enter__()
                stack.callback(context.__exit__, None, None, None)
        yield


def finalize_model_grads_multimodule(
    model: Any,
    num_tokens: torch.Tensor | None = None,
    pg_collection: Any = None,
    force_all_reduce: bool | None = None,
    *,
    infra: Any,
    module_to_grid_tuple: list[tuple[Any, Any]],
    fold_into: Any = None,
) -> None:
    """Reduce the gradients of each module over its own groups and bring all to one scale (see the module docstring).

    Collective over the world when ``num_tokens`` is given. Nothing here waits for a CUDA device. With zero tokens the
    gradients are left as they were reduced.

    Args:
        model: passed by the schedule, not used.
        num_tokens: 0-d integer tensor, tokens of this rank's loss (0 on encoder ranks); None unless the loss is per
            token. Holds the number of the global batch afterwards, on every rank.
        pg_collection: passed by the schedule, not used: each module has its own.
        force_all_reduce: passed on to each module's reduction.
        infra: MimoModelInfra with ``module_to_grid_map`` and ``pg_collections``.
        module_to_grid_tuple: this rank's ``(module, grid)`` pairs; the grids are those of ``infra``, by identity.
        fold_into: the `FoldedMimoOptimizer` whose step multiplies the gradients by their factor; until then they stay
            as they were reduced. None: they are multiplied here, by a pass over each module's buffers.

    Raises:
        RuntimeError: with ``overlap_grad_reduce``: the last microbatch gave a module of several buckets no gradients.
            With ``fold_into``: no step has taken the factors of the finalization before.
        TypeError: ``fold_into`` takes no factors; ``num_tokens`` is no tensor.
        ValueError: a module of this rank has a grid that is none of ``infra``'s: nobody would reduce its gradients.
    """
    if num_tokens is not None and not isinstance(num_tokens, torch.Tensor):
        raise TypeError(
            f"Rank {dist.get_rank()}: num_tokens: expected a 0-d integer tensor or None, got {num_tokens!r} "
            f"({type(num_tokens).__name__})"
        )
    if fold_into is not None:
        if not hasattr(fold_into, "set_pending_factors"):
            raise TypeError(
                f"Rank {dist.get_rank()}: expected a FoldedMimoOptimizer as fold_into (it is made of a MimoOptimizer), "
                f"got {type(fold_into).__name__}, which takes no factor of the gradients"
            )
        fold_into.check_no_factor_is_pending()
    language_grid = infra.module_to_grid_map.get(MIMO_LANGUAGE_MODULE_KEY)
    per_token = num_tokens is not None and language_grid is not None

    mine: list[tuple[str, Any, Any]] = []
    for module, grid in module_to_grid_tuple:
        if module is None or not is_current_rank_in_grid(grid):
            continue
        name = next((n for n, known in infra.module_to_grid_map.items() if known is grid), None)
        if name is None:
            raise ValueError(
                f"Rank {dist.get_rank()}, module_to_grid_tuple: expected grids of infra.module_to_grid_map (the same "
                f"objects, of {sorted(infra.module_to_grid_map)}), got another one with a {type(module).__name__}: the "
                "gradients of that module would not be reduced. Give get_module_to_grid_tuple this very infra."
            )
        mine.append((name, module, grid))

    finalized: list[tuple[str, Any, Any]] = []
    pending: dict[str, Any] = {}
    for name, module, grid in mine:
        groups = infra.pg_collections.get(name)
        if groups is None:
            continue
        # The language module's own finalization sums num_tokens over its ranks and divides by the total. Encoder ranks
        # have counted nothing yet; they get the total below.
        gets_tokens = per_token and name == MIMO_LANGUAGE_MODULE_KEY
        _start_missing_reduction(name, module, force_all_reduce)
        with contextlib.ExitStack() as stack:
            noted = stack.enter_context(_noting_scales(module)) if fold_into is not None else {}
            _finalize_model_grads(
                [module],
                num_tokens=num_tokens if gets_tokens else None,
                pg_collection=groups,
                force_all_reduce=force_all_reduce,
            )
        finalized.append((name, module, grid))
        pending[name] = noted.get("factor", 1.0)

    for name, module, factor in _corrections(finalized, num_tokens if per_token else None, language_grid):
        if fold_into is None:
            module.scale_gradients(factor)
        else:
            pending[name] = pending[name] * factor
    if fold_into is not None:
        fold_into.set_pending_factors(pending, {name: module for name, module, _ in finalized})


@contextlib.contextmanager
def _noting_scales(module: Any) -> Iterator[dict[str, Any]]:
    """While open, ``module.scale_gradients`` leaves the gradients alone; "factor" is what it would have multiplied."""
    noted: dict[str, Any] = {}

    def note(factor: Any) -> None:
        noted["factor"] = noted.get("factor", 1.0) * factor

    module.scale_gradients = note  # of this instance; the method is the class's
    try:
        yield noted
    finally:
        del module.scale_gradients


def _corrections(
    finalized: list[tuple[str, Any, Any]], num_tokens: torch.Tensor | None, language_grid: Any
) -> Iterator[tuple[str, Any, Any]]:
    """``(name, module, target / p)`` of the modules whose reduced gradients need it; with tokens collective."""
    for name, module, grid in finalized:
        if num_tokens is None or name == MIMO_LANGUAGE_MODULE_KEY:
            known = _constant_correction(name, module, grid, language_grid, num_tokens is not None)
            factor = known / _premultiplied(module)
            if factor != 1.0:
                yield name, module, factor
    if num_tokens is None:
        return

    dist.broadcast(num_tokens, src=language_grid.rank_offset + language_grid.size - 1)
    encoders = [entry for entry in finalized if entry[0] != MIMO_LANGUAGE_MODULE_KEY]
    if not encoders:
        return
    one_over_tokens = _one_over(num_tokens)
    if one_over_tokens is None:
        return
    for name, module, grid in encoders:
        scale = _constant_correction(name, module, grid, language_grid, True) / _premultiplied(module)
        if isinstance(one_over_tokens, torch.Tensor):
            yield name, module, torch.where(one_over_tokens > 0, one_over_tokens * scale, 1.0)
        else:
            yield name, module, one_over_tokens * scale


def _start_missing_reduction(name: str, module: Any, force_all_reduce: bool | None) -> None:
    """Take part in a reduction that this rank has not started, because its last microbatch gave the module nothing.

    With ``overlap_grad_reduce`` DDP reduces a bucket once all of its gradients are there. The ranks whose samples have
    pictures have done so; on one whose last samples are text alone no gradient of the encoder has come.

    Raises:
        RuntimeError: several buckets are to be reduced, and this rank does not know in which order the others did it.
    """
    groups = getattr(module, "bucket_groups", None)
    if not isinstance(groups, list) or not module.ddp_config.overlap_grad_reduce:
        return
    if module.ddp_config.num_distributed_optimizer_instances > 1:
        return  # such reductions leave no handle by which to know
    # Before its first gradients a bucket is reduced when gradients are finalized, in any case.
    missing = [
        g for g in groups if g.grad_reduce_handle is None and not g.grad_reduce_finished and not g.is_first_batch
    ]
    if len(missing) > 1:
        raise RuntimeError(
            f"Rank {dist.get_rank()}, module '{name}': expected gradients of all parameters from the last microbatch, "
            f"got none for {len(missing)} buckets (no sample of this rank has the modality?). Use "
            "overlap_grad_reduce=False, or a bucket_size that holds the module in one bucket."
        )
    for group in missing:
        group.start_grad_sync(force_all_reduce=force_all_reduce)


def _one_over(num_tokens: Any) -> float | torch.Tensor | None:
    """1 / N: on the CPU a number, None for N == 0; on a device a 0-d tensor, 0 for N == 0, that nobody waits for."""
    if _on_host(num_tokens):
        total = num_tokens.item()
        return 1.0 / total if total > 0 else None
    return (num_tokens > 0) / num_tokens.clamp(min=1)


def _on_host(tensor: Any) -> bool:
    """Whether reading the tensor's value waits for no device."""
    return tensor.device.type == "cpu"


def _inverse_of_applied(name: str, module: Any, grid: Any) -> float:
    """1 / p, divided by the copies of one gradient that DDP's sum counted."""
    inverse = 1.0 if get_model_config(module).calculate_per_token_loss else float(_summed_ranks(grid))
    return inverse if name == MIMO_LANGUAGE_MODULE_KEY else inverse / _cp_replicas(module, grid)


def _constant_correction(name: str, module: Any, grid: Any, language_grid: Any, per_token: bool) -> float:
    """The part of a module's ``target / p`` that is known before the number of tokens is."""
    if not per_token:
        return _inverse_of_applied(name, module, grid) / (
            _summed_ranks(language_grid) if language_grid is not None else 1
        )
    # Megatron's own finalization does all that the language module needs.
    return 1.0 if name == MIMO_LANGUAGE_MODULE_KEY else _inverse_of_applied(name, module, grid)


def _premultiplied(module: Any) -> float:
    """What the module's reduction has multiplied the gradients by, on top of DDP's own factor."""
    return vars(module).get(_PREMULTIPLIED, 1.0)


def _summed_ranks(grid: Any) -> int:
    """Ranks over which DDP sums the gradient of one weight shard: DP x CP (x gtp_remat)."""
    others = _dims(grid)
    return _get_dp_size_from_grid(grid) * others.get("cp", 1) * others.get("gtp_remat", 1)


def _cp_replicas(module: Any, grid: Any) -> int:
    """CP ranks of an encoder that compute the very same gradient.

    All of them, unless the encoder's own config says that it splits its sequence over CP: then each has a part.
    """
    cp_size = _dims(grid).get("cp", 1)
    splits_sequence = getattr(get_model_config(module), "context_parallel_size", 1) == cp_size
    return 1 if splits_sequence else cp_size


def _dims(grid: Any) -> dict[str, int]:
    """Dim name -> size; empty for a grid that declares none."""
    names, shape = getattr(grid, "dim_names", None), getattr(grid, "shape", None)
    if not isinstance(names, (list, tuple)) or not isinstance(shape, (list, tuple)):
        return {}
    return dict(zip(names, shape, strict=True))


def zero_grad_buffer_for_multimodule(module_to_grid_tuple: list[tuple[Any, Any]]) -> None:
    """Zero the gradient buffers of this rank's DDP-wrapped modules; others are passed over."""
    for module in _participating(module_to_grid_tuple):
        if hasattr(module, "zero_grad_buffer"):
            module.zero_grad_buffer()


def _participating(module_to_grid_tuple: list[tuple[Any, Any]]) -> list[Any]:
    return [m for m, grid in module_to_grid_tuple if m is not None and is_current_rank_in_grid(grid)]


def validate_no_stub_ranks(module_to_grid_map: dict[str, Any], world_size: int) -> None:
    """Check that every rank runs a module.

    Raises:
        ValueError: names the ranks that run none, or a module with ranks that are not there.
    """
    used: set[int] = set()
    for name, grid in module_to_grid_map.items():
        if grid.rank_offset < 0 or grid.rank_offset + grid.size > world_size:
            raise ValueError(
                f"Module '{name}': expected ranks of the world, 0..{world_size - 1}, got ranks [{grid.rank_offset}, "
                f"{grid.rank_offset + grid.size})."
            )
        used.update(range(grid.rank_offset, grid.rank_offset + grid.size))
    idle = sorted(set(range(world_size)) - used)
    if idle:
        raise ValueError(
            f"Ranks {idle} do not participate in any module. Every one of the {world_size} ranks needs a module: "
            f"change the parallelism config, or start {len(used)} ranks."
        )


def validate_data_loader_contract(
    infra: Any, global_batch_size: int, micro_batch_size: int, num_microbatches: int
) -> None:
    """Check that the batch divides as the schedule and the data loaders will divide it.

    Args:
        infra: MimoModelInfra.
        global_batch_size: samples of one optimizer step.
        micro_batch_size: samples of one microbatch, before each module takes its data-parallel share.
        num_microbatches: microbatches of one optimizer step.

    Raises:
        ValueError: names the number, the module and its DP size.
        TypeError: a number that is not whole.
    """
    numbers = {
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
        "num_microbatches": num_microbatches,
    }
    for name, number in numbers.items():
        checked_int("data loaders", name, number, 1)
    samples = num_microbatches * micro_batch_size
    if samples != global_batch_size:
        raise ValueError(
            f"Microbatch mismatch: {num_microbatches} * {micro_batch_size} = {samples} "
            f"!= global_batch_size ({global_batch_size})"
        )
    for name, grid in infra.module_to_grid_map.items():
        # Some grids answer by process group only; megatron-core's own has no such method.
        dp_size = grid.get_pg_size(["dp"]) if hasattr(grid, "get_pg_size") else _get_dp_size_from_grid(grid)
        for what, size in (("Micro batch size", micro_batch_size), ("Global batch size", global_batch_size)):
            if size % dp_size:
                raise ValueError(f"{what} {size} not divisible by {name} DP size {dp_size}")
