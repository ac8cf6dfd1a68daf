"""DistributedDataParallel per module: each over the data-parallel ranks of its own grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from mimo_ext.megatron.role import MIMO_LANGUAGE_MODULE_KEY


def wrap_mimo_model_distributed(
    mimo_model: Any,
    ddp_config: Any,
    mimo_parallelism_config: Any,
    grids: Mapping[str, Any],
    pg_collections: Mapping[str, Any],
    *,
    disable_bucketing: bool = False,
) -> Any:
    """Wrap the language model and every modality submodule of this rank with Megatron's DDP, in place.

    Args:
        mimo_model: the model; ``language_model`` may be None.
        ddp_config: DistributedDataParallelConfig for all modules.
        mimo_parallelism_config: accepted for the callers of the released function; the grids say all that is needed.
        grids: module name -> grid.
        pg_collections: module name -> ProcessGroupCollection, None for modules that this rank is not in.
        disable_bucketing: one bucket for all gradients of a module.

    Returns:
        ``mimo_model`` itself.

    Raises:
        ValueError: there are grids, but none for the language model of this rank; ``ddp_config`` is None.
        AttributeError: a modality has no part with a ``config``, which DDP needs for its bucket sizes.
    """
    # Fetched now, not at import: programs replace the class.
    from megatron.core.distributed import DistributedDataParallel

    options: dict[str, Any] = {"disable_bucketing": True} if disable_bucketing else {}

    def wrap(module: Any, config: Any, name: str) -> Any:
        if ddp_config is None:
            raise ValueError(
                f"Rank {dist.get_rank()}, module '{name}': ddp_config: expected a DistributedDataParallelConfig, got "
                "None."
            )
        return DistributedDataParallel(
            config=config, ddp_config=ddp_config, module=module, pg_collection=pg_collections[name], **options
        )

    language_model = mimo_model.language_model
    if language_model is not None and grids and MIMO_LANGUAGE_MODULE_KEY not in grids:
        raise ValueError(
            f"Rank {dist.get_rank()}: expected a grid of the language model under '{MIMO_LANGUAGE_MODULE_KEY}', got "
            f"grids of {list(grids)}. Without one its gradients would not be reduced."
        )
    if language_model is not None and _is_active(MIMO_LANGUAGE_MODULE_KEY, grids, pg_collections):
        wrapped = wrap(language_model, language_model.config, MIMO_LANGUAGE_MODULE_KEY)
        # Megatron's DDP forwards no methods; the schedule and MimoModel call this one on the wrapper.
        if hasattr(wrapped.module, "set_input_tensor"):
            wrapped.set_input_tensor = wrapped.module.set_input_tensor
        mimo_model.language_model = wrapped

    submodules: Any = getattr(mimo_model, "modality_submodules", {})
    for name, submodule in list(submodules.items()):
        if submodule is not None and _is_active(name, grids, pg_collections):
            submodules[name] = wrap(submodule, _config_of_modality(name, submodule), name)
    return mimo_model


def wrap_megatron_mimo_model_distributed(
    megatron_mimo_model: Any,
    ddp_config: Any,
    megatron_mimo_parallelism_config: Any,
    grids: Mapping[str, Any],
    pg_collections: Mapping[str, Any],
) -> Any:
    """`wrap_mimo_model_distributed` under the released generation's name and argument names."""
    return wrap_mimo_model_distributed(
        megatron_mimo_model, ddp_config, megatron_mimo_parallelism_config, grids, pg_collections
    )


def _is_active(name: str, grids: Mapping[str, Any], pg_collections: Mapping[str, Any]) -> bool:
    """Whether the current rank runs the module and has its process groups."""
    grid = grids.get(name)
    if grid is None or pg_collections.get(name) is None:
        return False
    return grid.rank_offset <= dist.get_rank() < grid.rank_offset + grid.size


def _config_of_modality(name: str, submodule: Any) -> Any:
    """Config of the modality's first encoder; without encoders, of its first part that has one."""
    encoders = getattr(submodule, "encoders", None)
    if encoders:
        key, encoder = next(iter(encoders.items()))
        if not hasattr(encoder, "config"):
            raise AttributeError(
                f"Encoder '{key}' in modality '{name}' does not have a 'config' attribute (it is a "
                f"{type(encoder).__name__}). Encoders must be MegatronModule subclasses."
            )
        return encoder.config
    for parts in ("decoders", "input_projections", "output_projections"):
        container = getattr(submodule, parts, None) or []
        for part in container.values() if hasattr(container, "values") else container:
            if hasattr(part, "config"):
                return part.config
    raise AttributeError(
        f"Modality '{name}' has no encoder, decoder or projection with a 'config' attribute; "
        "DistributedDataParallel needs one."
    )
