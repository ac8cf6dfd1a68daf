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
    """The layout of both modules; ranks are given out in the order in which the option names the modules."""

    modules: dict[str, ModuleLayout] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        """Number of ranks that the layout needs."""
        return sum(module.size for module in self.modules.values())

    def module_of(self, rank: int) -> ModuleLayout:
        """The module that runs on `rank`."""
        return next(module for module in self.modules.values() if rank in module.ranks)

    def __str__(self) -> str:
        return "; ".join(str(module) for module in self.modules.values())


def parse_layout(text: str) -> VlmLayout:
    """Read a layout such as ``"images: tp=2,dp=2; language: dp=2,pp=2"``.

    Sizes that are not named are 1. Raises LayoutError.
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
        module = ModuleLayout(name, first_rank, **_parse_sizes(name, sizes))
        _check_module(module)
        modules[name] = module
        first_rank += module.size
    missing = [name for name in MODULES if name not in modules]
    if missing:
        raise LayoutError(f"module '{missing[0]}' is missing; give both, for example '{DEFAULT_LAYOUT}'")
    return VlmLayout(modules)


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
        raise LayoutError(f"the layout needs {layout.world_size} ranks = {needs}, but {ranks} were started")
