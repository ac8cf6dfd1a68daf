"""What `mimo_ext.megatron.install` puts in place of Megatron's names, and where these names are at home.

Imported before the first name is replaced: the classes here, and those they derive from, hold Megatron's own as bases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.models.mimo.config import role as _core_role
from megatron.core.models.mimo.model.base import MimoModel as _CoreMimoModel
from megatron.core.pipeline_parallel.multimodule_communicator import (
    MultiModulePipelineCommunicator as _CoreCommunicator,
)

from mimo_ext.megatron import communicator as _communicator
from mimo_ext.megatron import model as _model
from mimo_ext.megatron.role import RankRole as _RankRole


class _StandIn(type):
    """Metaclass: isinstance and issubclass answer as the class that is stood in for would.

    Objects made before the installation, and classes derived from Megatron's own, stay what they were.
    """

    stands_for: type

    def __instancecheck__(cls, instance: Any) -> bool:
        if "stands_for" in vars(cls):
            return isinstance(instance, cls.stands_for)
        return super().__instancecheck__(instance)  # of a class that a program derives from ours

    def __subclasscheck__(cls, subclass: type) -> bool:
        if "stands_for" in vars(cls):
            return issubclass(subclass, cls.stands_for)
        return super().__subclasscheck__(subclass)


class MimoModel(_model.MimoModel, metaclass=_StandIn):
    """`mimo_ext.megatron.MimoModel` whose roles have the modes that programs of the released generation compare."""

    stands_for = _CoreMimoModel
    released_roles = True


class MultiModulePipelineCommunicator(_communicator.MultiModulePipelineCommunicator, metaclass=_StandIn):
    """`mimo_ext.megatron.MultiModulePipelineCommunicator` in place of Megatron's."""

    stands_for = _CoreCommunicator


_CORE = "megatron.core."
_MIMO = "megatron.bridge.models.megatron_mimo."
_DOCUMENTED = "megatron.bridge.models.mimo."
PARALLEL_UTILS = "megatron.bridge.training.megatron_mimo_parallel_utils"

# Module -> the names in it that are replaced -> our module that has the name. Names a version lacks are passed over.
HOMES: dict[str, dict[str, str]] = {
    _CORE + "pipeline_parallel.bridge_communicator": {"BridgeCommunicator": "communicator"},
    _CORE + "pipeline_parallel.multimodule_communicator": {
        "MultiModulePipelineCommunicator": "_stand_ins",
        "RankModuleInfo": "communicator",
        "_prepare_tensor_for_comm": "adapters",
        "_restore_tensor_from_comm": "adapters",
    },
    _CORE + "models.mimo.model.base": {"MimoModel": "_stand_ins"},
}
_BUILDER = dict.fromkeys(
    (
        "build_hypercomm_grids",
        "populate_embedding_and_position_groups",
        "is_pp_first_stage",
        "is_pp_last_stage",
    ),
    "builder",
)
BRIDGE_HOMES: dict[str, dict[str, str]] = {
    _MIMO + "megatron_mimo_config": dict.fromkeys(
        ("ModuleParallelismConfig", "MegatronMIMOParallelismConfig"), "config"
    ),
    _MIMO + "megatron_mimo_builder": _BUILDER,
    _MIMO + "megatron_mimo_ddp": {"wrap_megatron_mimo_model_distributed": "ddp"},
    _MIMO + "megatron_mimo_provider": dict.fromkeys(("MegatronMIMOProvider", "MegatronMIMOInfra"), "provider"),
    PARALLEL_UTILS: dict.fromkeys(
        (
            "_get_dp_size_from_grid",
            "unwrap_megatron_mimo_model",
            "is_current_rank_in_grid",
            "get_active_module_pg",
            "get_module_to_grid_tuple",
            "build_pg_collection_for_schedule",
            "multimodule_no_sync",
            "finalize_model_grads_multimodule",
            "zero_grad_buffer_for_multimodule",
            "validate_no_stub_ranks",
            "validate_data_loader_contract",
        ),
        "parallel_utils",
    ),
    # The documents' generation of Megatron-Bridge.
    _DOCUMENTED + "mimo_config": dict.fromkeys(("ModuleParallelismConfig", "MimoParallelismConfig"), "config"),
    _DOCUMENTED + "mimo_builder": _BUILDER,
    _DOCUMENTED + "mimo_ddp": {"wrap_mimo_model_distributed": "ddp"},
    _DOCUMENTED + "mimo_provider": dict.fromkeys(("MimoModelProvider", "MimoModelInfra"), "provider"),
}

# Import paths of the documents -> our module that is found under them where Megatron-Bridge has no such module.
SUPPLIED: dict[str, str] = {
    _DOCUMENTED + "mimo_config": "config",
    _DOCUMENTED + "mimo_builder": "builder",
    _DOCUMENTED + "mimo_provider": "provider",
    PARALLEL_UTILS: "parallel_utils",
}

# (module, name) that keeps Megatron's object -> why.
LEFT_ALONE: dict[tuple[str, str], str] = {
    (_CORE + "pipeline_parallel.schedules", "MultiModulePipelineCommunicator"): (
        "only asked by isinstance, and our class is derived from it"
    ),
    (_CORE + "models.mimo.config.role", "ModuleLayout"): "members are compared by identity; UNIFIED is added to it",
    (_CORE + "models.mimo.comm.colocated_communicator", "ColocatedBridgeCommunicator"): (
        "made by Megatron's own MimoModel alone; ours has a bridge there"
    ),
    (_CORE + "models.mimo.config.role", "RankRole"): "holds ModuleLayout; its class methods are replaced or added",
}


def _released(cls: Any, role: _RankRole) -> Any:
    """The role as an object of megatron-core's own class (or of one derived from it)."""
    stages = {
        name: _core_role.ModuleStageInfo(stage.is_first_stage, stage.is_last_stage)
        for name, stage in role.modules.items()
    }
    return cls(modules=stages, mode=role.as_released().mode)


def _unified(cls: type, module_names: list[str]) -> Any:
    """Role of a rank that runs every module whole."""
    return _released(cls, _RankRole.unified(module_names))


def _from_grid_map(cls: type, module_to_grid_map: Mapping[str, Any], modality_module_names: list[str]) -> Any:
    """Role of the current rank in a map from module names to grids, whose keys are checked."""
    return _released(cls, _RankRole.from_grid_map(module_to_grid_map, modality_module_names))


def _build(cls: type, modality_module_names: list[str], module_to_grid_map: Mapping[str, Any] | None = None) -> Any:
    """Role of the current rank; see `mimo_ext.megatron.RankRole.build`."""
    return _released(cls, _RankRole.build(modality_module_names, module_to_grid_map))


def attributes() -> list[tuple[Any, str, Any]]:
    """``(class of megatron-core, attribute, value)`` for classes that stay and are changed.

    The documents' ``ModuleLayout.UNIFIED`` becomes another name of COLOCATED, which is how the released generation
    calls a model without grids.
    """
    layout: Any = _core_role.ModuleLayout
    return [
        (layout, "UNIFIED", layout.COLOCATED),
        (_core_role.RankRole, "build", classmethod(_build)),
        (_core_role.RankRole, "unified", classmethod(_unified)),
        (_core_role.RankRole, "from_grid_map", classmethod(_from_grid_map)),
    ]
