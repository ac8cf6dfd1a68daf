"""The module graph of a multi-modal model: grids by duck type, stage counting, and what all ranks must agree on.

Grids are taken as Megatron programs have them (anything with `rank_offset`, `size`, `shape` and `dim_names`),
converted once into `GridShape`, and checked strictly from there on. No process group is made here.
"""

from __future__ import annotations

import json
import logging
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from mimo_ext import Layout
from mimo_ext._extension import _C

DEFAULT_DIM_MAPPING = {"s": 1, "b": 0, "h": 2}  # that of Megatron's bridge; its own modules give [s, b, h]


@dataclass(frozen=True)
class GridShape:
    """A grid in plain integers: ranks `[rank_offset, rank_offset + size)`, factorised by dims, the first varying
    fastest.
    """

    module: str
    rank_offset: int
    shape: tuple[int, ...]
    dim_names: tuple[str, ...]

    @classmethod
    def from_grid(cls, module: str, grid: Any) -> GridShape:
        """Read `rank_offset`, `size`, `shape` and `dim_names` of any object.

        Raises:
            TypeError: `grid` lacks one of the four attributes, or has others than whole numbers in them.
            ValueError: they contradict one another.
        """
        missing = [name for name in ("rank_offset", "size", "shape", "dim_names") if not hasattr(grid, name)]
        if missing:
            raise TypeError(f"module {module}: expected a grid, got {type(grid).__name__} without {', '.join(missing)}")
        try:
            shape = tuple(operator.index(extent) for extent in grid.shape)
            offset, size = operator.index(grid.rank_offset), operator.index(grid.size)
            dim_names = tuple(str(name) for name in grid.dim_names)
        except TypeError:
            raise TypeError(
                f"module {module}: expected a grid of whole numbers, got rank_offset={grid.rank_offset!r}, "
                f"size={grid.size!r}, shape={grid.shape!r}, dim_names={grid.dim_names!r}"
            ) from None
        if len(shape) != len(dim_names) or len(set(dim_names)) != len(dim_names) or any(n < 1 for n in shape):
            raise ValueError(
                f"module {module}: expected one positive size per distinct dim, got shape {shape} of dims {dim_names}"
            )
        if size != math.prod(shape):
            raise ValueError(f"module {module}: expected a size of {math.prod(shape)} for shape {shape}, got {size}")
        if offset < 0:
            raise ValueError(f"module {module}: expected a rank_offset of 0 or more, got {offset}")
        return cls(module, offset, shape, dim_names)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ranks(self) -> range:
        return range(self.rank_offset, self.rank_offset + self.size)

    @property
    def pp_size(self) -> int:
        return self.shape[self.dim_names.index("pp")] if "pp" in self.dim_names else 1

    def pp_rank(self, rank: int) -> int:
        """Pipeline stage of a global rank; ValueError where the rank is not in the grid."""
        if rank not in self.ranks:
            raise ValueError(f"module {self.module}: expected one of its ranks {span(self.ranks)}, got rank {rank}")
        if "pp" not in self.dim_names:
            return 0
        axis = self.dim_names.index("pp")
        return (rank - self.rank_offset) // math.prod(self.shape[:axis]) % self.shape[axis]

    def stage_ranks(self, stage: int) -> list[int]:
        """Ranks of a pipeline stage; equal indices in two stages' lists are equal coordinates in all other dims."""
        return [rank for rank in self.ranks if self.pp_rank(rank) == stage]


def span(ranks: range) -> str:
    """`[4, 8)`: how messages name a grid's ranks."""
    return f"[{ranks.start}, {ranks.stop})"


def count_stages(
    topology: Mapping[str, Sequence[str]],
    grids: Mapping[str, Any],
    rank: int | None = None,
    module_name: str | None = None,
) -> int:
    """Pipeline stages along the longest path of the module graph; see `compute_total_pipeline_stages`.

    Only `shape` and `dim_names` of the grids are read, unless `rank` is given.
    """
    names = list(grids)
    index = {name: i for i, name in enumerate(names)}
    if module_name is not None and module_name not in index:
        raise ValueError(f"expected one of the modules {sorted(names)}, got {module_name!r}")
    for source, destinations in topology.items():
        unknown = [name for name in (source, *destinations) if name not in index]
        if unknown:
            raise ValueError(f"topology: expected modules among {sorted(names)}, got {unknown[0]!r} ({source!r} edges)")
    downstream = [[index[name] for name in topology.get(source, ())] for source in names]
    weights = [_pp_size_of(grid) for grid in grids.values()]
    if rank is None:
        total = _C.longest_path(weights, downstream, names, -1)  # names the cycle where there is one
        if not names:
            raise ValueError("topology: expected at least one module without outgoing edges, got no module at all")
        return total
    candidates = [module_name] if module_name is not None else names
    stages = {
        name: shape.pp_rank(rank) + 1
        for name in candidates
        if rank in (shape := GridShape.from_grid(name, grids[name])).ranks
    }
    if not stages:
        spans = {name: span(GridShape.from_grid(name, grids[name]).ranks) for name in candidates}
        raise ValueError(f"rank {rank} is in no module: expected it in one of {spans}")
    # The module ends every path that counts, once: its full size is exchangeable for the stages up to the rank.
    return max(
        _C.longest_path(weights, downstream, names, index[name]) - weights[index[name]] + stage
        for name, stage in stages.items()
    )


def _pp_size_of(grid: Any) -> int:
    dim_names = list(grid.dim_names)
    return int(grid.shape[dim_names.index("pp")]) if "pp" in dim_names else 1


def check_modules(
    module_to_grid_map: Mapping[str, Any], topology: Mapping[str, Sequence[str]], world_size: int
) -> dict[str, GridShape]:
    """Convert the grids and refuse what cannot be run, naming modules, expected and got.

    Raises:
        TypeError: an object that is no grid, no dict of grids or no dict of lists of modules.
        ValueError: topology and grids name different modules, an unknown destination, a cycle, a grid larger than the
            world, modules on common ranks one of which has PP > 1 or which receive from one and the same module.
    """
    check_mapping("module_to_grid_map", module_to_grid_map, "module name -> grid")
    check_mapping("topology", topology, "module name -> list of the modules downstream")
    for name, downstream in topology.items():
        if isinstance(downstream, str) or not isinstance(downstream, Sequence):
            raise TypeError(f"topology: module {name}: expected a list of modules, got {downstream!r}")
    if not module_to_grid_map:
        raise ValueError("module_to_grid_map: expected at least one module, got none")
    grids = {name: GridShape.from_grid(name, grid) for name, grid in module_to_grid_map.items()}
    if set(topology) != set(grids):
        raise ValueError(f"topology and grids differ: expected entries for {sorted(grids)}, got {sorted(topology)}")
    count_stages(topology, grids)  # unknown destinations and cycles
    for name, grid in grids.items():
        if grid.ranks.stop > world_size:
            raise ValueError(f"module {name}: expected ranks below the world size {world_size}, got {span(grid.ranks)}")
    names = sorted(grids)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            _check_overlap(grids[first], grids[second], topology)
    return grids


def _check_overlap(first: GridShape, second: GridShape, topology: Mapping[str, Sequence[str]]) -> None:
    if first.ranks.start >= second.ranks.stop or second.ranks.start >= first.ranks.stop:
        return
    where = f"modules {first.module} (ranks {span(first.ranks)}) and {second.module} (ranks {span(second.ranks)})"
    if first.pp_size > 1 or second.pp_size > 1:
        raise ValueError(
            f"{where} overlap: expected pipeline-parallel size 1 for both, got {first.pp_size} and {second.pp_size}"
        )
    common = [name for name, to in topology.items() if first.module in to and second.module in to]
    if common:
        # The schedule hands a rank one dictionary keyed by the sending module: two inputs would share a key.
        raise ValueError(
            f"{where} overlap and both receive from {common[0]}: expected ranks of their own for one of them"
        )


def check_mapping(what: str, given: Any, expected: str) -> None:
    """TypeError unless it is a dict, or anything like one."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{what}: expected a dict, {expected}, got {given!r} ({type(given).__name__})")


def check_dim_mapping(dim_mapping: Mapping[str, int]) -> None:
    """TypeError unless it is a dict, ValueError unless 's', 'b' and 'h' are a permutation of the axes 0, 1, 2."""
    check_mapping("dim_mapping", dim_mapping, "'s', 'b' and 'h' -> axis")
    if set(dim_mapping) != set(DEFAULT_DIM_MAPPING) or set(dim_mapping.values()) != {0, 1, 2}:
        raise ValueError(
            f"dim_mapping: expected 's', 'b' and 'h' on the axes 0, 1 and 2, one each, got {dict(dim_mapping)}"
        )


def warn_of_assumed_axes(
    logger: logging.Logger,
    topology: Mapping[str, Sequence[str]],
    grids: Mapping[str, Any],
    output_ndim: Callable[[str], int],
) -> None:
    """Say which edges cut 3-D tensors along an axis that nobody has named: those between different lane counts."""
    lanes = {name: len(Layout.from_grid(grid).lanes()) for name, grid in grids.items()}
    edges = [
        f"{source} -> {destination}"
        for source in sorted(topology)
        for destination in sorted(topology[source])
        if output_ndim(source) == 3 and lanes[source] != lanes[destination]
    ]
    if edges:
        logger.warning(
            "%s: batch is taken to be axis 0, as the released class does; Megatron's own modules give [s, b, h]: "
            "pass dim_mapping",
            ", ".join(edges),
        )


def check_output_ndim(module_output_ndim: Mapping[str, int], modules: Mapping[str, Any]) -> None:
    """TypeError unless it is a dict, ValueError unless every named module exists and has 2 or 3 dimensions."""
    check_mapping("module_output_ndim", module_output_ndim, "module name -> 2 or 3")
    for name, ndim in module_output_ndim.items():
        if name not in modules:
            raise ValueError(f"module_output_ndim: expected modules among {sorted(modules)}, got {name!r}")
        if ndim not in (2, 3):
            raise ValueError(f"module_output_ndim: expected 2 or 3 for module {name}, got {ndim!r}")


def agree(
    compare: Callable[[str], list[tuple[list[int], str]] | None],
    description: Mapping[str, Any] | None,
    refusal: Exception | None = None,
) -> None:
    """Collective over the default process group: go on only if every rank describes the same model.

    Args:
        compare: tells which ranks gave which text, None where all gave the same: `mimo_ext._setup.Setup.compare`.
        description: what must be equal everywhere, as nested dicts of plain values; None where this rank refuses.
        refusal: this rank's own error. It is raised here only after the other ranks have heard of it: a rank that
            raised at once would leave them waiting.

    Raises:
        ValueError: another rank refuses its arguments; its reason is in the message.
        RuntimeError: the descriptions differ; the message names the ranks, and for each what was expected and got.
    """
    rank = dist.get_rank()
    mine = {"refusal": str(refusal)} if refusal is not None else {"description": description}
    given = compare(json.dumps(mine, sort_keys=True, default=str))
    if refusal is not None:
        kind = type(refusal) if type(refusal) in (TypeError, ValueError, NotImplementedError) else ValueError
        raise kind(f"rank {rank}: {refusal}") from refusal
    if given is None:
        return
    votes = [(ranks, json.loads(text)) for ranks, text in given]
    refusals = {other: vote["refusal"] for ranks, vote in votes if "refusal" in vote for other in ranks}
    if refusals:
        other = min(refusals)
        raise ValueError(
            f"rank {rank}: rank {other} refused its arguments ({len(refusals)} rank(s) in all): {refusals[other]}"
        )
    # What most ranks say is expected; a tie goes to the lowest rank.
    expected = max(votes, key=lambda vote: (len(vote[0]), -min(vote[0])))[1]["description"]
    lines = [f"rank {rank}: the ranks were given different models:"]
    for ranks, vote in votes:
        differences = _differences(expected, vote["description"])
        # What a bridge is made of follows from the rest, where that differs.
        differences = [line for line in differences if not line.startswith("bridges.")] or differences
        shown = ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")
        lines += [f"  rank(s) {shown}: {line}" for line in differences]
    raise RuntimeError("\n".join(lines))


def _differences(expected: Any, got: Any, path: str = "") -> list[str]:
    if isinstance(expected, dict) and isinstance(got, dict):
        lines = []
        for key in sorted({*expected, *got}):
            lines += _differences(
                expected.get(key, "nothing"), got.get(key, "nothing"), f"{path}.{key}" if path else key
            )
        return lines
    return [] if expected == got else [f"{path}: expected {expected}, got {got}"]
