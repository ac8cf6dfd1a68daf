"""Is it right? Compare training over many layouts with the same model in one process without any parallelism.

The single process trains first and leaves its initial weights, its losses and its gradients in a file. Then every
layout starts from its parts of those weights, sees the same data, and must give the same losses and gradients step by
step.

In fp32 the same is the same but for the order of sums. In bf16, where layouts are compared with one process in bf16,
every order of sums gives other digits, at each of the steps that a value goes through; a gradient that is summed over
the wrong ranks, scaled wrongly or of other samples is further off by far.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from .launch import quiet
from .layout import parse_layout

TOLERANCE = 1e-4
BF16_EPSILON = 2.0**-8
# In bf16: the loss is a mean of many tokens, whose roundings cancel; a gradient goes through some forty of them.
BF16_LOSS_TOLERANCE, BF16_GRADIENT_TOLERANCE = BF16_EPSILON, 24 * BF16_EPSILON
STEPS = 20
MATRIX_STEPS = 5  # of many layouts
LAYOUTS = (
    "images: tp=1; language: tp=1",
    "images: dp=2; language: tp=2",  # fan-in
    "images: tp=2; language: dp=2",  # fan-out
    "images: dp=2; language: dp=2",  # equal
    "images: dp=3; language: dp=2",  # neither count divides the other
    "images: dp=2; language: dp=3",
    "images: tp=4; language: tp=2",
    "images: dp=2; language: tp=2,pp=2",
    "images: tp=2,dp=2; language: dp=2,pp=2",
    "language: tp=2; images: dp=2",  # the language model on the first ranks
)
COLOCATED_LAYOUTS = (
    "images: ranks=0-1,dp=2; language: ranks=0-1,dp=2",  # equal: nothing is sent
    "images: ranks=0-1,dp=2; language: ranks=0-1,tp=2",  # fan-in
    "images: ranks=0-1,tp=2; language: ranks=0-1,dp=2",  # fan-out
    "images: ranks=0-3,tp=2,dp=2; language: ranks=0-3,dp=4",
    "images: ranks=0-3,dp=4; language: ranks=0-3,tp=2,dp=2",
    "images: ranks=0-3,tp=4; language: ranks=0-3,dp=4",
    "images: ranks=0-3,dp=4; language: ranks=0-3,tp=4",
    "images: ranks=0-3,tp=4; language: ranks=0-3,tp=2,dp=2",
    "language: ranks=0-5,tp=2,dp=3; images: ranks=0-5,dp=6",
)


@dataclass(frozen=True)
class Run:
    """How a layout is run, besides what it is; see `matrix.Choice`."""

    dtype: str = "fp32"
    path: str | None = None
    microbatches: int = 2
    overlap: bool = True


FIRST_LAYER = "modality_submodules.images.encoders.vit.patch_embedding.weight"


@dataclass
class Comparison:
    """How far a layout is from the single process.

    Attributes:
        losses: the layout's loss at every step.
        loss_error: largest relative difference of a step's loss.
        gradient_errors: by parameter, the largest relative difference of a step's gradient, in the 2-norm of a rank's
            part of it.
        bf16: whether that is the precision.
    """

    losses: list[float] = field(default_factory=list)
    loss_error: float = 0.0
    gradient_errors: dict[str, float] = field(default_factory=dict)
    bf16: bool = False

    @property
    def loss_tolerance(self) -> float:
        """What the loss may be off."""
        return BF16_LOSS_TOLERANCE if self.bf16 else TOLERANCE

    @property
    def gradient_tolerance(self) -> float:
        """What a gradient may be off."""
        return BF16_GRADIENT_TOLERANCE if self.bf16 else TOLERANCE

    @property
    def first_layer_error(self) -> float:
        """The gradient of the encoder's first layer."""
        return self.gradient_errors[FIRST_LAYER]

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """The parameter whose gradient is furthest off."""
        return max(self.gradient_errors.items(), key=lambda item: item[1])

    def take_worse(self, other: Comparison) -> None:
        """Of both the larger differences."""
        self.loss_error = _worse(self.loss_error, other.loss_error)
        for name, error in other.gradient_errors.items():
            self.gradient_errors[name] = _worse(self.gradient_errors.get(name, 0.0), error)

    @property
    def agrees(self) -> bool:
        """Whether losses and gradients agree within the tolerance."""
        return self.loss_error <= self.loss_tolerance and self.worst_gradient[1] <= self.gradient_tolerance


def _worse(one: float, other: float) -> float:
    """The larger one; none is worse than what is no number."""
    return other if math.isnan(other) or other > one else one


def _file_of(folder: str, rank: int) -> Path:
    """What a rank has found, as JSON."""
    return Path(folder) / f"comparison_{rank}.json"


def check_layouts(seed: int = 0, layouts: tuple[str, ...] = LAYOUTS, steps: int = STEPS) -> int:
    """Compare every layout with the single process and print a table; returns the exit code for the shell."""
    print(f"{steps} steps of the same model, weights and data; largest relative difference to one process (fp32)\n")
    width = max(len(layout) for layout in layouts)
    print(
        f"  {'layout':<{width}} {'ranks':>5} {'loss':>9} {'1st layer':>10} {'worst grad':>11} {'seconds':>8}",
        flush=True,
    )
    wrong = []
    with tempfile.TemporaryDirectory(prefix="vlm_digits_check_") as name:
        folder = Path(name)
        record_reference(folder, seed, steps)
        for layout in layouts:
            started = time.monotonic()
            found = compare(layout, folder, seed, steps)
            seconds = time.monotonic() - started
            verdict = "" if found.agrees else f"  WRONG: {found.worst_gradient[0]}"
            if verdict:
                wrong.append(layout)
            ranks = parse_layout(layout).world_size
            errors = f"{found.loss_error:>9.1e} {found.first_layer_error:>10.1e} {found.worst_gradient[1]:>11.1e}"
            print(f"  {layout:<{width}} {ranks:>5} {errors} {seconds:>8.1f}{verdict}", flush=True)
    if wrong:
        print(f"\n{len(wrong)} of {len(layouts)} layouts differ by more than {TOLERANCE:g}", file=sys.stderr)
        return 1
    print(f"\nall {len(layouts)} layouts agree within {TOLERANCE:g}")
    return 0


def check_matrix(seed: int = 0, steps: int = MATRIX_STEPS, part: slice = slice(None)) -> int:
    """Compare the choices of `matrix.py` (or a part of them) and print a table; returns the exit code for the shell."""
    from .matrix import pairwise, possible

    choices = pairwise(possible())[part]
    print(
        f"{len(choices)} layouts, {steps} steps each of the same model, weights and data; largest relative difference\n"
        "to one process of the same precision, and what is allowed\n"
    )
    width = max(len(str(choice)) for choice in choices)
    print(
        f"  {'layout':<{width}} {'ranks':>5} {'loss':>8} {'allowed':>8} {'gradient':>9} {'allowed':>8} {'seconds':>8}"
    )
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="vlm_digits_check_") as name:
        folder = Path(name)
        record_reference(folder, seed, steps, bf16=True)
        for choice in choices:
            started = time.monotonic()
            run = Run(choice.dtype, choice.path, choice.microbatches, choice.overlap)
            found = compare(choice.layout, folder, seed, steps, run=run)
            parameter, error = found.worst_gradient
            wrong += not found.agrees
            print(
                f"  {choice!s:<{width}} {choice.ranks:>5} {found.loss_error:>8.1e} {found.loss_tolerance:>8.1e} "
                f"{error:>9.1e} {found.gradient_tolerance:>8.1e} {time.monotonic() - started:>8.1f}"
                f"{'' if found.agrees else f'  WRONG: {parameter}'}",
                flush=True,
            )
    if wrong:
        print(f"\n{wrong} of {len(choices)} layouts differ by more than is allowed", file=sys.stderr)
        return 1
    print(f"\nall {len(choices)} layouts agree")
    return 0


def record_reference(folder: Path, seed: int, steps: int, bf16: bool = False) -> None:
    """Train in one process (of its own) and leave what it did in `folder`; also in bf16, where wanted."""
    _start(_reference_rank, 1, (str(folder), seed, steps, bf16), timeout=120.0)


def compare(
    layout: str,
    folder: Path,
    seed: int,
    steps: int,
    prepare: Any = None,
    timeout: float = 180.0,
    run: Run | None = None,
) -> Comparison:
    """Train over `layout` with real gloo ranks and compare with what `record_reference` left in `folder`.

    `prepare` (a module-level function without arguments) is called on every rank before anything is built.
    Raises if a rank fails or the ranks take longer than `timeout` seconds.
    """
    ranks = parse_layout(layout).world_size
    with tempfile.TemporaryDirectory(prefix="vlm_digits_ranks_") as own:
        _start(_layout_rank, ranks, (own, layout, str(folder), seed, steps, prepare, run or Run()), timeout)
        found = [Comparison(**json.loads(_file_of(own, rank).read_text())) for rank in range(ranks)]
    for other in found[1:]:
        found[0].take_worse(other)
    return found[0]


def check_recipe(seed: int, run: Run | None = None) -> Any:
    """The usual recipe with a batch that every layout above splits evenly."""
    from .trainer import Recipe

    run = run or Run()
    return Recipe(seed=seed, batch=24, microbatches=run.microbatches, bf16=run.dtype == "bf16")


def _start(rank: Any, ranks: int, arguments: tuple[Any, ...], timeout: float) -> None:
    """Run ``rank(index, ranks, folder, ...)`` in processes that have everything imported already."""
    # The fork server of Python 3.11 looks for the modules that it preloads only where PYTHONPATH says.
    path = os.pathsep.join(filter(None, sys.path))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["vlm_digits.preload"])
    with _environment(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1", PYTHONPATH=path):
        context = torch.multiprocessing.start_processes(
            rank, (ranks, *arguments), nprocs=ranks, join=False, start_method="forkserver"
        )
    deadline = time.monotonic() + timeout
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{ranks} ranks did not finish within {timeout:g} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables for the processes started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _reference_rank(rank: int, ranks: int, folder: str, seed: int, steps: int, bf16: bool) -> None:
    quiet()
    from mimo_ext.megatron import cpu

    from .data import Numbers
    from .reference import Reference

    _join(rank, ranks, folder)
    found: dict[str, Any] = {}
    with cpu():
        for dtype in ("fp32", "bf16") if bf16 else ("fp32",):
            reference = Reference(Numbers(seed), check_recipe(seed, Run(dtype)), found.get("weights"))
            found.setdefault("weights", reference.weights())
            losses, gradients = zip(*(reference.step(step) for step in range(steps)), strict=True)
            found[dtype] = {"losses": losses, "gradients": gradients}
    torch.save(found, Path(folder) / "reference.pt")
    dist.destroy_process_group()


def _layout_rank(
    rank: int, ranks: int, own: str, layout: str, folder: str, seed: int, steps: int, prepare: Any, run: Run
) -> None:
    quiet()
    from mimo_ext.megatron import cpu

    from .data import Numbers
    from .reference import load_shards
    from .trainer import Trainer

    _join(rank, ranks, own)
    recorded = torch.load(Path(folder) / "reference.pt", weights_only=True)
    expected = recorded[run.dtype]
    found = Comparison(bf16=run.dtype == "bf16")
    with cpu():
        if prepare is not None:
            prepare()
        load = partial(load_shards, recorded["weights"])
        recipe = check_recipe(seed, run)
        trainer = Trainer(
            parse_layout(layout), Numbers(seed), recipe, load=load, overlap=run.overlap, path=run.path or None
        )
        for step in range(steps):
            result = trainer.gradients(step)
            _compare_gradients(trainer.model, expected["gradients"][step], found.gradient_errors)
            loss = trainer.mean_loss([result])
            found.losses.append(loss)
            found.loss_error = _worse(found.loss_error, abs(loss / expected["losses"][step] - 1.0))
            trainer.update()
        trainer.close()
    _file_of(own, rank).write_text(json.dumps(asdict(found)))
    dist.barrier()
    dist.destroy_process_group()


def _compare_gradients(model: Any, expected: dict[str, torch.Tensor], errors: dict[str, float]) -> None:
    from .reference import matching_shards

    for name, parameter, part in matching_shards(model, expected):
        error = float((parameter.main_grad - part).norm() / part.norm())
        errors[name] = _worse(errors.get(name, 0.0), error)


def _join(rank: int, ranks: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
