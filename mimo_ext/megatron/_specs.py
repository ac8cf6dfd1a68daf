"""What the provider changes in module specs. The user's own specs are never changed."""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from typing import Any

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec

from mimo_ext.megatron.config import ModuleParallelismConfig

logger = logging.getLogger(__name__)


def language_spec_with_groups(
    spec: ModuleSpec, pg_collection: Any, pre_process: bool | None, post_process: bool | None
) -> ModuleSpec:
    """A deep copy with the groups, and with the stage's flags where they are given."""
    spec = copy.deepcopy(spec)
    params = spec.params = {} if spec.params is None else spec.params
    params["pg_collection"] = pg_collection
    if pre_process is not None:
        params["pre_process"] = pre_process
    if post_process is not None:
        params["post_process"] = post_process
    return spec


def modality_spec_with_groups(spec: ModuleSpec, pg_collection: Any) -> ModuleSpec:
    """A deep copy whose encoders have the groups and the TP size, and whose projections have the TP group."""
    spec = copy.deepcopy(spec)
    submodules = spec.submodules or {}
    tp_group = getattr(pg_collection, "tp", None)
    for encoder in submodules.get("encoders", {}).values():
        params = encoder.params = {} if encoder.params is None else encoder.params
        params["pg_collection"] = pg_collection
        config = params.get("transformer_config")
        if config is not None and tp_group is not None:
            config.tensor_model_parallel_size = tp_group.size()
    for projection in submodules.get("input_projections", []):
        if isinstance(projection, ModuleSpec):
            params = projection.params = {} if projection.params is None else projection.params
            params.setdefault("tp_group", tp_group)
    return spec


def set_parallel_sizes(language_spec: ModuleSpec, sizes: ModuleParallelismConfig) -> None:
    """Make the (copied) language config say what the grid says: layers count their share by it."""
    config = (language_spec.params or {}).get("config")
    if not isinstance(config, ModelParallelConfig):
        return
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        size = getattr(sizes, name)
        if getattr(config, name) != size:
            logger.info("language model config: %s is %s, the grid has %s", name, getattr(config, name), size)
            setattr(config, name, size)


def leave_scattering_to_mimo_model(language_spec: ModuleSpec) -> None:
    """Under sequence parallelism MimoModel cuts the sequence, once all modalities are in it: the embedding must not."""
    params = language_spec.params or {}
    option = "scatter_embedding_sequence_parallel"
    if not getattr(params.get("config"), "sequence_parallel", False) or not inspect.isclass(language_spec.module):
        return
    if option in inspect.signature(language_spec.module).parameters:
        params[option] = False


def freeze(module: Any) -> None:
    """Take all parameters out of training."""
    for parameter in module.parameters():
        parameter.requires_grad = False


def give_groups(submodule: Any, pg_collection: Any) -> None:
    """Tell a modality's modules their groups, where `sharded_state_dict` would ask parallel_state for global ones."""
    submodule.pg_collection = pg_collection
    for part in submodule.modules():
        if isinstance(part, MegatronModule) and not hasattr(part, "tp_group"):
            part.tp_group = pg_collection.tp


def _finalize_transformer_configs_in_specs(
    language_spec: ModuleSpec | None, modality_specs: dict[str, ModuleSpec]
) -> None:
    """Call ``finalize()`` of every Megatron-Bridge TransformerConfig in the specs; other objects are left alone."""
    # Nothing can be an instance of the class before its module was imported, so it is not imported for this.
    module = sys.modules.get("megatron.bridge.models.transformer_config")
    if module is None:
        return
    specs: list[Any] = [language_spec]
    for modality_spec in modality_specs.values():
        submodules = getattr(modality_spec, "submodules", None) or {}
        for parts in ("encoders", "decoders"):
            specs.extend((submodules.get(parts) or {}).values())
        for parts in ("input_projections", "output_projections"):
            specs.extend(submodules.get(parts) or [])
    for spec in specs:
        for value in (getattr(spec, "params", None) or {}).values():
            if isinstance(value, module.TransformerConfig) and hasattr(value, "finalize"):
                value.finalize()
