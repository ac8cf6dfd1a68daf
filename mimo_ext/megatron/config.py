"""Parallelism of each module, and the checks that every rank makes before a process group exists."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mimo_ext.megatron.role import MIMO_LANGUAGE_MODULE_KEY

_MODEL_PARALLEL_FIELDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


@dataclass
class ModuleParallelismConfig:
    """Parallel sizes of one module and the first of its consecutive ranks.

    ``data_parallel_size`` None is filled in by `finalize` where the world belongs to this module alone.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    data_parallel_size: int | None = None
    rank_offset: int = 0

    @property
    def dense_model_parallel_size(self) -> int:
        """Ranks that hold one copy of the dense weights: TP x CP x PP."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

    @property
    def total_model_parallel_size(self) -> int:
        """Older name of `dense_model_parallel_size`."""
        return self.dense_model_parallel_size

    @property
    def total_ranks(self) -> int:
        """Ranks of the module. Raises ValueError while ``data_parallel_size`` is unset."""
        if self.data_parallel_size is None:
            raise ValueError("data_parallel_size must be set before accessing total_ranks.")
        return self.dense_model_parallel_size * self.data_parallel_size

    @property
    def expert_data_parallel_size(self) -> int:
        """Copies of each expert on the module's ranks.

        Raises ValueError while ``data_parallel_size`` is unset or when the expert sizes do not divide the ranks.
        """
        if self.data_parallel_size is None:
            raise ValueError("data_parallel_size must be set before accessing expert_data_parallel_size.")
        span = self.expert_tensor_parallel_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size
        if self.total_ranks % span:
            raise ValueError(
                "total_ranks must be divisible by expert_tensor_parallel_size * expert_model_parallel_size * "
                f"pipeline_model_parallel_size; got {self.total_ranks} ranks and a product of {span}."
            )
        return self.total_ranks // span

    def finalize(self, world_size: int | None) -> None:
        """Fill in ``data_parallel_size`` and check the sizes.

        Args:
            world_size: ranks to divide among the data-parallel copies; only read while ``data_parallel_size`` is None.

        Raises:
            ValueError: a size is not positive, an offset negative, or something does not divide.
            TypeError: a size, the offset or the number of ranks is no whole number.
        """
        self._check_positive(_MODEL_PARALLEL_FIELDS)
        _check_whole("rank_offset", self.rank_offset)
        if self.rank_offset < 0:
            raise ValueError(f"rank_offset must be non-negative, got {self.rank_offset}.")
        if self.data_parallel_size is None:
            if world_size is not None:
                _check_whole("world_size", world_size)
            if world_size is None or world_size <= 0:
                raise ValueError(f"world_size must be provided to compute data_parallel_size, got {world_size}.")
            if world_size % self.dense_model_parallel_size:
                raise ValueError(
                    f"world_size ({world_size}) is not divisible by total_model_parallel_size "
                    f"({self.total_model_parallel_size})."
                )
            self.data_parallel_size = world_size // self.dense_model_parallel_size
        self._check_positive(("data_parallel_size",))
        self._check_experts(self.data_parallel_size)

    def _check_positive(self, names: tuple[str, ...]) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None:
                _check_whole(name, value)
            if value is None or value <= 0:
                raise ValueError(f"{name} must be positive, got {value}.")

    def _check_experts(self, data_parallel_size: int) -> None:
        dense = self.tensor_model_parallel_size * self.context_parallel_size * data_parallel_size
        if dense % (self.expert_tensor_parallel_size * self.expert_model_parallel_size):
            raise ValueError(
                "TP * CP * DP must be divisible by expert_tensor_parallel_size * expert_model_parallel_size; got "
                f"TP={self.tensor_model_parallel_size}, CP={self.context_parallel_size}, DP={data_parallel_size}, "
                f"ETP={self.expert_tensor_parallel_size}, EP={self.expert_model_parallel_size}."
            )


def _check_whole(name: str, value: Any) -> None:
    """TypeError unless it is a whole number; a bool is none."""
    try:
        if not isinstance(value, bool):
            operator.index(value)
            return
    except TypeError:
        pass
    raise TypeError(f"{name}: expected an int, got {value!r} ({type(value).__name__})")


@dataclass
class MimoParallelismConfig:
    """Parallelism of every module of a model.

    The ranges ``[rank_offset, rank_offset + total_ranks)`` tile the world; modules may also lie on the very same range
    (colocated). TP sizes and DP sizes are free: the bridge between two modules needs no common divisor.

    Args:
        module_parallelisms: module name -> sizes. The language module's name is ``"language"``.
        special_token_ids: modality name -> id of its placeholder in ``input_ids``.
    """

    module_parallelisms: dict[str, ModuleParallelismConfig]
    special_token_ids: dict[str, int] = field(default_factory=dict)

    def get_parallelism(self, module_name: str) -> ModuleParallelismConfig:
        """Sizes of one module; KeyError for an unknown name."""
        return self.module_parallelisms[module_name]

    @property
    def module_names(self) -> list[str]:
        """Names in the order in which grids and groups are made."""
        return list(self.module_parallelisms)

    @property
    def total_world_size(self) -> int:
        """Ranks that the modules need."""
        return max((p.rank_offset + p.total_ranks for p in self.module_parallelisms.values()), default=0)

    def finalize(self, world_size: int | None) -> None:
        """Check the whole layout. Call it on every rank before a grid is built.

        Args:
            world_size: ranks of the job. None, where they are not known yet: whether the modules cover them is not
                checked.

        Raises:
            ValueError: no language module; a module's own sizes are wrong; ranges overlap in part or leave a gap;
                an encoder asks for expert parallelism.
            TypeError: ``module_parallelisms`` is no dict of sizes; a module's sizes are no whole numbers.
        """
        if not isinstance(self.module_parallelisms, Mapping):
            raise TypeError(
                "module_parallelisms: expected a dict, module name -> ModuleParallelismConfig, got "
                f"{self.module_parallelisms!r}"
            )
        if MIMO_LANGUAGE_MODULE_KEY not in self.module_parallelisms:
            raise ValueError(
                f"Language module '{MIMO_LANGUAGE_MODULE_KEY}' must be in module_parallelisms. "
                f"Found modules: {self.module_names}. The language module has this fixed key."
            )
        for name, parallelism in self.module_parallelisms.items():
            if not hasattr(parallelism, "finalize"):
                raise TypeError(f"module '{name}': expected a ModuleParallelismConfig, got {parallelism!r}")
            if parallelism.data_parallel_size is None and not self._may_fill_in_data_parallel():
                raise ValueError(
                    f"data_parallel_size must be set for every module; world_size must be provided to compute "
                    f"data_parallel_size, and the world is shared here (module '{name}' has none)."
                )
            try:
                parallelism.finalize(world_size)
            except (TypeError, ValueError) as error:
                raise type(error)(f"module '{name}': {error}") from error
        self._check_ranges(world_size)
        self._check_dense_encoders()

    def _may_fill_in_data_parallel(self) -> bool:
        """Whether the world belongs to one module alone."""
        return len(self.module_parallelisms) == 1

    def _check_ranges(self, world_size: int | None) -> None:
        ranges = sorted(
            ((p.rank_offset, p.rank_offset + p.total_ranks), name) for name, p in self.module_parallelisms.items()
        )
        previous, covered = "", 0
        start_of_previous = -1
        for (start, end), name in ranges:
            if (start, end) == (start_of_previous, covered):
                continue  # the very same ranks: colocated modules
            if start < covered:
                raise ValueError(
                    f"rank_offset ranges overlap in part: module '{name}' has ranks [{start}, {end}), module "
                    f"'{previous}' has [{start_of_previous}, {covered}). Ranges must be disjoint or identical."
                )
            self._check_no_gap(name, covered, start)
            previous, start_of_previous, covered = name, start, end
        self._check_covered(covered, world_size)

    @staticmethod
    def _check_no_gap(name: str, expected: int, start: int) -> None:
        if start != expected:
            raise ValueError(
                "rank_offset ranges must tile the distributed world with no gaps; "
                f"expected module '{name}' to start at rank {expected}, got {start}."
            )

    @staticmethod
    def _check_covered(covered: int, world_size: int | None) -> None:
        if world_size is not None and covered != world_size:
            raise ValueError(
                "rank_offset ranges must tile the distributed world with no gaps; "
                f"covered ranks [0, {covered}), world_size is {world_size}."
            )

    def _check_dense_encoders(self) -> None:
        for name, p in self.module_parallelisms.items():
            if name == MIMO_LANGUAGE_MODULE_KEY:
                continue
            if p.expert_model_parallel_size != 1 or p.expert_tensor_parallel_size != 1:
                raise ValueError(
                    f"Encoder modules must remain dense: module '{name}' has expert_model_parallel_size="
                    f"{p.expert_model_parallel_size}, expert_tensor_parallel_size={p.expert_tensor_parallel_size}."
                )


@dataclass
class MegatronMIMOParallelismConfig(MimoParallelismConfig):
    """The released generation's class: same fields, and the limits that its bridge had.

    Ranges must be disjoint, TP sizes powers of two, DP sizes must divide one another and be given for every module.
    """

    def finalize(self, world_size: int | None) -> None:
        """As in the base class, with the released limits on top. Raises ValueError."""
        super().finalize(world_size)
        self._check_released_limits()

    def _may_fill_in_data_parallel(self) -> bool:
        return False

    def _check_ranges(self, world_size: int | None) -> None:
        covered, previous = 0, ""
        ranges = sorted(
            (p.rank_offset, p.rank_offset + p.total_ranks, name) for name, p in self.module_parallelisms.items()
        )
        for start, end, name in ranges:
            if previous and start < covered:
                raise ValueError(
                    "rank_offset ranges overlap in heterogeneous deployment: module "
                    f"'{name}' starts at rank {start}, module '{previous}' ends at {covered}."
                )
            covered, previous = end, name
        covered = 0
        for start, end, name in ranges:
            self._check_no_gap(name, covered, start)
            covered = end
        self._check_covered(covered, world_size)

    def _check_released_limits(self) -> None:
        sizes = list(self.module_parallelisms.items())
        for name, p in sizes:
            tp = p.tensor_model_parallel_size
            if tp & (tp - 1):
                raise ValueError(f"Module '{name}' has TP={tp}, but TP size must be a power of 2.")
        for index, (name, p) in enumerate(sizes):
            for other_name, other in sizes[index + 1 :]:
                dp, other_dp = p.data_parallel_size or 1, other.data_parallel_size or 1
                if dp % other_dp and other_dp % dp:
                    raise ValueError(
                        "DP sizes must be divisible between modules. "
                        f"Module '{name}' has DP={dp}, module '{other_name}' has DP={other_dp}."
                    )
