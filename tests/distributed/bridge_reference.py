"""What a bridge must deliver, computed the slow and obvious way from the global tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import mimo_ext


@dataclass(frozen=True)
class Case:
    """One bridge and one microbatch. `rows` (2-D): rows of every sample of the global microbatch."""

    src: dict
    dst: dict
    ndim: int = 2
    samples: int = 6
    rows: tuple[int, ...] | None = None
    rows_per_sample: int = 3
    batch_dim: int = 0
    seq: int = 5
    hidden: int = 4
    dtype: torch.dtype = torch.float32
    static: bool = False
    pass_counts: bool = True
    name: str = ""
    extra: dict = field(default_factory=dict)

    def layouts(self) -> tuple[mimo_ext.Layout, mimo_ext.Layout]:
        return mimo_ext.Layout(**self.src, name="images"), mimo_ext.Layout(**self.dst, name="language")

    @property
    def seq_dim(self) -> int:
        return 1 - self.batch_dim

    def row_counts(self) -> list[int]:
        return list(self.rows) if self.rows is not None else [self.rows_per_sample] * self.samples

    def global_shape(self) -> list[int]:
        if self.ndim == 2:
            return [sum(self.row_counts()), self.hidden]
        shape = [self.hidden] * 3
        shape[self.batch_dim], shape[self.seq_dim] = self.samples, self.seq
        return shape

    def global_tensor(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-64, 64, self.global_shape(), generator=generator).to(self.dtype)


def lane_samples(samples: int, lane: int, lanes: int) -> tuple[int, int]:
    return samples * lane // lanes, samples * (lane + 1) // lanes


def lane_slice(case: Case, whole: torch.Tensor, lane: int, lanes: int) -> torch.Tensor:
    """The part of the global tensor that one lane holds."""
    first, last = lane_samples(case.samples, lane, lanes)
    if case.ndim == 3:
        return whole.narrow(case.batch_dim, first, last - first)
    counts = case.row_counts()
    return whole[sum(counts[:first]) : sum(counts[:last])]


def shard_rows(layout: mimo_ext.Layout, member: int, extent: int) -> list[int]:
    """Indices along the sequence axis that a member of a lane holds, in its order."""
    tp_index, cp_index = member % layout.tp, member // layout.tp

    def part(items: list[int], index: int, parts: int) -> list[int]:
        return items[len(items) * index // parts : len(items) * (index + 1) // parts]

    rows = list(range(extent))
    if layout.cp_placement == "contiguous":
        rows = part(rows, cp_index, layout.cp)
    elif layout.cp_placement == "zigzag":
        twice = 2 * layout.cp
        rows = part(rows, cp_index, twice) + part(rows, twice - 1 - cp_index, twice)
    return part(rows, tp_index, layout.tp) if layout.sequence_parallel else rows


def local_tensor(case: Case, layout: mimo_ext.Layout, whole: torch.Tensor, lane: int, member: int) -> torch.Tensor:
    """What one rank of a side holds of the global tensor."""
    lanes = len(layout.lanes())
    mine = lane_slice(case, whole, lane, lanes)
    axis = 0 if case.ndim == 2 else case.seq_dim
    return mine.index_select(axis, torch.tensor(shard_rows(layout, member, mine.shape[axis]), dtype=torch.long))


def find(layout: mimo_ext.Layout, rank: int, stage: int) -> tuple[int, int] | None:
    for lane, ranks in enumerate(layout.lanes(stage)):
        if rank in ranks:
            return lane, ranks.index(rank)
    return None


def global_gradients(case: Case, dst: mimo_ext.Layout, seed: int) -> list[torch.Tensor]:
    """One global gradient per cp copy of the destination (partial, to be summed); one where cp is sharded."""
    copies = dst.cp if dst.cp_placement == "replicated" else 1
    return [case.global_tensor(seed + 1000 + copy) for copy in range(copies)]
