"""How a module's ranks are arranged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ._extension import _C

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Plan = _C.Plan
# How the ranks of a lane that hold the same come by their copies.
PATHS = ("auto", "pipelined", "direct", "leader")


@dataclass(frozen=True)
class Layout:
    """A module's global ranks, factorised by parallel dims; the first dim of `order` varies fastest.

    Args:
        ranks: global ranks in the order of the dims; ``tp * cp * dp * pp`` of them.
        tp, cp, dp, pp: sizes of tensor, context, data and pipeline parallelism.
        order: which dim varies fastest, next fastest, ...; as `dim_names` of Megatron's HyperCommGrid.
        cp_placement: how the context-parallel ranks hold the sequence axis: "replicated" (each holds all of it; their
            gradients are partial and are summed), "contiguous" or "zigzag" (chunks c and 2*cp-1-c).
        sequence_parallel: the tp ranks hold contiguous shards of the sequence axis instead of replicas.
        name: of the module, for messages and pictures.

    Raises:
        ValueError: sizes that are not positive or do not multiply to the number of ranks, ranks listed twice, unknown
            dims.

    >>> Layout(ranks=range(0, 4), tp=2, dp=2).lanes()
    ((0, 1), (2, 3))
    """

    ranks: tuple[int, ...]
    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    order: tuple[str, ...] = ("tp", "cp", "dp", "pp")
    cp_placement: str = "replicated"
    sequence_parallel: bool = False
    name: str = ""
    gtp_remat: int = 1

    def __init__(
        self,
        ranks: Iterable[int],
        tp: int = 1,
        cp: int = 1,
        dp: int = 1,
        pp: int = 1,
        order: Iterable[str] = ("tp", "cp", "dp", "pp"),
        cp_placement: str = "replicated",
        sequence_parallel: bool = False,
        name: str = "",
        gtp_remat: int = 1,
    ) -> None:
        values = {"tp": tp, "cp": cp, "dp": dp, "pp": pp, "gtp_remat": gtp_remat}
        order = tuple(order)
        for dim in order:
            if dim not in values:
                raise ValueError(f"layout '{name}': unknown dim {dim!r} in order, expected some of {sorted(values)}")
        # A dim that is left out of the order has size 1 and no place.
        for dim, size in values.items():
            if dim not in order and size != 1:
                order = (*order, dim) if dim == "gtp_remat" else order
                if dim not in order:
                    raise ValueError(f"layout '{name}': {dim}={size}, but order {order} lacks {dim!r}")
        fields: dict[str, Any] = {
            **values,
            "ranks": tuple(int(rank) for rank in ranks),
            "order": order,
            "cp_placement": cp_placement,
            "sequence_parallel": bool(sequence_parallel),
            "name": name,
        }
        for key, value in fields.items():
            object.__setattr__(self, key, value)
        _ = self._core  # checks everything

    def __getstate__(self) -> dict[str, Any]:
        # What the C++ core knows is made again from the rest: layouts can be copied and sent to other processes.
        return {key: value for key, value in self.__dict__.items() if key != "_core"}

    @cached_property
    def _core(self) -> _C.Layout:
        dims = [(dim, int(getattr(self, dim))) for dim in self.order]
        return _C.Layout(list(self.ranks), dims, self.cp_placement, self.sequence_parallel, self.name)

    def boundary(self, stage: int = -1) -> _C.Boundary:
        """The lanes of pipeline stage `stage` (negative: from the last) as the C++ core sees them.

        Raises:
            IndexError: no such stage.
        """
        return self._core.boundary(stage)

    def lanes(self, stage: int = -1) -> tuple[tuple[int, ...], ...]:
        """Ranks that share the same samples: one tuple per dp coordinate, each of tp * cp ranks, tp fastest."""
        return tuple(tuple(lane) for lane in self.boundary(stage).lanes)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @classmethod
    def from_grid(
        cls, grid: Any, *, name: str = "", cp_placement: str = "replicated", sequence_parallel: bool = False
    ) -> Layout:
        """From a grid of consecutive ranks, such as Megatron's HyperCommGrid.

        Args:
            grid: any object with `rank_offset`, `size`, `shape` and `dim_names` (first dim fastest).

        Raises:
            ValueError: dims of size > 1 that a bridge does not know, or a shape that does not multiply to `size`.
        """
        sizes = dict(zip(grid.dim_names, (int(extent) for extent in grid.shape), strict=True))
        known = ("tp", "cp", "dp", "pp", "gtp_remat")
        for dim, extent in sizes.items():
            if dim not in known and extent != 1:
                raise ValueError(f"grid of module '{name}': unknown dim {dim!r} of size {extent}, expected {known}")
        order = tuple(dim for dim in grid.dim_names if dim in known)
        ranks = range(grid.rank_offset, grid.rank_offset + grid.size)
        return cls(
            ranks,
            **{dim: sizes[dim] for dim in order},
            order=order,
            cp_placement=cp_placement,
            sequence_parallel=sequence_parallel,
            name=name,
        )

    @classmethod
    def from_mesh(
        cls,
        mesh: DeviceMesh,
        *,
        tp: str | None = "tp",
        cp: str | None = "cp",
        dp: str | None = "dp",
        pp: str | None = "pp",
        name: str = "",
        cp_placement: str = "replicated",
        sequence_parallel: bool = False,
    ) -> Layout:
        """From a `torch.distributed.DeviceMesh`.

        Args:
            tp, cp, dp, pp: names of the mesh's dims; those that it lacks have size 1.

        Raises:
            ValueError: a mesh without dim names, or with a dim of size > 1 that is none of the four.
        """
        names = mesh.mesh_dim_names
        if names is None:
            raise ValueError(f"mesh of module '{name}': expected a DeviceMesh with mesh_dim_names, got none")
        roles = {given: role for role, given in {"tp": tp, "cp": cp, "dp": dp, "pp": pp}.items() if given is not None}
        sizes: dict[str, int] = {}
        for dim, extent in zip(names, mesh.mesh.shape, strict=True):
            if dim not in roles and extent != 1:
                raise ValueError(
                    f"mesh of module '{name}': unknown dim {dim!r} of size {extent}, expected {sorted(roles)}"
                )
            if dim in roles:
                sizes[roles[dim]] = int(extent)
        # The last dim of a mesh varies fastest.
        return cls(
            mesh.mesh.flatten().tolist(),
            **sizes,
            order=tuple(reversed(sizes)),
            cp_placement=cp_placement,
            sequence_parallel=sequence_parallel,
            name=name,
        )
