"""Executes a plan's messages on numpy arrays, and says the slow and obvious way what each rank must end up with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mimo_ext import Layout, Plan
from mimo_ext._extension import _C


@dataclass(frozen=True)
class Setting:
    """Two layouts and one global microbatch; `rows` are the rows of each sample of a 2-D tensor."""

    src: Layout
    dst: Layout
    ndim: int
    batch_dim: int
    samples: int
    rows: tuple[int, ...]
    ragged: bool
    seq: int
    hidden: int
    max_chunks: int = 1
    path: str = "auto"

    @property
    def seq_dim(self) -> int:
        return 0 if self.ndim == 2 else 1 - self.batch_dim

    def shape(self) -> list[int]:
        """Of the global tensor, all lanes together."""
        if self.ndim == 2:
            return [sum(self.rows), self.hidden]
        shape = [self.hidden] * 3
        shape[self.batch_dim], shape[self.seq_dim] = self.samples, self.seq
        return shape

    def microbatch(self, rows: list[int] | None = None) -> _C.Microbatch:
        shape = self.shape()
        counts = list(self.rows) if rows is None else rows
        return _C.Microbatch(
            ndim=self.ndim,
            batch_dim=self.batch_dim,
            seq_dim=self.seq_dim,
            samples=self.samples,
            shape=shape,
            rows_per_sample=self.rows[0] if self.rows and not self.ragged else 1,
            rows=counts if self.ndim == 2 and self.ragged else [],
        )

    def plan(self, backward: bool = False) -> Plan:
        return self.plan_of(self.microbatch(), backward)

    def plan_of(self, microbatch: _C.Microbatch, backward: bool = False) -> Plan:
        # Elements of one byte, chunks of two bytes at least.
        return Plan(self.src.boundary(-1), self.dst.boundary(0), microbatch, backward, self.max_chunks, 2, self.path)


def lane_range(samples: int, lane: int, lanes: int) -> tuple[int, int]:
    return samples * lane // lanes, samples * (lane + 1) // lanes


def shard_indices(boundary: _C.Boundary, member: int, extent: int) -> list[int]:
    """Rows of the sequence axis that a member holds, in its order."""
    tp_index, cp_index = member % boundary.tp, member // boundary.tp

    def part(items: list[int], index: int, parts: int) -> list[int]:
        return items[len(items) * index // parts : len(items) * (index + 1) // parts]

    rows = list(range(extent))
    if boundary.cp_placement == "contiguous":
        rows = part(rows, cp_index, boundary.cp)
    elif boundary.cp_placement == "zigzag":
        chunks = 2 * boundary.cp
        rows = [row for index in (cp_index, chunks - 1 - cp_index) for row in _chunk(extent, index, chunks)]
    return part(rows, tp_index, boundary.tp) if boundary.sequence_parallel else rows


def _chunk(extent: int, index: int, chunks: int) -> range:
    return range(extent * index // chunks, extent * (index + 1) // chunks)


def local(setting: Setting, boundary: _C.Boundary, whole: np.ndarray, lane: int, member: int) -> np.ndarray:
    """What one rank holds of the global array."""
    first, last = lane_range(setting.samples, lane, len(boundary.lanes))
    if setting.ndim == 2:
        mine = whole[sum(setting.rows[:first]) : sum(setting.rows[:last])]
    else:
        mine = np.take(whole, range(first, last), axis=setting.batch_dim)
    axis = setting.seq_dim
    return np.take(mine, shard_indices(boundary, member, mine.shape[axis]), axis=axis)


def members(boundary: _C.Boundary) -> list[tuple[int, int, int]]:
    """(rank, lane, member) of every rank of a side."""
    return [(rank, lane, member) for lane, ranks in enumerate(boundary.lanes) for member, rank in enumerate(ranks)]


def slices(box: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in box)


def execute(plan: Plan, held: dict[int, np.ndarray]) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Carry out a plan. `held[rank]` is what each sender holds.

    Returns what each receiver ends up with, and how often each of its elements was written (added parts not counted).
    Elements that nothing writes stay NaN-like: a large negative number.
    """
    receiver = plan.source if plan.backward else plan.destination
    result: dict[int, np.ndarray] = {}
    writes: dict[int, np.ndarray] = {}
    for rank, lane, member in members(receiver):
        shape = plan.receiver_shape(lane, member)
        result[rank] = np.full(shape, -(10**12), dtype=np.int64)
        writes[rank] = np.zeros(shape, dtype=np.int64)
    messages = {rank: plan.for_rank(rank) for rank in {*held, *result}}
    transfers = [message for rank in messages for message in messages[rank]["sends"]]
    # Parts of contribution 0 write, the others add to what is there.
    for message in sorted(transfers, key=lambda item: item["contribution"]):
        part = held[message["sender"]][slices(message["send_box"])]
        target = slices(message["recv_box"])
        if message["contribution"] == 0:
            result[message["receiver"]][target] = part
            writes[message["receiver"]][target] += 1
        else:
            result[message["receiver"]][target] += part
    parts = [
        (message, result[message["sender"]][slices(message["send_box"])].copy())
        for rank in messages
        for message in messages[rank]["lane_sends"]
    ]
    for message, part in parts:
        result[message["receiver"]][slices(message["recv_box"])] = part
        writes[message["receiver"]][slices(message["recv_box"])] += 1
    return result, writes
