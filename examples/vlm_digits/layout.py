"""The --layout option: which ranks run which module, and how each module is split over its ranks.

Everything here is plain Python, so that a layout which cannot work is refused before any rank starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MODULES = ("images", "language")
SIZES = ("tp", "cp", "dp", "pp")
HEADS, LAYERS = 4, 2  # of either transformer

DEFAULT_LAYOUT = "images: dp=2; language: tp=2"


class LayoutError(ValueError):
    """The layout cannot work; the message says why in words."""


@dataclass(frozen=True)
class ModuleLayout:
    """How one module lies on its ranks, which are consecutive and start at `first_rank`.

    A rank's coordinates follow from its position: tensor parallel fastest, then data parallel, then pipeline stage.
    """

    name: str
    first_rank: int = 0
    tp: int = 1
    dp: int = 1
    pp: int = 1

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tp * self.dp * self.pp

    @property
    def ranks(self) -> range:
        """The ranks of the module."""
        return range(self.first_rank, self.first_rank + self.size)

    def lane(self, rank: int) -> int:
        """Data-parallel index of `rank`: which part of every microbatch it works on."""
        return (rank - self.first_rank) // self.tp % self.dp

    def stage(self, rank: int) -> int:
        """Pipeline stage of `rank`."""
        return (rank - self.first_rank) // (self.tp * self.dp)

    def __str__(self) -> str:
        sizes = [f"{name}={getattr(self, name)}" for name in ("tp", "dp", "pp") if getattr(self, name) > 1]
        return f"{self.name}: {','.join(sizes) or 'tp=1'}"


@dataclass(frozen=True)
class VlmLayout:
    """The layout of both modules: on ranks of their own, or both on the same ranks (colocated)."""

    modules: dict[str, ModuleLayout] = field(default_factory=dict)

    @property
    def colocated(self) -> bool:
        """Whether both modules run on the same ranks."""
        return len({module.ranks for module in self.modules.values()}) == 1

    @property
    def world_size(self) -> int:
        """Number of ranks that the layout needs."""
        return max(module.ranks.stop for module in self.modules.values())

    def modules_of(self, rank: int) -> dict[str, ModuleLayout]:
        """The modules that run on `rank`, by name."""
        return {name: module for name, module in self.modules.items() if rank in module.ranks}

    def __str__(self) -> str:
        texts, free = [], 0
        for module in self.modules.values():
            text = str(module)
            if module.first_rank != free or self.colocated:
                last = f"-{module.ranks.stop - 1}" if module.size > 1 else ""
                text = text.replace(": ", f": ranks={module.first_rank}{last},", 1)
            texts.append(text)
            free = max(free, module.ranks.stop)
        return "; ".join(texts)


def parse_layout(text: str) -> VlmLayout:
    """Read a layout such as ``"images: tp=2,dp=2; language: dp=2,pp=2"``.

    Sizes that are not named are 1. A module's ranks follow those of the modules before it, unless it names them:
    ``"images: ranks=0-3,tp=2,dp=2; language: ranks=0-3,dp=4"`` puts both on the same four ranks. Raises LayoutError.
    """
    modules: dict[str, ModuleLayout] = {}
    first_rank = 0
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, colon, sizes = (piece.strip() for piece in part.partition(":"))
        if not colon:
            raise LayoutError(f"'{part}': expected 'module: size=number, ...', for example '{DEFAULT_LAYOUT}'")
        if name not in MODULES:
            raise LayoutError(f"there is no module '{name}'; the modules are {' and '.join(MODULES)}")
        if name in modules:
            raise LayoutError(f"module '{name}' is given twice")
        ranks, sizes = _split_ranks(name, sizes)
        module = ModuleLayout(name, first_rank if ranks is None else ranks.start, **_parse_sizes(name, sizes))
        _check_module(module)
        if ranks is not None and ranks != module.ranks:
            raise LayoutError(
                f"{name}: ranks={ranks.start}-{ranks.stop - 1} are {len(ranks)} ranks, but tp * dp * pp = "
                f"{module.tp} * {module.dp} * {module.pp} = {module.size}"
            )
        modules[name] = module
        first_rank = max(first_rank, module.ranks.stop)
    missing = [name for name in MODULES if name not in modules]
    if missing:
        raise LayoutError(f"module '{missing[0]}' is missing; give both, for example '{DEFAULT_LAYOUT}'")
    layout = VlmLayout(modules)
    _check_ranks(layout)
    return layout


def _split_ranks(name: str, text: str) -> tuple[range | None, str]:
    """The ranks that the text names, None where it names none, and the rest of the text."""
    parts = [part.strip() for part in text.split(",")]
    named = [part for part in parts if part.partition("=")[0].strip() == "ranks"]
    if not named:
        return None, text
    if len(named) > 1:
        raise LayoutError(f"{name}: ranks is given twice")
    value = named[0].partition("=")[2].strip()
    first, dash, last = (piece.strip() for piece in value.partition("-"))
    if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) < int(first):
        raise LayoutError(f"{name}: ranks must be the first and the last of consecutive ranks, as 0-3, got '{value}'")
    return range(int(first), int(last or first) + 1), ",".join(part for part in parts if part not in named)


def _parse_sizes(name: str, text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in SIZES:
            raise LayoutError(f"{name}: there is no size '{key}'; use tp (tensor), dp (data) or pp (pipeline)")
        if key in sizes:
            raise LayoutError(f"{name}: {key} is given twice")
        if not equals or not value.lstrip("+-").isdigit() or int(value) < 1:
            raise LayoutError(f"{name}: {key} must be a whole number of 1 or more, got '{value}'")
        sizes[key] = int(value)
    if sizes.pop("cp", 1) > 1:
        raise LayoutError(f"{name}: cp > 1 is not possible: Megatron's layers for the CPU have no context parallelism")
    return sizes


def _check_module(module: ModuleLayout) -> None:
    if HEADS % module.tp:
        raise LayoutError(f"{module.name}: tp={module.tp} does not divide the {HEADS} attention heads; use 1, 2 or 4")
    if module.name == "images" and module.pp > 1:
        raise LayoutError(
            f"images: pp={module.pp} is not possible: Megatron's modality submodules run all encoder layers on the "
            "first stage; use tp or dp instead"
        )
    if LAYERS % module.pp:
        raise LayoutError(f"{module.name}: pp={module.pp} does not divide the {LAYERS} transformer layers; use 1 or 2")


def _check_ranks(layout: VlmLayout) -> None:
    """Ranks are shared by both modules or belong to one, and none is left out."""
    first, second = sorted(layout.modules.values(), key=lambda module: (module.first_rank, module.size))
    if layout.colocated:
        for module in (first, second):
            if module.pp > 1:
                raise LayoutError(
                    f"{module.name}: pp={module.pp} is not possible on ranks that both modules share; use tp or dp "
                    "there, or ranks of its own"
                )
        expected = 0
    else:
        if second.first_rank < first.ranks.stop:
            raise LayoutError(
                f"the ranks of {first.name} ({_as_text(first.ranks)}) and {second.name} ({_as_text(second.ranks)}) "
                "overlap in part; they must be the same or have none in common"
            )
        expected = first.ranks.stop
    for start, expect in ((first.first_rank, 0), (second.first_rank, expected)):
        if start != expect:
            raise LayoutError(f"no module runs on {_as_text(range(expect, start))}; ranks start at 0 and have no gaps")


def _as_text(ranks: range) -> str:
    return f"rank {ranks.start}" if len(ranks) == 1 else f"ranks {ranks.start}-{ranks.stop - 1}"


def check_batch(layout: VlmLayout, batch: int, microbatches: int) -> None:
    """Check that every lane gets the same number of samples. Raises LayoutError."""
    if batch < 1 or microbatches < 1:
        raise LayoutError(f"batch ({batch}) and microbatches ({microbatches}) must be 1 or more")
    if batch % microbatches:
        raise LayoutError(f"a batch of {batch} samples does not split into {microbatches} equal microbatches")
    for module in layout.modules.values():
        if (batch // microbatches) % module.dp:
            raise LayoutError(
                f"{module.name}: dp={module.dp} does not divide a microbatch of {batch // microbatches} samples "
                f"(batch {batch} in {microbatches} microbatches)"
            )


def check_world(layout: VlmLayout, ranks: int) -> None:
    """Check that the layout uses all `ranks` that there are. Raises LayoutError."""
    if layout.world_size != ranks:
        needs = " + ".join(f"{module.size} ({module})" for module in layout.modules.values())
        shared = "shared by all modules" if layout.colocated else f"= {needs}"
        raise LayoutError(f"the layout needs {layout.world_size} ranks {shared}, but {ranks} were started")
