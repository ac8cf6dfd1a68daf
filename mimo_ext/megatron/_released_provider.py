"""The released generation's provider: `MimoModelProvider` with the names, defaults and order of megatron-bridge 0.6."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec

from mimo_ext.megatron import provider
from mimo_ext.megatron._provider_base import Hook
from mimo_ext.megatron.config import MimoParallelismConfig
from mimo_ext.megatron.provider import MimoModelInfra, MimoModelProvider
from mimo_ext.megatron.role import MIMO_LANGUAGE_MODULE_KEY, RankRole

MegatronMIMOInfra = MimoModelInfra

_SIZES_OF_LANGUAGE = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


@dataclass
class MegatronMIMOProvider(MimoModelProvider):
    """`MimoModelProvider` as megatron-bridge 0.6 knows it.

    Differs from its base in these: the parallelism config's name; `build_infra` is cached (groups are built once,
    however often a recipe calls it); weights are cast and the model is not wrapped in Float16Module;
    `initialize_model_parallel` raises; weights are broadcast over the data-parallel ranks by default; specs can come
    from a standard provider.

    Args:
        standard_provider: provider of a single model with ``build_language_model_spec(pp_rank=)``,
            ``special_token_ids`` and either ``build_mimo_modality_submodules_spec()`` or both ``modality_keys`` and
            ``build_vision_encoder_spec()``.
        megatron_mimo_parallelism_config: sizes and ranks of the modules.
    """

    standard_provider: Any = field(default=None, kw_only=True)
    megatron_mimo_parallelism_config: MimoParallelismConfig | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.standard_provider is not None:
            self._derive_specs()

    @classmethod
    def from_standard_provider(
        cls, standard_provider: Any, megatron_mimo_parallelism_config: MimoParallelismConfig
    ) -> MegatronMIMOProvider:
        """A provider whose specs come from ``standard_provider``, which takes the language module's sizes."""
        return cls(
            standard_provider=standard_provider, megatron_mimo_parallelism_config=megatron_mimo_parallelism_config
        )

    def _parallelism(self) -> MimoParallelismConfig | None:
        released = self.megatron_mimo_parallelism_config
        return released if released is not None else self.mimo_parallelism_config

    def build_infra(self) -> MimoModelInfra:
        """Grids and process groups, built by the first call; collective over the world."""
        if not self._infra_is_current():
            self._remember(super().build_infra())
        assert self._cached_infra is not None
        return self._cached_infra

    def initialize_model_parallel(
        self, seed: int | None = None, seed_kwargs: dict[str, Any] | None = None, **model_parallel_kwargs: Any
    ) -> None:
        """Raise NotImplementedError: global groups would contradict the grids."""
        raise NotImplementedError(
            "MegatronMIMO does not use global model parallelism initialization. "
            "Use finalize() to check the config and build_infra() to build the grids."
        )

    def provide_distributed_model(  # type: ignore[override]
        self,
        ddp_config: Any = None,
        model_type: Any = None,
        overlap_param_gather_with_optimizer_step: bool = False,
        fp16: bool | None = None,
        bf16: bool | None = None,
        use_megatron_fsdp: bool = False,
        use_torch_fsdp2: bool = False,
        wrap_with_ddp: bool = True,
        data_parallel_random_init: bool = True,
        use_cpu_initialization: bool | None = None,
        init_model_with_meta_device: bool | None = None,
        pre_wrap_hook: Hook | list[Hook] | None = None,
        post_wrap_hook: Hook | None = None,
    ) -> list[Any]:
        """As in the base class, with the released defaults and without a mixed-precision wrapper."""
        return super().provide_distributed_model(
            ddp_config=ddp_config,
            model_type=model_type,
            overlap_param_gather_with_optimizer_step=overlap_param_gather_with_optimizer_step,
            fp16=fp16,
            bf16=bf16,
            use_megatron_fsdp=use_megatron_fsdp,
            use_torch_fsdp2=use_torch_fsdp2,
            wrap_with_ddp=wrap_with_ddp,
            data_parallel_random_init=data_parallel_random_init,
            use_cpu_initialization=use_cpu_initialization,
            init_model_with_meta_device=init_model_with_meta_device,
            pre_wrap_hook=pre_wrap_hook,
            post_wrap_hook=post_wrap_hook,
        )

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> Any:
        """As in the base class; the mode of ``model.role`` is a member of megatron-core's own enum."""
        model = super().provide(pre_process, post_process, vp_stage)
        role = getattr(model, "role", None)
        if isinstance(role, RankRole):
            model.role = role.as_released()
        return model

    def _resolve_cpu_initialization(self, argument: bool | None) -> bool:
        return self.use_cpu_initialization if argument is None else argument

    def _wrap_mixed_precision(self, models: list[Any], dtype: torch.dtype, wrapper: Any) -> list[Any]:
        return models

    def _wrap_with_ddp(self, model: Any, ddp_config: Any, infra: MimoModelInfra, disable_bucketing: bool) -> Any:
        if disable_bucketing:
            return super()._wrap_with_ddp(model, ddp_config, infra, disable_bucketing)
        # Looked up in the provider module at each call, where recipes and tests replace it.
        return provider.wrap_megatron_mimo_model_distributed(
            megatron_mimo_model=model,
            ddp_config=ddp_config,
            megatron_mimo_parallelism_config=self._parallelism(),
            grids=infra.module_to_grid_map,
            pg_collections=infra.pg_collections,
        )

    def _language_spec_of_stage(self, language_groups: ProcessGroupCollection) -> ModuleSpec:
        if self.standard_provider is None:
            return super()._language_spec_of_stage(language_groups)
        return self._build_standard_language_model_spec(pp_rank=dist.get_rank(group=language_groups.pp))

    # --- specs from a standard provider

    def _derive_specs(self) -> None:
        source = self.standard_provider
        self._give_standard_provider_the_language_sizes()
        if hasattr(source, "mtp_num_layers"):
            source.mtp_num_layers = None  # multi-token prediction has no route through the modules
        if self.language_model_spec is None:
            self.language_model_spec = self._build_standard_language_model_spec(pp_rank=0)
        if not self.modality_submodules_spec:
            build = getattr(source, "build_mimo_modality_submodules_spec", None)
            self.modality_submodules_spec = build() if callable(build) else _vision_submodules_spec(source)
        if not self.special_token_ids:
            ids = getattr(source, "special_token_ids", None)
            ids = ids() if callable(ids) else ids
            if ids is None:
                raise TypeError("standard_provider must define special_token_ids.")
            self.special_token_ids = dict(ids)

    def _give_standard_provider_the_language_sizes(self) -> None:
        config = self._parallelism()
        sizes = config.module_parallelisms.get(MIMO_LANGUAGE_MODULE_KEY) if config is not None else None
        for name in _SIZES_OF_LANGUAGE if sizes is not None else ():
            if hasattr(self.standard_provider, name):
                setattr(self.standard_provider, name, getattr(sizes, name))

    def _build_standard_language_model_spec(self, pp_rank: int) -> ModuleSpec:
        self._give_standard_provider_the_language_sizes()
        build = getattr(self.standard_provider, "build_language_model_spec", None)
        if not callable(build):
            raise TypeError("standard_provider must define build_language_model_spec().")
        parameters = inspect.signature(build).parameters
        takes_stage = "pp_rank" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if takes_stage:
            return build(pp_rank=pp_rank)
        if pp_rank != 0:
            raise TypeError("standard_provider.build_language_model_spec() must accept pp_rank for MIMO PP > 1.")
        return build()


def _vision_submodules_spec(standard_provider: Any) -> dict[str, ModuleSpec]:
    """Specs of the modalities from the standard provider's vision encoder."""
    from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules

    keys = getattr(standard_provider, "modality_keys", None)
    build = getattr(standard_provider, "build_vision_encoder_spec", None)
    if keys is None or not callable(build):
        raise TypeError(
            "standard_provider must define build_mimo_modality_submodules_spec() or both modality_keys and "
            "build_vision_encoder_spec()."
        )
    return {
        modality: ModuleSpec(
            module=VisionModalitySubmodules,
            params={},
            submodules={"encoders": {encoder: build()}, "input_projections": []},
        )
        for modality, encoder in keys.items()
    }
