"""Modules on the language model's ranks, with parallel sizes of their own: what joins them in one forward pass.

Every rank runs a part of every module. A rank's encoder inputs are those of its lane of the *encoder*, its
``input_ids`` and labels those of its lane of the *language model*: of a microbatch of B samples, lane i of k of either
module has ``[i * B // k, (i + 1) * B // k)``. The rows of the encoder go to the lanes of the language model by the same
plan as between modules on disjoint ranks; parts that stay on a rank are copied locally.

How many rows each sample of the encoder's lane has is seen in ``input_ids``, which other ranks hold. The language lanes
tell the encoder lanes, over a bridge of its own in the other direction, while the encoders compute. A program that
knows the counts gives them to the model's forward, and nothing is asked.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mimo_ext import Bridge, Layout, RowShards, bridge
from mimo_ext._setup import Setup
from mimo_ext.megatron.role import MIMO_LANGUAGE_MODULE_KEY
from mimo_ext.megatron.sharded import ShardedDelivery, two_dims


def sizes_of(grid: Any) -> dict[str, int]:
    """Dims of a grid that are larger than 1, in the order of the grid."""
    return {dim: size for dim, size in zip(grid.dim_names, grid.shape, strict=True) if size > 1}


def modules_to_bridge(grids: Mapping[str, Any]) -> list[str]:
    """Names, sorted, of the modules on the language model's ranks whose output needs a bridge to get there.

    Equal sizes in equal order need none: every rank has the rows of its own samples. With context parallelism they do,
    for the gradients: each rank of the language model has that of its part of the sequence, and the encoder needs the
    sum.
    """
    language = list(sizes_of(grids[MIMO_LANGUAGE_MODULE_KEY]).items())
    splits_sequence = any(dim == "cp" for dim, _ in language)
    return sorted(
        name
        for name, grid in grids.items()
        if name != MIMO_LANGUAGE_MODULE_KEY and (splits_sequence or list(sizes_of(grid).items()) != language)
    )


class ColocatedBridges:
    """The bridges from all such encoders to the language model. The constructor is collective over the default group.

    Where the grids cover a part of the world it is collective over the ranks of the grids.

    Args:
        grids: module name -> grid; all of the same ranks, without pipeline stages.
        dtype: in which rows and their gradients travel.
        device: of the rows.
        transport: what carries them, as of `mimo_ext.Bridge`.
        timeout: how long any wait for a peer may last; default that of `mimo_ext.Bridge`.
        sharded: where each rank of the language model receives the rows of its own part of the sequence only.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        ValueError: the ranks were given different arguments.
        NotImplementedError: a device that bridges do not support.
    """

    def __init__(
        self,
        grids: Mapping[str, Any],
        dtype: torch.dtype,
        *,
        device: torch.device | str = "cpu",
        transport: str | None = None,
        timeout: timedelta | None = None,
        sharded: ShardedDelivery | None = None,
    ) -> None:
        self.names = modules_to_bridge(grids)
        self._sharded = sharded
        self.dtype = dtype
        self._edges: dict[str, _Edge] = {}
        language_grid = grids[MIMO_LANGUAGE_MODULE_KEY]
        language = Layout.from_grid(language_grid, name=MIMO_LANGUAGE_MODULE_KEY)
        self.num_lanes = len(language.lanes())
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        try:
            with Setup("colocated modules", language.ranks, timeout) as setup:
                for name in self.names:
                    encoder = Layout.from_grid(grids[name], name=name)
                    what = f"{name} -> {MIMO_LANGUAGE_MODULE_KEY}"
                    carried = {**options, "device": device, "transport": transport}
                    rows = Bridge(encoder, language, dtype=dtype, name=what, setup=setup, **carried)
                    self._edges[name] = _Edge(name, rows)
                    self._edges[name].counts = Bridge(
                        language, encoder, dtype=torch.int64, name=f"row counts of {what}", setup=setup, **options
                    )
        except BaseException:
            self.close(abort=True)
            raise

    def bridge_of(self, name: str) -> Bridge:
        """The bridge from encoder `name` to the language model."""
        return self._edges[name].rows

    def tell_counts(self, name: str, input_ids: torch.Tensor, token_id: int) -> None:
        """Tell the lanes of encoder `name` how many rows each of their samples has. Waits for nobody.

        Args:
            input_ids: ``[b, s]`` (or ``[s]``) of this rank's lane of the language model.
            token_id: of the encoder's positions.
        """
        # The host must know the counts before it can say where rows go. Free where input_ids live on the host.
        mask = two_dims(input_ids) == token_id
        if self._sharded is None:
            counts = mask.sum(dim=1, keepdim=True).cpu()
        else:
            counts = self._sharded.shards.interval_counts(mask).cpu()
        with torch.no_grad():
            self._edges[name].ask.send_forward(counts, num_samples=self.num_samples(input_ids))

    def hear_counts(self, name: str) -> tuple[list[int], RowShards | None]:
        """What the language lanes told of the samples of this rank's lane of encoder `name`.

        Returns:
            Rows of each sample; and which ranks use them, where the rows are delivered in shards.
        """
        with torch.no_grad():
            told = self._edges[name].ask.recv_forward()
        counts = told.sum(dim=1).tolist()
        if self._sharded is None:
            return counts, None
        return counts, self._sharded.shards.row_shards_of_intervals(told, *self._sharded.lanes[name])

    def num_samples(self, input_ids: torch.Tensor) -> int:
        """Samples of the microbatch in all lanes, which have equally many."""
        return two_dims(input_ids).size(0) * self.num_lanes

    def carry(
        self,
        name: str,
        rows: torch.Tensor,
        counts: Sequence[int],
        num_samples: int,
        *,
        trains: bool,
        row_shards: tuple[RowShards, RowShards] | None = None,
    ) -> torch.Tensor:
        """Rows of the encoder's lane to rows of the language lane; differentiable. Every rank calls it.

        Args:
            name: of the encoder.
            rows: ``[rows, h]`` of this rank's lane of the encoder, of any floating dtype.
            counts: rows of each sample of that lane.
            num_samples: of the microbatch, in all lanes.
            trains: whether the encoder takes gradients; the same on all ranks. If not, none travel.
            row_shards: which ranks of the language model use which rows: of the samples of the encoder's lane, and of
                those of the language model's. Given on all ranks or on none.

        Returns:
            ``[rows, h]`` of this rank's lane of the language model, in the order of its samples; with `row_shards` of
            this rank's part of the sequence.

        Raises:
            ValueError: the rows are not those of `counts`, or `counts` are not those of the lane's samples. Before
                anything is sent.
            RuntimeError: in the backward pass: the microbatches come back in another order than they were sent.
        """
        edge = self._edges[name]
        if rows.dim() != 2 or rows.size(0) != sum(counts):
            raise ValueError(
                f"Rank {dist.get_rank()}, module '{name}': expected {sum(counts)} rows [rows, h], one for each "
                f"position of its token in the samples of this rank's lane (per sample: {list(counts)}), got an output "
                f"of shape {list(rows.shape)}. Encoder inputs must be those of the encoder's lane, input_ids those of "
                "the language module's."
            )
        options: dict[str, Any] = {}
        if row_shards is not None:
            options = {"row_shards": row_shards[0], "recv_row_shards": row_shards[1]}
        with contextlib.nullcontext() if trains else torch.no_grad():
            carried = bridge(rows.to(self.dtype), edge.rows, row_counts=counts, num_samples=num_samples, **options)
        if carried.requires_grad:
            edge.watch(carried)
        return carried

    def close(self, abort: bool = False) -> None:
        """Close the bridges; collective, unless `abort`. Calling it again does nothing."""
        for edge in self._edges.values():
            edge.close(abort)
        self._edges.clear()


class _Edge:
    """One encoder's bridges, and the microbatches whose gradient is still to come."""

    def __init__(self, name: str, rows: Bridge) -> None:
        self.name, self.rows = name, rows
        self.counts: Bridge | None = None
        self._sent = 0
        self._waiting: deque[int] = deque()

    @property
    def ask(self) -> Bridge:
        assert self.counts is not None
        return self.counts

    def watch(self, carried: torch.Tensor) -> None:
        """Check, when the gradient of `carried` is there, that it is its turn.

        The bridge takes gradients in the order of the microbatches. All ranks could agree on another order, and it
        would give each microbatch another's.
        """
        self._waiting.append(self._sent)
        carried.register_hook(functools.partial(self._take_turn, self._sent))
        self._sent += 1

    def _take_turn(self, microbatch: int, gradient: torch.Tensor) -> None:
        expected = self._waiting[0] if self._waiting else None
        if microbatch != expected:
            raise RuntimeError(
                f"Rank {dist.get_rank()}, module '{self.name}': expected the gradient of forward pass {expected}, got "
                f"that of forward pass {microbatch}. Run one backward for each forward, in the same order; run "
                "forwards without a backward under torch.no_grad()."
            )
        self._waiting.popleft()

    def close(self, abort: bool) -> None:
        for one in (self.rows, self.counts):
            if one is not None:
                one.close(abort)
