"""Which modules a rank runs, and as which of their pipeline stages.

Grids are taken by duck type: ``rank_offset`` and ``size`` are enough, ``shape`` and ``dim_names`` give the pipeline
stage without any process group. Only a grid that declares a ``pp`` dim but no usable shape is asked for its group.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch.distributed as dist
from megatron.core.models.mimo.config.role import ModuleLayout as _ReleasedLayout

logger = logging.getLogger(__name__)

# The language module's key in every map from module names; MIMO has exactly one language model.
MIMO_LANGUAGE_MODULE_KEY = "language"


class ModuleLayout(Enum):
    """How the modules lie on the ranks; decides the forward path.

    UNIFIED: no grid map. All modules share the same ranks and parallelism, and run one after another.
    NON_COLOCATED: no module shares a rank with the language model. A rank runs encoders (one or several) or the
        language model.
    COLOCATED: modules share ranks with the language model, each with its own parallelism.

    A member compares equal to the member of the same name of megatron-core's own enum, which knows no UNIFIED.
    """

    UNIFIED = "unified"
    NON_COLOCATED = "non_colocated"
    COLOCATED = "colocated"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _ReleasedLayout):
            return self.name == other.name
        return self is other

    def __hash__(self) -> int:
        # The released enum hashes its members by name as well, so both find the same dictionary entry.
        return hash(self._name_)


@dataclass
class ModuleStageInfo:
    """Where a rank stands in the pipeline of one module.

    Args:
        is_first_stage: the rank is in the module's first PP stage.
        is_last_stage: the rank is in the module's last PP stage.
    """

    is_first_stage: bool
    is_last_stage: bool


@dataclass
class RankRole:
    """The modules that a rank takes part in.

    Args:
        modules: module name -> stage of this rank, for this rank's modules only.
        mode: how all modules lie on the ranks.
    """

    modules: dict[str, ModuleStageInfo] = field(default_factory=dict)
    mode: ModuleLayout = ModuleLayout.UNIFIED

    @classmethod
    def unified(cls, module_names: list[str]) -> RankRole:
        """Role of a rank that runs every module whole: first and last stage of each.

        Args:
            module_names: all module names, the language module's included.
        """
        return cls(modules={name: ModuleStageInfo(True, True) for name in module_names}, mode=ModuleLayout.UNIFIED)

    @classmethod
    def from_grid_map(cls, module_to_grid_map: Mapping[str, Any], modality_module_names: list[str]) -> RankRole:
        """Role of the current rank in a map from module names to grids.

        Args:
            module_to_grid_map: one grid per module; keys are ``modality_module_names`` and the language key.
            modality_module_names: names of the modules beside the language model.

        Raises:
            ValueError: the keys are not the expected names.
            TypeError: something in the map is no grid.
            RuntimeError: the current rank lies in no grid.
        """
        expected = set(modality_module_names) | {MIMO_LANGUAGE_MODULE_KEY}
        got = set(module_to_grid_map)
        if got != expected:
            raise ValueError(
                f"module_to_grid_map keys must match modality module names + '{MIMO_LANGUAGE_MODULE_KEY}': "
                f"expected {sorted(expected)}, got {sorted(got)}. Missing: {sorted(expected - got)}, extra: "
                f"{sorted(got - expected)}."
            )
        _check_grids(module_to_grid_map)
        mode = ModuleLayout.COLOCATED if _language_shares_ranks(module_to_grid_map) else ModuleLayout.NON_COLOCATED
        return cls(modules=_stages_of_rank(module_to_grid_map), mode=mode)

    @classmethod
    def build(cls, modality_module_names: list[str], module_to_grid_map: Mapping[str, Any] | None = None) -> RankRole:
        """Role by the released generation's rules; ``mode`` is a member of megatron-core's own enum.

        Without a (non-empty) map every module is whole on this rank and the mode is COLOCATED, which is the released
        name of UNIFIED. A map of a single grid is COLOCATED only where its pipeline has one stage.

        Raises:
            RuntimeError: the current rank lies in no grid.
        """
        released: Any = _ReleasedLayout
        if not module_to_grid_map:
            return cls.unified([*modality_module_names, MIMO_LANGUAGE_MODULE_KEY]).as_released()
        stages = _stages_of_rank(module_to_grid_map)
        whole = all(stage.is_first_stage and stage.is_last_stage for stage in stages.values())
        colocated = _language_shares_ranks(module_to_grid_map) or (len(module_to_grid_map) == 1 and whole)
        return cls(modules=stages, mode=released.COLOCATED if colocated else released.NON_COLOCATED)

    @classmethod
    def _from_grid_map(cls, module_to_grid_map: Mapping[str, Any]) -> RankRole:
        """Role in a map whose keys were checked elsewhere, under the released generation's name; see `build`."""
        released: Any = _ReleasedLayout
        return cls(modules=_stages_of_rank(module_to_grid_map), mode=released.NON_COLOCATED)

    def as_released(self) -> RankRole:
        """The same role with ``mode`` a member of megatron-core's own enum, which programs compare by identity.

        UNIFIED becomes COLOCATED, the released name of both.
        """
        released: Any = _ReleasedLayout
        colocated = self.mode != ModuleLayout.NON_COLOCATED
        return RankRole(modules=self.modules, mode=released.COLOCATED if colocated else released.NON_COLOCATED)

    @property
    def has_modality_modules(self) -> bool:
        """Whether this rank runs any module beside the language model."""
        return any(name != MIMO_LANGUAGE_MODULE_KEY for name in self.modules)

    @property
    def has_language_module(self) -> bool:
        """Whether this rank runs (a part of) the language model."""
        return MIMO_LANGUAGE_MODULE_KEY in self.modules

    @property
    def modality_module_names(self) -> list[str]:
        """Names of this rank's modules beside the language model."""
        return [name for name in self.modules if name != MIMO_LANGUAGE_MODULE_KEY]

    def is_first_stage(self, module_name: str) -> bool:
        """Whether this rank is in the first PP stage of the module; False where it does not run it."""
        return module_name in self.modules and self.modules[module_name].is_first_stage

    def is_last_stage(self, module_name: str) -> bool:
        """Whether this rank is in the last PP stage of the module; False where it does not run it."""
        return module_name in self.modules and self.modules[module_name].is_last_stage


def _check_grids(module_to_grid_map: Mapping[str, Any]) -> None:
    """TypeError where an object says nothing of its ranks."""
    for name, grid in module_to_grid_map.items():
        missing = [attribute for attribute in ("rank_offset", "size") if not hasattr(grid, attribute)]
        if missing:
            raise TypeError(
                f"Rank {dist.get_rank()}, module '{name}': expected a grid, got {type(grid).__name__} without "
                f"{', '.join(missing)}."
            )


def _language_shares_ranks(module_to_grid_map: Mapping[str, Any]) -> bool:
    """Whether another module has a rank of the language module."""
    language = module_to_grid_map.get(MIMO_LANGUAGE_MODULE_KEY)
    if language is None:
        return False
    others = (grid for name, grid in module_to_grid_map.items() if name != MIMO_LANGUAGE_MODULE_KEY)
    end = language.rank_offset + language.size
    return any(g.rank_offset < end and language.rank_offset < g.rank_offset + g.size for g in others)


def _stages_of_rank(module_to_grid_map: Mapping[str, Any]) -> dict[str, ModuleStageInfo]:
    """Stages of the current rank in each of its modules; RuntimeError when it has none."""
    rank = dist.get_rank()
    stages: dict[str, ModuleStageInfo] = {}
    for name, grid in module_to_grid_map.items():
        if not grid.rank_offset <= rank < grid.rank_offset + grid.size:
            continue
        stage, stages_in_all = _pp_stage(grid, rank)
        logger.debug("rank %d: stage %d of %d of module '%s'", rank, stage, stages_in_all, name)
        stages[name] = ModuleStageInfo(is_first_stage=stage == 0, is_last_stage=stage == stages_in_all - 1)
    if not stages:
        ranges = {name: (grid.rank_offset, grid.rank_offset + grid.size) for name, grid in module_to_grid_map.items()}
        raise RuntimeError(
            f"Rank {rank} is not in any module grid. Expected it in one of the ranges [first, end) of "
            f"module_to_grid_map: {ranges}."
        )
    return stages


def _pp_stage(grid: Any, rank: int) -> tuple[int, int]:
    """(stage, number of stages) of a rank that lies in the grid."""
    if "pp" not in grid.dim_names:
        return 0, 1
    shape = getattr(grid, "shape", None)
    if (
        isinstance(shape, (list, tuple))
        and all(isinstance(extent, int) for extent in shape)
        and len(shape) == len(grid.dim_names)
        and math.prod(shape) == grid.size
    ):
        index = list(grid.dim_names).index("pp")
        # The first dim varies fastest.
        return (rank - grid.rank_offset) // math.prod(shape[:index]) % shape[index], shape[index]
    group = grid.get_pg("pp")
    return group.rank(), group.size()
