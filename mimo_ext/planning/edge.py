"""One edge of a model and one global microbatch on it, as a person writes it down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .._extension import _C
from ..layout import PATHS, Layout, Plan
from .links import Links

SIZES = ("tp", "cp", "dp", "pp")
PLACEMENTS = ("replicated", "contiguous", "zigzag")
EXAMPLE = "tp=4,dp=2"
MAX_RANKS = 1 << 20  # of one layout


class EdgeError(ValueError):
    """The edge cannot work; the message says why in one sentence."""


@dataclass(frozen=True)
class Edge:
    """Two layouts and the global microbatch that crosses from one to the other.

    Args:
        source, destination: the layouts; the source's last pipeline stage sends, the destination's first receives.
        samples: of the global microbatch, all lanes together.
        rows: tokens of a sample; one number, or (2-D tensors) one per sample.
        hidden: extent of the last axis.
        dtype: of the tensor.
        ndim: 2 for [rows of the lane, hidden], 3 for [samples, rows, hidden] (`batch_dim` 0) or
            [rows, samples, hidden] (1).
        max_chunks, min_chunk_bytes, path: as of `Bridge`.

    Raises:
        EdgeError: values that do not fit together.
    """

    source: Layout
    destination: Layout
    samples: int
    rows: int | tuple[int, ...] = 1024
    hidden: int = 4096
    dtype: torch.dtype = torch.bfloat16
    ndim: int = 2
    batch_dim: int = 0
    max_chunks: int = 8
    min_chunk_bytes: int = 64 << 10
    path: str = "auto"

    def __post_init__(self) -> None:
        if self.ndim not in (2, 3):
            raise EdgeError(f"a tensor of {self.ndim} axes cannot cross a bridge; expected 2 or 3")
        if self.batch_dim not in (0, 1):
            raise EdgeError(f"the batch axis must be 0 or 1, got {self.batch_dim}")
        if self.samples < 1 or self.hidden < 1:
            raise EdgeError(f"samples ({self.samples}) and hidden ({self.hidden}) must be 1 or more")
        if self.max_chunks < 1 or self.min_chunk_bytes < 1:
            raise EdgeError(
                f"max_chunks ({self.max_chunks}) and min_chunk_bytes ({self.min_chunk_bytes}) must be 1 or more"
            )
        if self.path not in PATHS:
            raise EdgeError(f"path must be one of {', '.join(PATHS)}, got '{self.path}'")
        if min(self.rows_of_samples, default=0) < 0 or (isinstance(self.rows, int) and self.rows < 1):
            raise EdgeError(f"rows must be 1 or more (0 for single samples of a list), got {self.rows}")
        if isinstance(self.rows, tuple):
            if self.ndim == 3:
                raise EdgeError("row counts of single samples are for 2-D tensors; a 3-D tensor has one number of rows")
            if len(self.rows) != self.samples:
                raise EdgeError(f"{len(self.rows)} row counts are given for {self.samples} samples")

    @property
    def rows_of_samples(self) -> tuple[int, ...]:
        """Rows of each sample."""
        return self.rows if isinstance(self.rows, tuple) else (self.rows,) * self.samples

    @property
    def ragged(self) -> bool:
        """Whether samples differ in their number of rows."""
        return isinstance(self.rows, tuple)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, all lanes together."""
        if self.ndim == 2:
            return (sum(self.rows_of_samples), self.hidden)
        rows = self.rows_of_samples[0]
        return (self.samples, rows, self.hidden) if self.batch_dim == 0 else (rows, self.samples, self.hidden)

    @property
    def size(self) -> int:
        """Bytes of the tensor, all lanes together."""
        return math.prod(self.shape) * self.dtype.itemsize

    def microbatch(self) -> _C.Microbatch:
        """As the C++ core sees it."""
        return _C.Microbatch(
            ndim=self.ndim,
            batch_dim=self.batch_dim if self.ndim == 3 else 0,
            seq_dim=1 - self.batch_dim if self.ndim == 3 else 0,
            samples=self.samples,
            shape=list(self.shape),
            rows_per_sample=self.rows if isinstance(self.rows, int) else 1,
            rows=list(self.rows) if isinstance(self.rows, tuple) else [],
            element_size=self.dtype.itemsize,
        )

    def plan(self, backward: bool = False, links: Links | None = None) -> Plan:
        """The bridge's plan for this microbatch; on `links` (default: those of `Bridge`) where it chooses its path."""
        return Plan(
            self.source.boundary(-1),
            self.destination.boundary(0),
            self.microbatch(),
            backward,
            max_chunks=self.max_chunks,
            min_chunk_bytes=self.min_chunk_bytes,
            path=self.path,
            links=None if links is None else links.core(),
        )

    def refused_by_released(self) -> str | None:
        """Why Megatron-Core's released class refuses this edge; None where it does not."""
        if max(self.source.cp, self.destination.cp) > 1:
            return "context parallelism"
        lanes = sorted((len(self.source.lanes(-1)), len(self.destination.lanes(0))))
        if lanes[1] % lanes[0]:
            return f"{lanes[0]} and {lanes[1]} lanes, of which neither divides the other"
        return None


def parse_layout(text: str, name: str, first_rank: int = 0) -> Layout:
    """Read a layout such as ``"tp=4,dp=2"``.

    Sizes that are not named are 1. Ranks start at `first_rank`, unless ``ranks=8-15`` names them. A name may come
    first: ``"vision: dp=8"``. How the sequence axis is held: ``sequence_parallel=yes`` (sharded over tp),
    ``cp_placement=replicated|contiguous|zigzag``; which dim varies fastest: ``order=tp-cp-dp-pp``.

    Raises:
        EdgeError: with what is wrong.
    """
    head, colon, rest = text.partition(":")
    if colon:
        name, text = head.strip(), rest
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key in values:
            raise EdgeError(f"{name}: {key} is given twice")
        if not equals:
            raise EdgeError(f"{name}: '{part}' is not of the form size=number, as in '{EXAMPLE}'")
        values[key] = _parse_value(name, key, value)
    if not values:
        raise EdgeError(f"{name}: no size is given; expected some, as in '{EXAMPLE}'")
    size = math.prod(values.get(key, 1) for key in SIZES)
    if size > MAX_RANKS:
        raise EdgeError(f"{name}: {size} ranks are more than this command draws up plans for ({MAX_RANKS})")
    ranks = values.pop("ranks", range(first_rank, first_rank + size))
    if len(ranks) != size:
        product = " * ".join(f"{key}={values[key]}" for key in SIZES if key in values) or "1"
        raise EdgeError(f"{name}: ranks={ranks.start}-{ranks.stop - 1} are {len(ranks)} ranks, but {product} = {size}")
    try:
        return Layout(ranks, name=name, **values)
    except ValueError as error:
        raise EdgeError(f"{name}: {error}") from error


def _parse_value(name: str, key: str, value: str) -> Any:
    if key in SIZES:
        if not value.isdecimal() or int(value) < 1:
            raise EdgeError(f"{name}: {key} must be a whole number of 1 or more, got '{value}'")
        return int(value)
    if key == "ranks":
        first, dash, last = (piece.strip() for piece in value.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise EdgeError(f"{name}: ranks must be the first and the last of consecutive ranks, as 0-3, got '{value}'")
        return range(int(first), int(last or first) + 1)
    if key == "sequence_parallel":
        if value not in ("yes", "no"):
            raise EdgeError(f"{name}: sequence_parallel must be yes or no, got '{value}'")
        return value == "yes"
    if key == "cp_placement":
        if value not in PLACEMENTS:
            raise EdgeError(f"{name}: cp_placement must be one of {', '.join(PLACEMENTS)}, got '{value}'")
        return value
    if key == "order":
        dims = tuple(dim.strip() for dim in value.split("-"))
        if sorted(dims) != sorted(SIZES):
            raise EdgeError(f"{name}: order must name each of {'-'.join(SIZES)} once, got '{value}'")
        return dims
    raise EdgeError(
        f"{name}: there is no '{key}'; use tp (tensor), cp (context), dp (data), pp (pipeline), ranks, "
        "sequence_parallel, cp_placement or order"
    )
