"""Sharded delivery: each rank of the language model receives the encoder rows of its own part of the sequence only.

With sequence parallelism or context parallelism a rank of the language model works on a part of the positions. Which
rows fill them is seen in ``input_ids``, by both sides: the encoder's ranks for the samples of their lane, the language
model's for those of theirs. The rows of a sample then travel to the ranks that use them, once, and their gradients come
back from there; the combined embeddings are built for the own part alone. Values and gradients are those of replicated
delivery. Only where a row of the word (or position) embedding is used by several positions, and the sequence is split
over tensor-parallel ranks, its gradient is summed in another order.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region

from mimo_ext import Layout, RowShards
from mimo_ext.megatron.cpu_layers import zigzag_positions
from mimo_ext.megatron.role import MIMO_LANGUAGE_MODULE_KEY
from mimo_ext.megatron.stage_io import ArrivingRows

__all__ = ["OwnPart", "SequenceShards", "ShardedDelivery", "delivery_of", "leave_mark"]


_MARK = "_mimo_ext_sharded_delivery"


@dataclass(frozen=True)
class SequenceShards:
    """How the ranks of a lane of the language model split a sequence: zigzag over cp, then contiguously over tp.

    Attributes:
        tp, cp: sizes.
        sequence_parallel: whether the tp ranks split what their cp rank has; else they are replicas.
    """

    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False

    @classmethod
    def of(cls, grid: Any, config: Any) -> SequenceShards:
        """Of the language model's grid and TransformerConfig."""
        sizes = dict(zip(grid.dim_names, (int(extent) for extent in grid.shape), strict=True))
        return cls(sizes.get("tp", 1), sizes.get("cp", 1), bool(getattr(config, "sequence_parallel", False)))

    @property
    def parts(self) -> int:
        """Parts of what one cp rank has."""
        return self.tp if self.sequence_parallel else 1

    @property
    def num_shards(self) -> int:
        return self.cp * self.parts

    def check_length(self, length: int, module: str) -> None:
        """ValueError unless a sequence splits into equal parts."""
        if length % self._units:
            raise ValueError(
                f"Rank {_rank()}, module '{module}': expected a sequence length divisible by {self._units} for context "
                f"and sequence parallelism of the language model, got input_ids of length {length}."
            )

    def row_shards(self, mask: torch.Tensor, lane: int, lanes: int) -> RowShards:
        """Which rank each row goes to.

        Args:
            mask: bool ``[b, s]`` on the host: the positions of the samples of lane `lane` of `lanes` that have a row.
        """
        return RowShards.from_mask(
            mask,
            tp=self.tp,
            cp=self.cp,
            sequence_parallel=self.sequence_parallel,
            cp_placement="zigzag",
            first_sample=lane * mask.size(0),
            num_samples=lanes * mask.size(0),
        )

    @property
    def _units(self) -> int:
        """Into how many equal pieces a sequence is cut at most."""
        return self.parts * (2 * self.cp if self.cp > 1 else 1)

    @functools.cached_property
    def _intervals(self) -> list[tuple[int, int]]:
        """The sequence from its start: ``(shard, size)`` of each interval that one shard has, in units of `_units`."""
        return self.row_shards(torch.ones(1, self._units, dtype=torch.bool), 0, 1).segments(0)

    def interval_counts(self, mask: torch.Tensor) -> torch.Tensor:
        """Rows in each interval of the sequence that one rank has, int64 ``[b, intervals]``.

        Args:
            mask: bool ``[b, s]``, positions that have a row, on any device.
        """
        self.check_length(mask.size(1), MIMO_LANGUAGE_MODULE_KEY)
        units = mask.view(mask.size(0), self._units, -1).sum(dim=2)
        return torch.stack([part.sum(dim=1) for part in units.split([size for _, size in self._intervals], 1)], dim=1)

    def row_shards_of_intervals(self, counts: torch.Tensor, lane: int, lanes: int) -> RowShards:
        """`row_shards` of what `interval_counts` gave, on the host."""
        shards = [shard for shard, _ in self._intervals]
        segments = [list(zip(shards, of_sample, strict=True)) for of_sample in counts.tolist()]
        return RowShards(segments, self.num_shards, lanes * len(segments), lane * len(segments))

    def positions(self, length: int, cp_rank: int) -> torch.Tensor:
        """Positions of a cp rank's tokens, int64 ``[parts, length / (cp * parts)]``, one line per tp rank."""
        of_cp_rank = torch.arange(length) if self.cp == 1 else zigzag_positions(length // self.cp, cp_rank, self.cp)
        return of_cp_rank.view(self.parts, -1)


@dataclass
class ShardedDelivery:
    """What the model and the communicator of a rank tell one another.

    Attributes:
        modules: names of the encoders whose rows go to the language model in shards.
        shards: how the language model splits a sequence.
        lanes: module name -> (lane of this rank, number of lanes), for this rank's modules.
        row_shards: encoder name -> queue of what its last output consists of: the model fills it, a send takes it.
        arriving: encoder name -> queue of rows that a receive has announced: the language model's forward takes them.
    """

    modules: frozenset[str]
    shards: SequenceShards
    lanes: dict[str, tuple[int, int]]
    row_shards: dict[str, deque[RowShards]] = field(init=False)
    arriving: dict[str, deque[ArrivingRows]] = field(init=False)

    def __post_init__(self) -> None:
        self.row_shards = {name: deque(maxlen=1) for name in self.modules}
        self.arriving = {name: deque() for name in self.modules}

    @classmethod
    def of(cls, grids: Mapping[str, Any], config: Any, modules: Iterable[str]) -> ShardedDelivery:
        """Of a model whose modules are on ranks of their own, or all on the same.

        Args:
            grids: module name -> grid.
            config: TransformerConfig of the language model.
            modules: the encoders.
        """
        lanes = {}
        for name, grid in grids.items():
            boundary = Layout.from_grid(grid, name=name).boundary(0 if name == MIMO_LANGUAGE_MODULE_KEY else -1)
            lane, _ = boundary.find(dist.get_rank())
            if lane >= 0:
                lanes[name] = (lane, len(boundary.lanes))
        return cls(frozenset(modules), SequenceShards.of(grids[MIMO_LANGUAGE_MODULE_KEY], config), lanes)

    def row_shards_of(self, encoder: str, module: str, input_ids: torch.Tensor, token_id: int) -> RowShards:
        """Where the rows of `encoder` go, of the samples of this rank's lane of `module`.

        Args:
            encoder: whose rows; `module` is the same on its ranks, and the language model on that one's.
            input_ids: ``[b, s]`` (or ``[s]``) of that lane. Free where they live on the host.
            token_id: of the encoder's positions.

        Raises:
            ValueError: a sequence length that does not split.
        """
        ids = two_dims(input_ids)
        self.shards.check_length(ids.size(1), module)
        return self.shards.row_shards((ids == token_id).cpu(), *self.lanes[module])

    def take(self, input_tensors: Any) -> dict[str, ArrivingRows]:
        """The announced rows among the inputs of a forward pass of the language model; empty where there are none.

        Raises:
            RuntimeError: rows were announced, and the inputs are others.
        """
        announced = {name: queue[0] for name, queue in self.arriving.items() if queue}
        if not announced:
            return {}
        got = input_tensors if isinstance(input_tensors, dict) else {}
        for name, rows in announced.items():
            if got.get(name) is not rows.tensor:
                raise RuntimeError(
                    f"Rank {_rank()}, module '{MIMO_LANGUAGE_MODULE_KEY}': expected the input of '{name}' that the "
                    "communicator has handed out first and no forward pass has taken, got another tensor. Run one "
                    "forward pass for each recv_forward, in their order."
                )
        for name in announced:
            self.arriving[name].popleft()
        return announced


class _Mark:
    """What a model leaves on its config: a communicator that is given the config finds the model's delivery by it.

    Copies of a config, in memory or on disk, are another model's: theirs is empty.
    """

    def __init__(self, delivery: ShardedDelivery | None = None) -> None:
        self.delivery = (lambda: None) if delivery is None else weakref.ref(delivery)

    def __reduce__(self) -> Any:
        return _Mark, ()


def leave_mark(config: Any, delivery: ShardedDelivery) -> None:
    """Let `delivery_of` find the delivery of the model that `config` belongs to, as long as that lives."""
    with contextlib.suppress(AttributeError, TypeError):  # a config that takes no further attributes
        setattr(config, _MARK, _Mark(delivery))


def delivery_of(config: Any) -> ShardedDelivery | None:
    """The delivery of the last model that was built with this very config; None where there is none."""
    mark = getattr(config, _MARK, None)
    return mark.delivery() if isinstance(mark, _Mark) else None


@dataclass(frozen=True)
class HeldRows:
    """Rows that are here."""

    rows: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.rows


class OwnPart:
    """This rank's part of the sequence of one microbatch, and what fills its positions.

    Args:
        delivery: of the model.
        input_ids: ``[b, s]`` or ``[s]``, all positions of the lane's samples.
        special_token_ids: modality name -> token id.
        arriving: modality name -> its rows, awaited by `combine`.
        cp_group, tp_group: groups of the language model; None where there is no context or sequence parallelism.

    Raises:
        ValueError: a sequence length that does not split, positions of a modality that sends no rows.
    """

    def __init__(
        self,
        delivery: ShardedDelivery,
        input_ids: torch.Tensor,
        special_token_ids: Mapping[str, int],
        arriving: Mapping[str, ArrivingRows | HeldRows],
        cp_group: Any,
        tp_group: Any,
    ) -> None:
        shards = delivery.shards
        # The host must know where the rows are. Free where input_ids live there.
        ids = two_dims(input_ids).cpu()
        shards.check_length(ids.size(1), MIMO_LANGUAGE_MODULE_KEY)
        self._shards, self._tp_group, self._arriving = shards, tp_group, dict(arriving)
        self._batch = ids.size(0)
        self._positions = shards.positions(ids.size(1), cp_group.rank() if shards.cp > 1 else 0)
        self._mine = tp_group.rank() if shards.parts > 1 else 0
        self._ids = self._by_part(ids)
        self._is_text = torch.ones_like(self._ids, dtype=torch.bool)
        self._masks: dict[str, torch.Tensor] = {}  # of this rank's positions
        for name, token_id in special_token_ids.items():
            taken = self._ids == token_id
            self._is_text &= ~taken
            self._masks[name] = taken[self._mine]
            if name not in arriving and bool(taken.any()):
                raise ValueError(
                    f"Rank {_rank()}: Number of {name} tokens ({int(taken.sum())}) does not match number of {name} "
                    "embeddings (0): embeddings of this modality are missing."
                )
        # All are posted before the first is awaited: several encoders arrive side by side.
        for name, rows in arriving.items():
            if isinstance(rows, ArrivingRows):
                rows.post(delivery.row_shards_of(name, MIMO_LANGUAGE_MODULE_KEY, ids, special_token_ids[name]))

    def _by_part(self, values: torch.Tensor) -> torch.Tensor:
        """``[b, s]`` -> ``[parts, b * (s / (cp * parts))]``: the positions of each tp rank, sample by sample."""
        return values[:, self._positions.to(values.device)].transpose(0, 1).reshape(self._positions.size(0), -1)

    def text_embeddings(self, embedding: Any, position_ids: torch.Tensor | None) -> torch.Tensor:
        """Embeddings of this rank's text, ``[rows, h]``; at the end of them may be rows that no position takes.

        A vocabulary that is split over tp ranks gives every rank a summand of the tokens of all of them. They are
        summed and scattered in one step, which takes equally many tokens of each rank: the longest list decides. The
        gradient is gathered, so that each vocabulary part gets that of all positions.

        Args:
            embedding: the language model's, of ``[1, n]`` ids and positions (or None).
            position_ids: ``[b, s]``, ``[rope_dim, b, s]``, of which the first channel counts, or None.
        """
        counts = self._is_text.sum(dim=1)
        length = int(counts.max())
        if self._shards.parts > 1:
            length = max(1, length)  # also without any text the weights get a gradient, as DDP expects
        # Stable: text first, in the order of the positions.
        chosen = torch.argsort(~self._is_text, dim=1, stable=True)[:, :length]
        unused = torch.arange(length) >= counts[:, None]
        device = next(embedding.parameters(), self._ids).device

        def take(values: torch.Tensor) -> torch.Tensor:
            where, nothing = (x.to(values.device, non_blocking=True) for x in (chosen, unused))
            return values.gather(1, where).masked_fill(nothing, 0).reshape(1, -1).to(device, non_blocking=True)

        positions = None
        if position_ids is not None:
            positions = take(self._by_part(position_ids[0] if position_ids.dim() == 3 else position_ids))
        if self._shards.parts == 1:
            return embedding(input_ids=take(self._ids), position_ids=positions).squeeze(1)
        with _scattering(embedding) as scatters:
            embedded = embedding(input_ids=take(self._ids), position_ids=positions)
        if not scatters:
            embedded = scatter_to_sequence_parallel_region(embedded, group=self._tp_group)
        return embedded.squeeze(1)

    def combine(self, text: torch.Tensor) -> torch.Tensor:
        """The embeddings of this rank's positions, ``[s / (cp * parts), b, h]``, contiguous, in the dtype of `text`.

        Args:
            text: what `text_embeddings` gave.

        Raises:
            ValueError: rows that do not fit the positions.
        """
        hidden = text.size(-1)
        stacked = [text]
        is_text = self._is_text[self._mine]
        index = is_text.cumsum(0) - 1
        first_row = text.size(0)
        for name, arriving in self._arriving.items():
            rows, mask = arriving.wait(), self._masks[name]
            expected = int(mask.sum())
            if tuple(rows.shape) != (expected, hidden):
                raise ValueError(
                    f"Rank {_rank()}, module '{name}': expected {expected} rows of width {hidden} for this rank's "
                    f"part of the sequence, got shape {list(rows.shape)}."
                )
            index = torch.where(mask, mask.cumsum(0) + (first_row - 1), index)
            stacked.append(rows.to(text.dtype))
            first_row += expected
        combined = torch.cat(stacked).index_select(0, index.to(text.device, non_blocking=True))
        return combined.view(self._batch, -1, hidden).transpose(0, 1).contiguous()


@contextlib.contextmanager
def _scattering(embedding: Any) -> Iterator[bool]:
    """Within it the embedding gives each tp rank its part, if it knows how to; says whether it does.

    That of GPTModel was built without, as `leave_scattering_to_mimo_model` wants it for replicated delivery.
    """
    words = getattr(embedding, "word_embeddings", None)
    option, fused = "scatter_to_sequence_parallel", "reduce_scatter_embeddings"
    if not hasattr(embedding, option) or not hasattr(embedding, fused) or not hasattr(words, fused):
        yield False
        return
    # What is added to the words of all ranks is added before they are scattered.
    in_one_step = not embedding.add_position_embedding and embedding.num_tokentypes <= 0
    before = [
        (part, name, getattr(part, name)) for part, name in ((embedding, option), (embedding, fused), (words, fused))
    ]
    try:
        setattr(embedding, option, True)
        setattr(embedding, fused, in_one_step)
        setattr(words, fused, in_one_step)
        yield True
    finally:
        for part, name, value in before:
            setattr(part, name, value)


def two_dims(input_ids: torch.Tensor) -> torch.Tensor:
    """``[s]`` as ``[1, s]``."""
    return input_ids if input_ids.dim() == 2 else input_ids.unsqueeze(0)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
