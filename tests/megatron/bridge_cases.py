"""Edges between two modules, and what must arrive over them: computed from the whole microbatch, the obvious way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pipeline_model import Grid, grid

SEQ, HIDDEN = 3, 4


@dataclass
class Edge:
    """An edge and a microbatch: `rows` (2-D) are the rows of every sample, else 3-D tensors of `samples` samples."""

    name: str
    src: Grid
    dest: Grid
    samples: int = 4
    rows: tuple[int, ...] | None = None
    axes: dict[str, int] | None = None  # None: the default
    dtype: torch.dtype = torch.float32
    counts_from: str = "tensor"  # 2-D: "tensor" (the attribute), "argument" or "nowhere"
    like_released: bool = False  # Megatron's own class does it, too

    @property
    def ndim(self) -> int:
        return 3 if self.rows is None else 2

    @property
    def batch_dim(self) -> int:
        return 0 if self.rows is not None or self.axes is None else self.axes["b"]

    def arguments(self) -> dict[str, Any]:
        return {
            "src_grid": self.src,
            "dest_grid": self.dest,
            "dim_mapping": self.axes,
            "comm_dtype": self.dtype,
            "src_module_name": "images",
            "dest_module_name": "language",
            "tensor_ndim": self.ndim,
        }

    def whole(self, seed: int) -> torch.Tensor:
        """The tensor of the global microbatch: whole numbers, exact in every dtype."""
        shape = [HIDDEN, HIDDEN, HIDDEN] if self.rows is None else [sum(self.rows), HIDDEN]
        if self.rows is None:
            axes = self.axes or {"b": 0, "s": 1}
            shape[axes["b"]], shape[axes["s"]] = self.samples, SEQ
        return torch.randint(-40, 40, shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)

    def counts(self, side: Grid, rank: int) -> list[int] | None:
        """Rows of each sample of the rank's lane."""
        first, end = self.samples_of(side, rank)
        return None if self.rows is None else list(self.rows[first:end])

    def samples_of(self, side: Grid, rank: int) -> tuple[int, int]:
        total = self.samples if self.rows is None else len(self.rows)
        lane, lanes = lane_of(side, rank)
        return lane * total // lanes, (lane + 1) * total // lanes

    def part(self, side: Grid, rank: int, whole: torch.Tensor) -> torch.Tensor:
        """What the rank's lane holds of the global microbatch."""
        first, end = self.samples_of(side, rank)
        if self.rows is None:
            return whole.narrow(self.batch_dim, first, end - first)
        return whole[sum(self.rows[:first]) : sum(self.rows[:end])]

    def output(self, rank: int, seed: int) -> torch.Tensor:
        """What a source rank sends."""
        tensor = self.part(self.src, rank, self.whole(seed)).clone().requires_grad_()
        if self.rows is not None and self.counts_from == "tensor":
            tensor._mimo_bridge_split_sizes = self.counts(self.src, rank)
        return tensor

    def options(self, rank: int) -> dict[str, Any]:
        return {"row_counts": self.counts(self.src, rank)} if self.counts_from == "argument" else {}

    def gradient(self, rank: int, seed: int) -> torch.Tensor:
        """What a destination rank sends back: equal on tp copies, partial on cp copies."""
        return self.part(self.dest, rank, self.whole(seed + 1000 + self.dest.coordinate(rank, "cp")))

    def expected_gradient(self, rank: int, seed: int) -> torch.Tensor:
        whole = sum(self.whole(seed + 1000 + cp) for cp in range(self.dest.extent("cp")))
        return self.part(self.src, rank, whole)

    def is_boundary(self, side: Grid, rank: int) -> bool:
        return rank in side and side.coordinate(rank, "pp") == (side.extent("pp") - 1 if side is self.src else 0)


def lane_of(side: Grid, rank: int) -> tuple[int, int]:
    """Lane of the rank, and how many lanes there are: dp, and what else divides the data."""
    inner = side.extent("gtp_remat")
    return side.coordinate(rank, "dp") * inner + side.coordinate(rank, "gtp_remat"), side.extent("dp") * inner


SBH = {"s": 0, "b": 1, "h": 2}
EDGES = [
    Edge("equal", grid(0, tp=2, dp=2), grid(4, tp=2, dp=2), like_released=True),
    Edge("fan-in", grid(0, tp=2, cp=1, pp=1, dp=2), grid(4, tp=4, cp=1, pp=1, dp=1), axes=SBH, like_released=True),
    Edge("fan-in of four", grid(0, dp=4), grid(4, tp=4), samples=8, dtype=torch.bfloat16, like_released=True),
    Edge("fan-out", grid(0, tp=4, dp=1), grid(4, tp=2, dp=2), axes=SBH, dtype=torch.bfloat16, like_released=True),
    Edge("fan-out of four", grid(0, tp=2, dp=1), grid(4, dp=4), like_released=True),
    Edge("fan-out of rows", grid(0, tp=2, dp=1), grid(4, dp=4), rows=(3, 0, 5, 1), like_released=True),
    Edge("fan-in of rows", grid(0, dp=4), grid(4, tp=2, dp=2), rows=(3, 0, 5, 1, 2, 2, 0, 4)),
    Edge("even rows", grid(0, dp=2), grid(4, tp=2), rows=(2, 2, 2, 2), counts_from="nowhere", like_released=True),
    Edge("lane counts that do not divide", grid(0, dp=3), grid(3, tp=2, dp=2), samples=6, axes=SBH),
    Edge(
        "rows over 2 and 3 lanes", grid(0, tp=2, dp=2), grid(4, dp=3), rows=(1, 4, 0, 2, 6, 3), counts_from="argument"
    ),
    Edge("cp of the destination", grid(0, dp=2), grid(4, tp=2, cp=2), rows=(2, 1, 0, 3), dtype=torch.bfloat16),
    Edge("cp of the source", grid(0, tp=1, cp=2, dp=2), grid(4, dp=4), axes=SBH),
    Edge("pipelines", grid(0, tp=2, pp=2, dp=1), grid(4, tp=1, cp=1, pp=2, dp=2), rows=(3, 1), counts_from="argument"),
    Edge("pipelines, dp before pp", grid(0, dp=2, pp=2), grid(4, pp=2, tp=2), axes=SBH, like_released=False),
    Edge("a further dim", grid(0, tp=1, gtp_remat=2, dp=2), grid(4, tp=2, gtp_remat=2, dp=1), samples=8, axes=SBH),
    Edge("no rows at all", grid(0, dp=2), grid(4, tp=2), rows=(0, 0), like_released=False),
]
