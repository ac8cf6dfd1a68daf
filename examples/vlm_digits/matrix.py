"""Which layouts `--check` compares: a set in which every two choices occur together that can.

Faults hide where two features meet, seldom where three do. So not all layouts run, but as few as bring every image
layout together with every language layout, each of these with every precision, path, placement and way to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from itertools import combinations, product

import numpy as np

from .layout import HEADS, LAYERS, LayoutError, check_batch, parse_layout

RANKS_PER_MODULE = 4
BATCH = 24  # samples per step
SHARED = "shared"


@dataclass(frozen=True)
class Choice:
    """One training run to compare with one process.

    Attributes:
        images, language: sizes of the module, as a layout has them.
        place: which module has the first ranks; or "shared", where both have the same.
        dtype: "fp32" or "bf16".
        path: how replicas come by their copies; see `mimo_ext.Bridge`.
        microbatches: per step.
        overlap: let transfers run while the ranks compute.
    """

    images: str
    language: str
    place: str
    dtype: str
    path: str
    microbatches: int
    overlap: bool

    @property
    def layout(self) -> str:
        """As `parse_layout` reads it."""
        if self.place == SHARED:
            last = parse_layout(f"images: {self.images}; language: tp=1").modules["images"].size - 1
            return f"images: ranks=0-{last},{self.images}; language: ranks=0-{last},{self.language}"
        modules = [f"images: {self.images}", f"language: {self.language}"]
        return "; ".join(modules if self.place == "images" else reversed(modules))

    @property
    def ranks(self) -> int:
        """Number of ranks that it needs."""
        return parse_layout(self.layout).world_size

    def __str__(self) -> str:
        options = [self.dtype, f"{self.microbatches} mb", *([] if self.path == "auto" else [self.path])]
        return f"{self.layout}  ({', '.join([*options, *([] if self.overlap else ['no overlap'])])})"


def sizes(with_pp: bool) -> Iterator[str]:
    """The layouts of a module: "tp=2,dp=3", ..."""
    stages = [n for n in (1, 2) if LAYERS % n == 0] if with_pp else [1]
    for pp, tp, dp in product(stages, [n for n in (1, 2, 4) if HEADS % n == 0], (1, 2, 3)):
        if tp * dp * pp <= RANKS_PER_MODULE:
            yield ",".join(f"{name}={n}" for name, n in (("tp", tp), ("dp", dp), ("pp", pp)) if n > 1) or "tp=1"


def possible() -> list[Choice]:
    """Every choice that can run, small layouts first."""
    places = ("images", "language", SHARED)
    found: list[tuple[int, Choice]] = []
    for images, language, place in product(sizes(False), sizes(True), places):
        for microbatches in (1, 2):
            usual = Choice(images, language, place, "fp32", "auto", microbatches, place != SHARED)
            try:
                layout = parse_layout(usual.layout)
                check_batch(layout, BATCH, microbatches)
            except LayoutError:
                continue
            # Modules on the same ranks have no schedule to overlap, and choose their path themselves.
            ways = product(("auto", "pipelined", "direct", "leader"), (True, False)) if place != SHARED else ()
            for dtype, (path, overlap) in product(("fp32", "bf16"), list(ways) or [("auto", False)]):
                choice = Choice(images, language, place, dtype, path, microbatches, overlap)
                found.append((layout.world_size, choice))
    return [choice for _, choice in sorted(found, key=lambda item: item[0])]


def pairwise(choices: list[Choice]) -> list[Choice]:
    """The fewest of `choices`, nearly, in which every pair of values occurs that occurs in `choices`.

    Greedy, and the same on every machine: the next is always the one with the most new pairs; of equals that whose
    values have been chosen least, then the first.
    """
    names = [field.name for field in fields(Choice)]
    pairs: dict[tuple[object, ...], int] = {}
    values: dict[tuple[object, ...], int] = {}
    pairs_of, values_of = [], []
    for choice in choices:
        named = list(zip(names, astuple(choice), strict=True))
        pairs_of.append([pairs.setdefault(pair, len(pairs)) for pair in combinations(named, 2)])
        values_of.append([values.setdefault(value, len(values)) for value in named])
    has_pair, has_value = (_table(rows, len(ids)) for rows, ids in ((pairs_of, pairs), (values_of, values)))
    missing, times = np.ones(len(pairs), np.float32), np.zeros(len(values), np.float32)
    chosen = []
    while missing.any():
        best = int(np.argmax(1e4 * (has_pair @ missing) - has_value @ times))
        chosen.append(best)
        missing[pairs_of[best]] = 0
        times[values_of[best]] += 1
    return [choices[index] for index in sorted(chosen)]


def _table(rows: list[list[int]], columns: int) -> np.ndarray:
    table = np.zeros((len(rows), columns), np.float32)
    for index, row in enumerate(rows):
        table[index, row] = 1
    return table
