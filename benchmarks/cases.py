"""What is measured: two modules, a payload, and what the links need for it at the least."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from emulation import Rates

KIB, MIB = 1 << 10, 1 << 20
ELEMENT_SIZE = 2  # bfloat16
BATCH = 4

LAYOUTS = ("tp4-tp4", "tp2dp2-tp4", "dp4-tp4", "tp4-tp2dp2", "tp8-tp8")
SMALL_LAYOUTS = ("tp1-tp1", "tp4-tp4")
REPLICATED, SHARDED = "replicated", "sharded"
STATIC = "-static"
METHODS = (REPLICATED, SHARDED, REPLICATED + STATIC, SHARDED + STATIC)
FAMILIES = ("transfer", "steady-1f1b", "one-host", "small", "loopback")


@dataclass(frozen=True)
class Side:
    """Parallel sizes of one module."""

    tp: int = 1
    dp: int = 1

    @property
    def size(self) -> int:
        return self.tp * self.dp

    @property
    def text(self) -> str:
        # A size of 1 goes without saying, unless it is all that there is to say.
        parts = [f"{name}{size}" for name, size in (("tp", self.tp), ("dp", self.dp)) if size > 1]
        return "".join(parts) or "tp1"


def parse_layout(text: str) -> tuple[Side, Side]:
    """ "tp2dp2-tp4" -> both sides.

    Raises:
        ValueError: another form, a size named twice, or sizes that are not positive.
    """
    sides = []
    for part in text.split("-"):
        sizes = re.findall(r"(tp|dp)(\d+)", part)
        named = [name for name, _ in sizes]
        if not sizes or "".join(name + size for name, size in sizes) != part or len(set(named)) != len(named):
            raise ValueError(f"layout: expected e.g. 'tp2dp2-tp4' (source-destination), got {text!r}")
        sides.append(Side(**{name: int(size) for name, size in sizes}))
    if len(sides) != 2 or any(side.size < 1 for side in sides):
        raise ValueError(f"layout: expected e.g. 'tp2dp2-tp4' (source-destination), got {text!r}")
    return sides[0], sides[1]


@dataclass(frozen=True)
class Case:
    """One line of the benchmark, with the methods that are compared on it.

    Tensors are [sequence, batch, hidden] of bfloat16, as Megatron's; the data-parallel lanes cut the batch.
    """

    family: str
    source: Side
    destination: Side
    num_bytes: int
    methods: tuple[str, ...]
    microbatches: int = 1  # of one timed run: one after the other, or (1F1B) two under way

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"case: expected one of {FAMILIES}, got {self.family!r}")
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise ValueError(f"methods: expected some of {METHODS}, got {unknown}")
        if any(BATCH % side.dp for side in (self.source, self.destination)):
            raise ValueError(f"{self.layout}: expected dp sizes that divide the batch of {BATCH}")
        parts = math.lcm(self.source.tp, self.destination.tp)
        if self.num_bytes % (BATCH * self.hidden * ELEMENT_SIZE * parts):
            raise ValueError(
                f"{self.layout}: expected a multiple of {BATCH * self.hidden * ELEMENT_SIZE * parts} bytes, "
                f"got {self.num_bytes}"
            )

    @property
    def layout(self) -> str:
        return f"{self.source.text}-{self.destination.text}"

    @property
    def hidden(self) -> int:
        return 1024 if self.num_bytes >= MIB else 64

    @property
    def shape(self) -> tuple[int, int, int]:
        """[sequence, batch, hidden] of the global microbatch."""
        return self.num_bytes // (BATCH * self.hidden * ELEMENT_SIZE), BATCH, self.hidden

    @property
    def world_size(self) -> int:
        return self.source.size + self.destination.size

    @property
    def one_host(self) -> bool:
        return self.family == "one-host"

    @property
    def emulated(self) -> bool:
        """Over the cards and links of the emulated cluster; else over the machine's own loopback."""
        return self.family != "loopback"

    @property
    def hosts(self) -> tuple[tuple[int, ...], ...]:
        """The source's ranks come first; each module has a host of its own."""
        ranks = tuple(range(self.world_size))
        return (ranks,) if self.one_host else (ranks[: self.source.size], ranks[self.source.size :])

    @property
    def is_small(self) -> bool:
        """Decided by messages and not by bytes: without a bound of the links."""
        return self.family in ("small", "loopback")

    @property
    def rates(self) -> Rates:
        # 16 ranks at the full rate would be more than two cores can move.
        return Rates(200, 1440) if self.world_size <= 8 else Rates(100, 720)

    def bound_s(self, method: str) -> float:
        """Seconds that the links need at least for a timed run: no link carries less, whatever the algorithm.

        Between hosts the payload leaves by all cards of one module and enters by all cards of the other, once. Where
        every rank of a lane is to have all of the lane, what does not come by its own card comes from its host's other
        ranks. Inside one host both are the same link.
        """
        shared = method.startswith(SHARDED)
        forward = self._direction_s(self.source, self.destination, shared)
        backward = self._direction_s(self.destination, self.source, shared)
        if self.family == "steady-1f1b":
            # Both directions at once, after one microbatch's way there and before the last one's way back.
            return (self.microbatches - 1) * max(forward, backward) + forward + backward
        return self.microbatches * (forward + backward)

    def _direction_s(self, sender: Side, receiver: Side, sharded: bool) -> float:
        equal_part = self.num_bytes / receiver.size
        whole_lane = self.num_bytes / receiver.dp
        in_host = self.rates.nvl_bytes_per_s
        if self.one_host:
            return max(self.num_bytes / sender.size, equal_part if sharded else whole_lane) / in_host
        between = max(self.num_bytes / sender.size, equal_part) / self.rates.nic_bytes_per_s
        return between if sharded else max(between, (whole_lane - equal_part) / in_host)


def select(
    *,
    quick: bool,
    layouts: Sequence[str] = (),
    sizes: Sequence[int] = (),
    families: Sequence[str] = FAMILIES,
    methods: Sequence[str] = (),
) -> list[Case]:
    """The cases of a run, those of one cluster together.

    Args:
        quick: the largest payloads alone, except at tp4-tp4; full: all payloads, and static shapes everywhere.
        layouts: default: those of `LAYOUTS` (small payloads: `SMALL_LAYOUTS`; 1F1B and one host: tp4-tp4; loopback:
            tp1-tp1).
        sizes: bytes; default: 1, 4 and 16 MiB; 4 and 12 MiB from 16 ranks on.
        methods: default: replicated and sharded.

    Raises:
        ValueError: unknown names, or a layout and a size that do not fit.
    """
    unknown = [family for family in families if family not in FAMILIES]
    if unknown:
        raise ValueError(f"families: expected some of {FAMILIES}, got {unknown}")
    usual = (REPLICATED, SHARDED) if quick else METHODS
    cases: list[Case] = []

    def add(family: str, text: str, defaults: Sequence[int], default_methods: Sequence[str], **options: int) -> None:
        source, destination = parse_layout(text)
        for num_bytes in sizes or defaults:
            chosen = tuple(methods or default_methods)
            cases.append(Case(family, source, destination, num_bytes, chosen, **options))

    for text in layouts or LAYOUTS:
        source, destination = parse_layout(text)
        if source.size + destination.size > 8:
            defaults: tuple[int, ...] = (4 * MIB, 12 * MIB)
        else:
            defaults = (16 * MIB,) if quick and text != "tp4-tp4" else (MIB, 4 * MIB, 16 * MIB)
        if "transfer" in families:
            add("transfer", text, defaults, usual)
    for text in layouts or ("tp4-tp4",):
        if "steady-1f1b" in families:
            add("steady-1f1b", text, (8 * MIB,), METHODS, microbatches=8)
        if "one-host" in families:
            add("one-host", text, (4 * MIB,) if quick else (4 * MIB, 16 * MIB), usual)
    small = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB)
    for text in layouts or SMALL_LAYOUTS:
        if "small" in families:
            default_methods = (REPLICATED, REPLICATED + STATIC) if text == "tp1-tp1" else METHODS
            few = small[:2] if text == "tp1-tp1" else small[::2]
            add("small", text, few if quick else small, default_methods)
    for text in layouts or SMALL_LAYOUTS[:1]:
        if "loopback" in families:
            add("loopback", text, small[:2] if quick else small, (REPLICATED, REPLICATED + STATIC))
    cases = [_repeated(case) for case in cases]
    # One cluster after the other: making one and starting its ranks takes seconds.
    order = {key: index for index, key in enumerate(dict.fromkeys(_cluster_of(case) for case in cases))}
    return sorted(cases, key=lambda case: order[_cluster_of(case)])


def by_cluster(cases: Sequence[Case]) -> list[list[Case]]:
    """Neighbouring cases that run on the same cluster, together."""
    return [list(same) for _, same in itertools.groupby(cases, _cluster_of)]


def _cluster_of(case: Case) -> tuple[bool, tuple[tuple[int, ...], ...]]:
    return case.emulated, case.hosts


def _repeated(case: Case) -> Case:
    """With as many transfers in a timed run as last a tenth of a second: to start and end one costs a millisecond."""
    if case.microbatches > 1:
        return case
    count = min(50, math.ceil(0.1 / case.bound_s(REPLICATED)))
    if case.is_small:
        count = 50 if case.emulated else 200
    return Case(case.family, case.source, case.destination, case.num_bytes, case.methods, max(1, count))
