"""Grids of the modules, and the process groups that depend on them.

Every function here that makes a process group is collective over the world: all ranks call it, in the same order.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from mimo_ext._bytes import all_gather_ints
from mimo_ext.megatron.config import MimoParallelismConfig

EXPERT_VIEW_NAME = "expert"

_F = TypeVar("_F", bound=Callable[..., Any])

# The order is part of the contract: every rank makes these groups one after another.
_BASE_GROUPS = (
    ("tp",),
    ("cp",),
    ("pp",),
    ("dp",),
    ("dp", "cp"),
    ("tp", "cp"),
    ("tp", "pp"),
    ("tp", "dp", "cp"),
    ("tp", "cp", "dp", "pp"),
)
_EXPERT_GROUPS = (("ep",), ("expt_tp",), ("expt_dp",), ("expt_tp", "ep"), ("expt_tp", "ep", "pp"))


def _also_named(**names: str) -> Callable[[_F], _F]:
    """Accept a parameter under the released generation's name, too: ``released="ours"``."""

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for released, ours in names.items():
                if released in kwargs:
                    if ours in kwargs:
                        raise TypeError(f"{function.__name__}() got both {ours!r} and {released!r}, which are one")
                    kwargs[ours] = kwargs.pop(released)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


@_also_named(megatron_mimo_parallelism_config="mimo_parallelism_config")
def build_hypercomm_grids(mimo_parallelism_config: MimoParallelismConfig, backend: str | None = None) -> dict[str, Any]:
    """Make a HyperCommGrid per module, with all its process groups, on every rank.

    Each grid has the dense view ``tp cp dp pp`` and a view ``"expert"`` with ``expt_tp ep expt_dp pp`` over the same
    ranks; DDP and megatron-core's MIMO optimizer read both.

    Args:
        mimo_parallelism_config: sizes of the modules, with ``data_parallel_size`` set. The released generation's
            name, ``megatron_mimo_parallelism_config``, is accepted, too.
        backend: of the groups. Default: the backend of the default process group, or "nccl" where there is none.

    Returns:
        Module name -> grid, in the order of the config.

    Raises:
        ValueError: a module without ``data_parallel_size``, or with expert sizes that do not divide its ranks; by
            name, before any group is made.
    """
    # Fetched now, not at import: programs replace the class.
    from megatron.core.hyper_comm_grid import HyperCommGrid

    if backend is None:
        backend = dist.get_backend() if dist.is_initialized() else "nccl"
    modules = mimo_parallelism_config.module_parallelisms
    experts: dict[str, int] = {}
    for name, sizes in modules.items():
        try:
            experts[name] = sizes.expert_data_parallel_size
        except ValueError as error:
            raise ValueError(
                f"module '{name}': expected sizes that finalize() has checked, got data_parallel_size="
                f"{sizes.data_parallel_size}: {error}"
            ) from None
    grids: dict[str, Any] = {}
    for name, sizes in modules.items():
        grid = HyperCommGrid(
            shape=[
                sizes.tensor_model_parallel_size,
                sizes.context_parallel_size,
                sizes.data_parallel_size,
                sizes.pipeline_model_parallel_size,
            ],
            dim_names=["tp", "cp", "dp", "pp"],
            rank_offset=sizes.rank_offset,
            backend=backend,
        )
        grid.register_view(
            EXPERT_VIEW_NAME,
            shape=[
                sizes.expert_tensor_parallel_size,
                sizes.expert_model_parallel_size,
                experts[name],
                sizes.pipeline_model_parallel_size,
            ],
            dim_names=["expt_tp", "ep", "expt_dp", "pp"],
            shared_dims=["pp"],
        )
        for dims in _BASE_GROUPS:
            grid.create_pg(list(dims))
        for dims in _EXPERT_GROUPS:
            grid.create_pg(list(dims), view=EXPERT_VIEW_NAME)
        grids[name] = grid
    return grids


@_also_named(pp_rank_groups="pp_group")
def populate_embedding_and_position_groups(
    pp_group: Any,
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Make the groups over which a module's position and word embeddings are kept equal.

    The position group holds the first stage alone, the word-embedding group the first and the last stage.

    Args:
        pp_group: the rank lists of *all* pipelines of a module (``grid.get_rank_enum(["pp"])``): every rank of the
            world calls this and makes every group, in one order. Or the PP process group of the current rank: then
            the ranks of that group call this, and no others need to. Or None. ``pp_rank_groups`` is accepted as a
            name, too.

    Returns:
        ``(pos_embd_pg, embd_pg)`` of the current rank, None for a group that it is not in.

    Raises:
        TypeError, ValueError: something else than rank lists or a process group; a pipeline without ranks, or with
            ranks that the world does not have. No group has been made then.
        RuntimeError: with a process group whose ranks have not made equally many groups before; torch would give the
            new group another name on each of them, and they would wait for each other.
    """
    if pp_group is None or pp_group is dist.GroupMember.NON_GROUP_MEMBER:
        return None, None
    pipelines = _rank_lists(pp_group)
    if pipelines is None:
        return _groups_of_one_pipeline(pp_group)
    for index, ranks in enumerate(pipelines):
        _check_pipeline(index, ranks)
    pos_embd_pg, embd_pg = None, None
    for ranks in pipelines:
        position_ranks, embedding_ranks = _embedding_ranks(ranks)
        position_group = dist.new_group(ranks=position_ranks)
        embedding_group = dist.new_group(ranks=embedding_ranks)
        rank = dist.get_rank()
        if rank in position_ranks:
            pos_embd_pg = position_group
        if rank in embedding_ranks:
            embd_pg = embedding_group
    return pos_embd_pg, embd_pg


def _check_pipeline(index: int, ranks: Any) -> None:
    """Refuse what are no ranks of one pipeline, before the other ranks wait in the making of a group."""
    where = f"rank {dist.get_rank()}: embedding groups: pipeline {index}"
    try:
        ranks = [operator.index(rank) for rank in ranks]
    except TypeError:
        raise TypeError(f"{where}: expected a list of ranks, got {ranks!r} ({type(ranks).__name__})") from None
    if not ranks:
        raise ValueError(f"{where}: expected one rank or more, got none")
    world_size = dist.get_world_size() if dist.is_initialized() else None
    if isinstance(world_size, int) and not all(0 <= rank < world_size for rank in ranks):
        raise ValueError(f"{where}: expected ranks of the world (0..{world_size - 1}), got {ranks}")


def _rank_lists(pp_group: Any) -> list[list[int]] | None:
    """The argument as rank lists, or None where it is a process group (of torch, a wrapper or a fake)."""
    if isinstance(pp_group, dist.ProcessGroup):
        return None
    if isinstance(pp_group, (int, str, float)):
        raise TypeError(
            f"rank {dist.get_rank()}: embedding groups: expected the rank lists of all pipelines or a process group, "
            f"got {pp_group!r} ({type(pp_group).__name__})"
        )
    try:
        return list(pp_group)
    except TypeError:
        return None


def _embedding_ranks(pipeline: list[int]) -> tuple[list[int], list[int]]:
    """Ranks of the position group and of the word-embedding group of one pipeline."""
    first, last = min(pipeline), max(pipeline)
    return [first], [first] if first == last else [first, last]


def _groups_of_one_pipeline(pp_group: Any) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Both groups, made by the ranks of one pipeline alone: other pipelines do the same at this moment."""
    if isinstance(pp_group, dist.ProcessGroup):
        _check_equal_group_counts(pp_group)
    rank = dist.get_rank()
    groups: list[dist.ProcessGroup | None] = []
    for ranks in _embedding_ranks(dist.get_process_group_ranks(pp_group)):
        # A stage that is not in a group makes one of its own in its place, so that the counts stay equal.
        group = dist.new_group(ranks=ranks if rank in ranks else [rank], use_local_synchronization=True)
        groups.append(group if rank in ranks else None)
    return groups[0], groups[1]


def _check_equal_group_counts(pp_group: dist.ProcessGroup) -> None:
    """torch names a group that is made without the world after its ranks and the number of groups made before."""
    counts = all_gather_ints(len(dist.distributed_c10d._world.pg_names), pp_group)
    if len(set(counts)) > 1:
        ranks = dist.get_process_group_ranks(pp_group)
        raise RuntimeError(
            f"rank {dist.get_rank()}: embedding groups cannot be made from the process group of ranks {ranks} alone: "
            f"expected equally many process groups on each of them, got {counts}. Pass the rank lists of all "
            'pipelines, grid.get_rank_enum(["pp"]), on every rank of the world instead.'
        )


def is_pp_first_stage(pp_group: dist.ProcessGroup | None) -> bool:
    """Whether the current rank is the first of its pipeline; True for None (no pipeline)."""
    return pp_group is None or dist.get_rank() == min(dist.get_process_group_ranks(pp_group))


def is_pp_last_stage(pp_group: dist.ProcessGroup | None) -> bool:
    """Whether the current rank is the last of its pipeline; True for None (no pipeline)."""
    return pp_group is None or dist.get_rank() == max(dist.get_process_group_ranks(pp_group))
