"""Build a MimoModel whose modules have their own grids.

The functions and classes that this module imports are looked up in it at each call, so a program may replace them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import get_model_config

from mimo_ext.megatron._precision import cast, resolve_dtype, set_precision
from mimo_ext.megatron._provider_base import Hook, ProviderBase, compose_hooks, run_hook
from mimo_ext.megatron._specs import (
    _finalize_transformer_configs_in_specs,
    freeze,
    give_groups,
    language_spec_with_groups,
    leave_scattering_to_mimo_model,
    modality_spec_with_groups,
    set_parallel_sizes,
)
from mimo_ext.megatron.builder import (
    EXPERT_VIEW_NAME,
    build_hypercomm_grids,
    is_pp_first_stage,
    is_pp_last_stage,
    populate_embedding_and_position_groups,
)
from mimo_ext.megatron.config import MimoParallelismConfig
from mimo_ext.megatron.ddp import (
    # The released face looks this one up here.
    wrap_megatron_mimo_model_distributed as wrap_megatron_mimo_model_distributed,
)
from mimo_ext.megatron.ddp import wrap_mimo_model_distributed
from mimo_ext.megatron.model import MimoModel
from mimo_ext.megatron.role import MIMO_LANGUAGE_MODULE_KEY


@dataclass
class MimoModelInfra:
    """What the provider builds beside the model.

    Attributes:
        module_to_grid_map: module name -> HyperCommGrid, on every rank.
        topology: module name -> names of the modules that take its output.
        pg_collections: module name -> ProcessGroupCollection, None for modules that this rank is not in.
        participating_modules: names of this rank's modules.
        module_output_ndim: module name -> dims of its output tensor (2: ``[rows, h]``, 3: ``[s, b, h]``).
    """

    module_to_grid_map: dict[str, Any]
    topology: dict[str, list[str]]
    pg_collections: dict[str, ProcessGroupCollection | None]
    participating_modules: list[str]
    module_output_ndim: dict[str, int] = field(default_factory=dict)


@dataclass
class MimoModelProvider(ProviderBase):
    """Provider of a MimoModel with parallelism per module.

    Each encoder with sizes of its own is a module of its own: a key of ``modality_submodules_spec``, of
    ``mimo_parallelism_config.module_parallelisms`` and of ``special_token_ids``; the language model's key is
    ``"language"``. Without a parallelism config the model is built whole, without grids.

    Args:
        language_model_spec: spec of the language model; ``params["config"]`` is its TransformerConfig.
        modality_submodules_spec: modality name -> spec of its ModalitySubmodules.
        special_token_ids: modality name -> id of its placeholder in ``input_ids``.
        mimo_parallelism_config: sizes and ranks of the modules.
        topology: DAG of the modules; default: every modality feeds the language model.
        module_output_ndim: dims of each module's output; default: language 3, others 2.
        freeze_language_model, freeze_modality_encoders, freeze_modality_projections: parts that do not train.
        fp16, bf16: precision; both False is fp32, both True is fp16 (True is the default of bf16).
        use_cpu_initialization: leave the model on the CPU.
        init_model_with_meta_device: not supported; True raises NotImplementedError.
        virtual_pipeline_model_parallel_size: not supported above 1; raises NotImplementedError.
        sharded_delivery: see `MimoModel`.
    """

    language_model_spec: ModuleSpec | None = None
    modality_submodules_spec: dict[str, ModuleSpec] = field(default_factory=dict)
    special_token_ids: dict[str, int] = field(default_factory=dict)
    mimo_parallelism_config: MimoParallelismConfig | None = None
    _cached_infra: MimoModelInfra | None = field(default=None, init=False, repr=False, compare=False)

    freeze_language_model: bool = False
    freeze_modality_encoders: dict[str, bool] = field(default_factory=dict)
    freeze_modality_projections: dict[str, bool] = field(default_factory=dict)

    fp16: bool = False
    bf16: bool = True
    use_cpu_initialization: bool = False
    init_model_with_meta_device: bool = False
    virtual_pipeline_model_parallel_size: int | None = None

    topology: dict[str, list[str]] | None = field(default=None, kw_only=True)
    module_output_ndim: dict[str, int] | None = field(default=None, kw_only=True)
    sharded_delivery: bool | None = field(default=None, kw_only=True)

    @property
    def tensor_model_parallel_size(self) -> int:
        """TP size of the language model; 1 without a parallelism config."""
        return self._language_size("tensor_model_parallel_size")

    @property
    def pipeline_model_parallel_size(self) -> int:
        """PP size of the language model; 1 without a parallelism config."""
        return self._language_size("pipeline_model_parallel_size")

    @property
    def context_parallel_size(self) -> int:
        """CP size of the language model; 1 without a parallelism config."""
        return self._language_size("context_parallel_size")

    def _language_size(self, name: str) -> int:
        config = self._parallelism()
        if config is None:
            return 1
        sizes = config.module_parallelisms.get(MIMO_LANGUAGE_MODULE_KEY)
        if sizes is None:
            raise ValueError(
                f"{name}: expected the language model's sizes under '{MIMO_LANGUAGE_MODULE_KEY}' in "
                f"module_parallelisms, got modules {config.module_names}"
            )
        return getattr(sizes, name)

    def _parallelism(self) -> MimoParallelismConfig | None:
        return self.mimo_parallelism_config

    @property
    def _grids(self) -> dict[str, Any] | None:
        """Grids of the cached infrastructure, None before it is built.

        Setting None sets the infrastructure aside (programs do so around saving the provider); setting the same grids
        again brings it back. Other grids cannot be set: ValueError.
        """
        return self._cached_infra.module_to_grid_map if self._cached_infra is not None else None

    @_grids.setter
    def _grids(self, grids: dict[str, Any] | None) -> None:
        if grids is self._grids:
            return
        if grids is None:
            self.__dict__["_infra_set_aside"] = self._cached_infra
            self._cached_infra = None
            return
        aside = self.__dict__.pop("_infra_set_aside", None)
        if aside is None or aside.module_to_grid_map is not grids:
            raise ValueError("_grids: expected None or the grids of build_infra(), got others")
        self._cached_infra = aside

    # --- infrastructure

    def finalize(self) -> None:
        """Check the parallelism config against the world. Call it before anything is built.

        Raises:
            ValueError: the layout does not work, for instance a rank is in no module.
            RuntimeError: torch.distributed is not initialized.
        """
        config = self._parallelism()
        if config is None:
            return
        if not dist.is_initialized():
            raise RuntimeError(
                "MIMO requires torch.distributed to be initialized before finalize(), which checks the parallelism "
                "config against the number of ranks. Call torch.distributed.init_process_group() first."
            )
        config.finalize(dist.get_world_size())

    def build_infra(self) -> MimoModelInfra:
        """Build grids and process groups; collective over the world. Does not change the provider.

        Each call builds new groups: use `get_or_build_infra` unless that is wanted.
        """
        config = self._parallelism()
        grids = build_hypercomm_grids(config) if config is not None else {}
        pg_collections = self._get_pg_collections_from_grids(grids)
        topology = self.topology
        if topology is None:
            topology = {name: [MIMO_LANGUAGE_MODULE_KEY] for name in self.modality_submodules_spec}
            topology[MIMO_LANGUAGE_MODULE_KEY] = []
        output_ndim = self.module_output_ndim
        if output_ndim is None:
            output_ndim = {name: 3 if name == MIMO_LANGUAGE_MODULE_KEY else 2 for name in grids}
        return MimoModelInfra(
            module_to_grid_map=grids,
            topology=topology,
            pg_collections=pg_collections,
            participating_modules=[name for name, groups in pg_collections.items() if groups is not None],
            module_output_ndim=output_ndim,
        )

    def get_or_build_infra(self) -> MimoModelInfra:
        """The infrastructure, built by the first call. Groups of a destroyed default process group are not reused."""
        if not self._infra_is_current():
            self._remember(self.build_infra())
        assert self._cached_infra is not None
        return self._cached_infra

    def _infra_is_current(self) -> bool:
        return self._cached_infra is not None and self.__dict__.get("_infra_world") is _world()

    def _remember(self, infra: MimoModelInfra) -> None:
        self._cached_infra = infra
        self.__dict__["_infra_world"] = _world()

    def _get_pg_collections_from_grids(self, grids: dict[str, Any]) -> dict[str, ProcessGroupCollection | None]:
        """Process groups of each module from its grid, None where this rank is not in it; collective."""
        collections: dict[str, ProcessGroupCollection | None] = {}
        for name, grid in grids.items():
            # Every rank makes every module's embedding groups, in the order of the grids.
            pos_embd, embd = populate_embedding_and_position_groups(grid.get_rank_enum(["pp"]))
            collections[name] = _pg_collection(grid, pos_embd, embd) if grid.is_current_rank_in_grid() else None
        return collections

    def _inject_pg_collection_into_language_spec(
        self,
        spec: ModuleSpec,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
    ) -> ModuleSpec:
        """A deep copy of the spec with the groups, and with the stage's flags where they are given."""
        return language_spec_with_groups(spec, pg_collection, pre_process, post_process)

    def _inject_pg_collection_into_modality_spec(
        self, spec: ModuleSpec, pg_collection: ProcessGroupCollection
    ) -> ModuleSpec:
        """A deep copy of the spec whose encoders have the groups and TP size, and whose projections the TP group."""
        return modality_spec_with_groups(spec, pg_collection)

    # --- the model

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> Any:
        """Build this rank's part of the model on the CPU (or where its layers put it), unwrapped.

        Args:
            pre_process, post_process, vp_stage: accepted for the callers of other providers; the grids decide.

        Raises:
            ValueError: no language_model_spec, or this rank is in no module.
        """
        if self.language_model_spec is None:
            raise ValueError(
                "language_model_spec must be set before calling provide(). "
                "Set it directly or in the __post_init__ of a subclass."
            )
        infra = self.get_or_build_infra()
        config = self._parallelism()
        if config is not None and not infra.participating_modules:
            ranges = {name: (g.rank_offset, g.rank_offset + g.size) for name, g in infra.module_to_grid_map.items()}
            raise ValueError(
                f"Rank {dist.get_rank()} does not participate in any module; ranks [first, end) of each: {ranges}."
            )

        language_groups = infra.pg_collections.get(MIMO_LANGUAGE_MODULE_KEY)
        language_spec = self.language_model_spec
        model_groups: dict[str, Any] = {}
        if language_groups is not None:
            language_spec = self._inject_pg_collection_into_language_spec(
                self._language_spec_of_stage(language_groups),
                language_groups,
                pre_process=is_pp_first_stage(language_groups.pp),
                post_process=is_pp_last_stage(language_groups.pp),
            )
            assert config is not None
            set_parallel_sizes(language_spec, config.module_parallelisms[MIMO_LANGUAGE_MODULE_KEY])
            leave_scattering_to_mimo_model(language_spec)
            model_groups = {"cp_group": language_groups.cp, "tp_group": language_groups.tp}
        if self.sharded_delivery is not None:
            model_groups["sharded_delivery"] = self.sharded_delivery

        modality_specs = {}
        for name, spec in self.modality_submodules_spec.items():
            groups = infra.pg_collections.get(name)
            modality_specs[name] = (
                spec if groups is None else self._inject_pg_collection_into_modality_spec(spec, groups)
            )
        _finalize_transformer_configs_in_specs(language_spec, modality_specs)

        model = MimoModel(
            MimoModelConfig(
                language_model_spec=language_spec,
                modality_submodules_spec=modality_specs,
                special_token_ids=self.special_token_ids,
                module_to_grid_map=infra.module_to_grid_map if config is not None else None,
            ),
            **model_groups,
        )
        # Float16Module asks the model for the pipeline group of this rank.
        active = [groups for groups in infra.pg_collections.values() if groups is not None]
        if active:
            model.pg_collection = language_groups if language_groups is not None else active[0]
        submodules: Any = getattr(model, "modality_submodules", {})
        for name, groups in infra.pg_collections.items():
            if groups is not None and name in submodules:
                give_groups(submodules[name], groups)
        self._apply_freezing(model)
        return model

    def _language_spec_of_stage(self, language_groups: ProcessGroupCollection) -> ModuleSpec:
        """Spec of the language model for this rank's pipeline stage."""
        assert self.language_model_spec is not None
        return self.language_model_spec

    def provide_distributed_model(
        self,
        ddp_config: Any = None,
        model_type: Any = None,
        overlap_param_gather_with_optimizer_step: bool = False,
        fp16: bool | None = None,
        bf16: bool | None = None,
        use_megatron_fsdp: bool = False,
        use_torch_fsdp2: bool = False,
        wrap_with_ddp: bool = True,
        data_parallel_random_init: bool = False,
        use_cpu_initialization: bool | None = False,
        init_model_with_meta_device: bool | None = None,
        pre_wrap_hook: Hook | list[Hook] | None = None,
        post_wrap_hook: Hook | None = None,
        mixed_precision_wrapper: Callable[[Any, Any], Any] | None = None,
    ) -> list[Any]:
        """Build this rank's part of the model, ready to train. Collective over the world.

        In this order: finalize, grids and groups (once), `provide`, pre-wrap hooks, move to the device, cast, DDP per
        module, mixed-precision wrapper, post-wrap hooks. Weights are cast *before* DDP lays its buffers over them.

        Args:
            ddp_config: DistributedDataParallelConfig; required with ``wrap_with_ddp``.
            model_type: accepted for the callers of other providers.
            overlap_param_gather_with_optimizer_step: one DDP bucket per module, as Megatron does for it.
            fp16, bf16: override the provider's fields.
            use_megatron_fsdp, use_torch_fsdp2: not supported, as in ``ddp_config``.
            wrap_with_ddp: wrap each module with DDP.
            data_parallel_random_init: broadcast the weights of the first data-parallel rank of each module.
            use_cpu_initialization: True leaves the model on the CPU; otherwise the provider's field decides.
            init_model_with_meta_device: not supported.
            pre_wrap_hook: one hook or several, instead of the registered ones.
            post_wrap_hook: one hook, instead of the registered ones.
            mixed_precision_wrapper: called as ``wrapper(config, model)`` with fp16 or bf16. Default: Float16Module.

        Returns:
            A list with the one (wrapped) MimoModel.

        Raises:
            ValueError: no ddp_config although ``wrap_with_ddp``; fp16 and bf16 at once; a layout that does not work.
            NotImplementedError: names the argument that is not supported.
        """
        # Megatron's DDP would ignore the flag of its config.
        asked_by_config = any(getattr(ddp_config, name, False) is True for name in _FSDP_OF_CONFIG)
        self._check_supported(use_megatron_fsdp or asked_by_config, use_torch_fsdp2, init_model_with_meta_device)
        if wrap_with_ddp and ddp_config is None:
            raise ValueError("ddp_config is required when wrap_with_ddp is True")
        dtype = resolve_dtype(fp16, bf16, self.fp16, self.bf16)

        self.finalize()
        infra = self.get_or_build_infra()
        models = [self.provide()]

        pre_hook = self._resolve_hooks(pre_wrap_hook)
        if pre_hook is not None:
            models = run_hook(pre_hook, models)
        if not self._resolve_cpu_initialization(use_cpu_initialization) and torch.cuda.is_available():
            for model in models:
                model.cuda(torch.cuda.current_device())
        for model in models:
            config = get_model_config(model)
            # Rows per microbatch vary at the seam between modules.
            config.variable_seq_lengths = True
            set_precision(config, dtype)
        models = [cast(model, dtype) for model in models]
        for model in models:
            self._move_frozen_params_to_device(model)

        if wrap_with_ddp and self._parallelism() is not None:
            models = [
                self._wrap_with_ddp(model, ddp_config, infra, overlap_param_gather_with_optimizer_step)
                for model in models
            ]
            if data_parallel_random_init:
                for module in [m for model in models for m in _ddp_modules(model)]:
                    module.broadcast_params()
        models = self._wrap_mixed_precision(models, dtype, mixed_precision_wrapper)

        post_hook = post_wrap_hook or self.post_wrap_hook
        return models if post_hook is None else run_hook(post_hook, models)

    def _check_supported(self, megatron_fsdp: bool, torch_fsdp2: bool, meta_device: bool | None) -> None:
        meta_device = self.init_model_with_meta_device if meta_device is None else meta_device
        vp_size = self.virtual_pipeline_model_parallel_size
        if megatron_fsdp or torch_fsdp2:
            flag = "use_megatron_fsdp" if megatron_fsdp else "use_torch_fsdp2"
            raise NotImplementedError(
                f"FSDP is not yet supported for MIMO models ({flag}=True). Use wrap_with_ddp=True."
            )
        if meta_device:
            raise NotImplementedError("init_model_with_meta_device=True is not supported for MIMO models.")
        if vp_size is not None and vp_size > 1:
            raise NotImplementedError(
                f"virtual_pipeline_model_parallel_size={vp_size} is not supported for MIMO models."
            )

    def _resolve_cpu_initialization(self, argument: bool | None) -> bool:
        """Whether the model stays on the CPU."""
        return bool(argument) or self.use_cpu_initialization

    def _wrap_with_ddp(self, model: Any, ddp_config: Any, infra: MimoModelInfra, disable_bucketing: bool) -> Any:
        return wrap_mimo_model_distributed(
            mimo_model=model,
            ddp_config=ddp_config,
            mimo_parallelism_config=self._parallelism(),
            grids=infra.module_to_grid_map,
            pg_collections=infra.pg_collections,
            disable_bucketing=disable_bucketing,
        )

    def _wrap_mixed_precision(
        self, models: list[Any], dtype: torch.dtype, wrapper: Callable[[Any, Any], Any] | None
    ) -> list[Any]:
        if dtype is torch.float32:
            return models
        # Fetched now, not at import: programs replace the class.
        from megatron.core.transformer.module import Float16Module

        wrapper = wrapper or Float16Module
        return [wrapper(get_model_config(model), model) for model in models]

    def _resolve_hooks(self, pre_wrap_hook: Hook | list[Hook] | None) -> Hook | None:
        """The hooks to run before wrapping, as one: those given, else those registered, else None."""
        if pre_wrap_hook is None:
            return self.pre_wrap_hook
        return compose_hooks(pre_wrap_hook) if isinstance(pre_wrap_hook, list) else pre_wrap_hook

    def initialize_model_parallel(
        self, seed: int | None = None, seed_kwargs: dict[str, Any] | None = None, **model_parallel_kwargs: Any
    ) -> None:
        """Do nothing: grids take the place of Megatron's global model-parallel state (see `build_infra`)."""

    def _apply_freezing(self, model: Any) -> None:
        """Take the frozen parts' parameters out of training."""
        language_model = getattr(model, "language_model", None)
        if self.freeze_language_model and language_model is not None:
            freeze(language_model)
        submodules = getattr(model, "modality_submodules", None)
        if submodules is None:
            return
        for flags, part in (
            (self.freeze_modality_encoders, "encoders"),
            (self.freeze_modality_projections, "input_projections"),
        ):
            for name, frozen in flags.items():
                if frozen and name in submodules and hasattr(submodules[name], part):
                    freeze(getattr(submodules[name], part))

    @staticmethod
    def _move_frozen_params_to_device(model: Any) -> None:
        """Move to the GPU what DDP would leave on the CPU: frozen parameters, and buffers."""
        if not torch.cuda.is_available():
            return
        device = torch.cuda.current_device()
        for tensor in [p for p in model.parameters() if not p.requires_grad] + list(model.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.to(device)


_FSDP_OF_CONFIG = ("use_megatron_fsdp", "use_custom_fsdp")


def _world() -> Any:
    """The default process group, None where there is none: cached groups die with it."""
    return dist.group.WORLD if dist.is_initialized() else None


def _ddp_modules(model: Any) -> list[Any]:
    """DDP-wrapped modules of a MimoModel."""
    modules = [model.language_model, *model.modality_submodules.values()]
    return [module for module in modules if isinstance(module, DistributedDataParallel)]


def _pg_collection(grid: Any, pos_embd: Any, embd: Any) -> ProcessGroupCollection:
    """Groups of the current rank in a grid that it is in."""
    pp = grid.get_pg(["pp"])
    dp_cp = grid.get_pg(["dp", "cp"])
    expt_dp = grid.get_pg(["expt_dp"], view=EXPERT_VIEW_NAME)
    tp_ep_pp = grid.get_pg(["expt_tp", "ep", "pp"], view=EXPERT_VIEW_NAME)
    first, last = is_pp_first_stage(pp), is_pp_last_stage(pp)
    return ProcessGroupCollection(
        tp=grid.get_pg(["tp"]),
        cp=grid.get_pg(["cp"]),
        pp=pp,
        dp=grid.get_pg(["dp"]),
        dp_cp=dp_cp,
        intra_dp_cp=dp_cp,
        tp_cp=grid.get_pg(["tp", "cp"]),
        mp=grid.get_pg(["tp", "pp"]),
        tp_dp_cp=grid.get_pg(["tp", "dp", "cp"]),
        intra_dist_opt=grid.get_pg(["tp", "cp", "dp", "pp"]),
        ep=grid.get_pg(["ep"], view=EXPERT_VIEW_NAME),
        expt_tp=grid.get_pg(["expt_tp"], view=EXPERT_VIEW_NAME),
        expt_dp=expt_dp,
        intra_expt_dp=expt_dp,
        tp_ep=grid.get_pg(["expt_tp", "ep"], view=EXPERT_VIEW_NAME),
        tp_ep_pp=tp_ep_pp,
        pos_embd=pos_embd if first else None,
        embd=embd if first or last else None,
        **_get_gtp_remat_process_group_kwargs(dp_cp, expt_dp, tp_ep_pp),
    )


def _get_gtp_remat_process_group_kwargs(dp_cp: Any, expt_dp: Any, tp_ep_pp: Any) -> dict[str, Any]:
    """Groups that include the gtp_remat dim, as far as this megatron-core has them.

    Our grids have no such dim, so they are the groups without it.
    """
    groups = {
        "dp_cp_gtp_remat": dp_cp,
        "expt_dp_gtp_remat": expt_dp,
        "tp_ep_pp_with_egtp_remat": tp_ep_pp,
    }
    declared = ProcessGroupCollection.__dataclass_fields__
    return {name: group for name, group in groups.items() if name in declared}


def __getattr__(name: str) -> Any:
    # The released generation's names live in a module of their own, which imports this one.
    if name in ("MegatronMIMOInfra", "MegatronMIMOProvider"):
        from mimo_ext.megatron import _released_provider

        return getattr(_released_provider, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
