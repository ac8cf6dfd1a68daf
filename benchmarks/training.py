"""The rank's side of `bench_training.py`: the example's training step over either communicator, in turns.

One model serves all methods: what differs is the communicator that the schedule is given.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import busy
import released
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from vlm_digits.data import TOKENS_PER_IMAGE, TRAIN, Numbers
from vlm_digits.launch import quiet
from vlm_digits.layout import parse_layout
from vlm_digits.model import IMAGES, LANGUAGE, LANGUAGE_HIDDEN
from vlm_digits.trainer import AXES, Recipe, Trainer

from mimo_ext.megatron import cpu
from mimo_ext.megatron.trace import ScheduleRecorder
from mimo_ext.planning.links import Links
from mimo_ext.timeline import RankTimeline, Span

TIMEOUT = timedelta(seconds=60)
RELEASED = "released"
OVERLAP = "-overlap"
WARMUP = "-warmup"  # and one microbatch more is computed ahead
METHODS = ("replicated", "replicated" + OVERLAP, "replicated" + OVERLAP + WARMUP)
LINK = "images -> language"
CHECKED_STEPS = 2
_SENDS = {
    "send_forward": "send_forward",
    "send_backward": "send_backward",
    "send_forward_recv_backward": "send_forward",
    "send_backward_recv_forward": "send_backward",
}
_RECEIVES = {
    "recv_forward": "recv_forward",
    "recv_backward": "recv_backward",
    "send_forward_recv_backward": "recv_backward",
    "send_backward_recv_forward": "recv_forward",
}


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
        layout: of the example, e.g. "images: tp=2; language: tp=2".
        batch: numbers per step.
        microbatches: parts of a batch.
        links: what our bridge is told of them; None: its default.
    """

    layout: str
    batch: int
    microbatches: int
    links: Links | None = None


@dataclass
class Measured:
    """What one rank saw.

    Attributes:
        losses: by method, the mean loss of each step of a short training from the same weights.
        steps: by method, a recording of every timed step.
        shown: by method, a step that was not timed, with the transfers where the communicator tells of them.
        bytes: of the boundary tensor of a microbatch, all lanes together, on average.
        usage: processor time of this rank.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    steps: dict[str, list[RankTimeline]] = field(default_factory=dict)
    shown: dict[str, RankTimeline] = field(default_factory=dict)
    bytes: int = 0
    usage: busy.Usage = field(default_factory=lambda: busy.Usage(0.0, 0.0))


class Watch:
    """Notes when a communicator's operations begin and end; either communicator is a black box to it.

    The n-th send of one side is what the n-th receive of the other waits for. When a tensor has left its sender, and
    when it has arrived while nobody asked for it, only one of the communicators would tell: neither is noted.
    """

    def __init__(self, communicator: Any, sends: bool, receives: bool) -> None:
        """
        Args:
            communicator: its six operations are replaced on the object.
            sends: this rank feeds another module.
            receives: another module feeds this rank.
        """
        self._label = IMAGES if sends else LANGUAGE
        self._mine = {
            "send_forward": sends,
            "recv_backward": sends,
            "recv_forward": receives,
            "send_backward": receives,
        }
        self._recorder: ScheduleRecorder | None = None
        self._numbers: dict[str, int] = {}
        for name in {**_SENDS, **_RECEIVES}:
            setattr(communicator, name, self._watched(name, getattr(communicator, name)))

    def start(self) -> None:
        """Note what happens from now on."""
        self._numbers = {}
        self._recorder = ScheduleRecorder(self._label)

    def finish(self) -> RankTimeline:
        """What was noted since `start`."""
        recorder, self._recorder = self._recorder, None
        assert recorder is not None
        return recorder.finish()

    def _watched(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._recorder is None:
                return operation(*args, **kwargs)
            begin = time.monotonic_ns()
            with self._recorder.operation(name, contextlib.nullcontext()):
                result = operation(*args, **kwargs)
            self._note(name, begin, time.monotonic_ns())
            return result

        return call

    def _note(self, name: str, begin: int, end: int) -> None:
        sent, received = _SENDS.get(name), _RECEIVES.get(name)
        if sent is not None and self._mine[sent]:
            self._add("transfer", sent, begin, begin)  # handed in
        if received is not None and self._mine[received]:
            self._add("wait", received, begin, end)
        elif sent is not None and self._mine[sent]:
            self._add("wait", sent, begin, end)

    def _add(self, kind: str, operation: str, begin: int, end: int) -> None:
        key = f"{kind} {operation}"
        number = self._numbers.get(key, 0)
        self._numbers[key] = number + 1
        assert self._recorder is not None
        self._recorder.add(Span(kind, begin, end, number, LINK, operation))


@contextlib.contextmanager
def trainer_of(setting: Setting) -> Iterator[tuple[Trainer, dict[str, Any]]]:
    """The trainer, and the communicator of each method."""
    from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator

    quiet()
    recipe = Recipe(steps=1000, batch=setting.batch, microbatches=setting.microbatches)
    with cpu(), released.on_gloo(TIMEOUT):
        trainer = Trainer(
            parse_layout(setting.layout), Numbers(recipe.seed), recipe, timeout=TIMEOUT, links=setting.links
        )
        ours = trainer.communicator
        theirs = MultiModulePipelineCommunicator(
            trainer.infra.module_to_grid_map,
            trainer.infra.topology,
            trainer.config,
            dim_mapping=dict(AXES),
            module_output_ndim=trainer.infra.module_output_ndim,
        )
        yield trainer, {RELEASED: theirs, **dict.fromkeys(METHODS, ours)}
        ours.close()


def run(rank: int, meet: Any, setting: Setting, repeats: int, show: bool = False) -> Measured:
    """Collective over all ranks of the cluster, which are the ranks of the layout.

    Args:
        rank, meet: as the pool of ranks gives them.
        setting: what is trained.
        repeats: timed steps of each method.
        show: whether a step of each method is recorded for a picture.
    """
    measured = Measured()
    before = busy.process_usage()
    with trainer_of(setting) as (trainer, communicators):
        sends = IMAGES in trainer.modules
        watches = {
            id(communicator): Watch(communicator, sends, not sends) for communicator in set(communicators.values())
        }

        def use(method: str) -> Watch:
            trainer.communicator, trainer.overlap = communicators[method], OVERLAP in method
            trainer.extra_warmup = int(WARMUP in method)
            return watches[id(trainer.communicator)]

        weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        for method in communicators:
            use(method)
            meet.wait()
            measured.losses[method] = _short_training(trainer)
            _restore(trainer, weights)
        measured.steps = {method: [] for method in communicators}
        methods = list(communicators)
        for repeat in range(repeats + 1):
            shift = repeat % len(methods)  # none is always behind the same other one
            for method in methods[shift:] + methods[:shift]:
                watch = use(method)
                meet.wait()
                watch.start()
                trainer.gradients(repeat)
                trainer.update()
                found = watch.finish()
                _forget_row_counts(trainer)
                if repeat:  # the first one warms up
                    measured.steps[method].append(found)
        for method in methods if show else ():
            measured.shown[method] = _shown_step(trainer, use(method), meet, repeats)
        measured.bytes = _boundary_bytes(trainer, range(1, repeats + 1))
        meet.wait()
    measured.usage = busy.process_usage() - before
    return measured


def _shown_step(trainer: Trainer, watch: Watch, meet: Any, step: int) -> RankTimeline:
    """Ours tells when transfers began and ended; of the released communicator only its calls are seen."""
    communicator = trainer.communicator
    traces = hasattr(communicator, "start_trace")
    meet.wait()
    (communicator.start_trace if traces else watch.start)()
    trainer.gradients(step)
    trainer.update()
    found: RankTimeline = (communicator.finish_trace if traces else watch.finish)()
    _forget_row_counts(trainer)
    return found


def _short_training(trainer: Trainer) -> list[float]:
    """Mean loss of some steps of plain gradient descent: a wrong gradient shows in the next step's loss."""
    losses = []
    for step in range(CHECKED_STEPS):
        result = trainer.gradients(step)
        losses.append(trainer.mean_loss([result]))
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(parameter.main_grad, alpha=-0.05)
        _forget_row_counts(trainer)
    return losses


def _restore(trainer: Trainer, weights: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, weight in zip(trainer.model.parameters(), weights, strict=True):
            parameter.copy_(weight)


def _forget_row_counts(trainer: Trainer) -> None:
    """What the model tells our communicator, and the released one does not ask for."""
    for queue in trainer.model.row_counts.values():
        queue.clear()


def _boundary_bytes(trainer: Trainer, steps: range) -> int:
    images = [sum(trainer.numbers.batch(TRAIN, step, trainer.recipe.batch).counts) for step in steps]
    rows = TOKENS_PER_IMAGE * sum(images) / len(images) / trainer.recipe.microbatches
    return round(rows * LANGUAGE_HIDDEN * 4)
