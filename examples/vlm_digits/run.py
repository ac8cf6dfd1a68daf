"""What each rank does in a training run, and what the user sees of it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from mimo_ext import timeline
from mimo_ext.megatron import cpu

from .data import TEST, Numbers
from .layout import VlmLayout, check_world
from .model import IMAGES, LANGUAGE
from .report import History, Progress, Transfer, draw, final_table
from .trainer import Reading, Recipe, Trainer

LOSS_EVERY = 10
TEST_NUMBERS = 512  # held-out numbers of the final accuracy
WATCHED_NUMBERS = 128  # held-out numbers of the accuracy in the progress bar
SHOWN_NUMBERS = 8
RECORDED_STEP = 20  # for --timeline; the last one of a shorter run


def train_rank(
    layout: VlmLayout,
    recipe: Recipe,
    picture: Path,
    timeout: float,
    timeline_picture: Path | None = None,
    overlap: bool = True,
    device: str = "cpu",
    transport: str | None = None,
) -> None:
    """Train on this rank of a torchrun job and, on rank 0, report. The last line of standard output is the result.

    With `device` "cuda" ranks share what GPUs there are, and all that they say to one another goes over gloo.
    """
    torch.set_num_threads(1)
    check_world(layout, int(os.environ["WORLD_SIZE"]))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    with cpu():  # without effect where CUDA is in sight
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        trainer = partial(Trainer, timeout=timedelta(seconds=timeout), device=device, transport=transport)
        _train(layout, recipe, picture, trainer, timeline_picture, overlap)
        dist.destroy_process_group()


def _train(
    layout: VlmLayout,
    recipe: Recipe,
    picture: Path,
    make_trainer: Callable[..., Trainer],
    timeline_picture: Path | None,
    overlap: bool,
) -> None:
    reports = dist.get_rank() == 0
    numbers = Numbers(recipe.seed)
    trainer = make_trainer(layout, numbers, recipe, overlap=overlap)
    watched = numbers.batch(TEST, 0, _at_least(WATCHED_NUMBERS, recipe.batch))
    watch_every = max(1, recipe.steps // 16)
    history = History()
    transfers = plan_transfers(layout, trainer)
    dist.barrier()
    started = time.monotonic()
    waiting = []
    ranks: list[timeline.RankTimeline] | None = None  # of one step
    with Progress(recipe.steps, recipe.batch, enabled=reports) as progress:
        for step in range(recipe.steps):
            recorded = timeline_picture is not None and step == min(RECORDED_STEP, recipe.steps - 1)
            if recorded:
                dist.barrier()
                trainer.communicator.start_trace()
            waiting.append(trainer.gradients(step))
            trainer.update()
            if recorded:
                ranks = timeline.gather(trainer.communicator.finish_trace())
            done = step + 1
            if done % LOSS_EVERY == 0 or done == recipe.steps:
                history.losses.append((done, trainer.mean_loss(waiting)))
                waiting.clear()
            if done % watch_every == 0:
                history.accuracies.append((done, trainer.exact(watched)))
            progress.advance(history)
    seconds = time.monotonic() - started
    reading, shown = _final_reading(trainer, _at_least(TEST_NUMBERS, recipe.batch))
    history.accuracies = [point for point in history.accuracies if point[0] < recipe.steps]
    history.accuracies.append((recipe.steps, reading.accuracy))
    if reports:
        draw(picture, layout, transfers, history, shown, reading.texts, reading.numbers)
        if timeline_picture is not None and ranks is not None:
            title = f"one training step of {layout}, {recipe.microbatches} microbatches" + (
                ", overlap" if overlap else ""
            )
            timeline.draw(ranks, timeline_picture, title)
            timeline.write_trace(ranks, timeline_picture.with_suffix(".json"))
        result = {
            "accuracy": round(reading.accuracy, 4),
            "loss": round(history.losses[-1][1], 6),
            "seconds": round(seconds, 1),
            "samples_per_second": round(recipe.steps * recipe.batch / seconds, 1),
            "steps": recipe.steps,
            "batch": recipe.batch,
            "seed": recipe.seed,
            "layout": str(layout),
            "ranks": layout.world_size,
            "device": trainer.device.type,
            "transport": "none" if trainer.bridge is None else trainer.bridge.transport,
            "picture": str(picture.resolve()),
        }
        if timeline_picture is not None:
            result["timeline"] = str(timeline_picture.resolve())
        print(final_table(result, len(reading.numbers)))
    trainer.close()
    dist.barrier()
    if reports:
        print("result: " + json.dumps(result), flush=True)


def _final_reading(trainer: Trainer, count: int) -> tuple[Reading, list[torch.Tensor]]:
    """Let the model write `count` held-out numbers; also returns the images of the first few, ``[8, 8 n]`` each."""
    size = trainer.recipe.batch
    total = Reading()
    shown: list[torch.Tensor] = []
    for index in range(count // size):
        batch = trainer.numbers.batch(TEST, 1 + index, size)
        reading = trainer.read(batch)
        total.texts += reading.texts
        total.numbers += reading.numbers
        if not shown:
            shown = [torch.cat(list(images), dim=1) for images in batch.images.split(batch.counts)][:SHOWN_NUMBERS]
    return total, shown


def _at_least(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def plan_transfers(layout: VlmLayout, trainer: Trainer) -> list[Transfer]:
    """The forward messages of a microbatch whose samples are equal, as the bridge plans them.

    Asked before the first microbatch: afterwards a rank's plan has that microbatch's rows, of its own lane alone.
    """
    transfers = []
    if trainer.bridge is None:  # equal modules on the same ranks: each rank keeps what it makes
        return [Transfer((IMAGES, rank), (LANGUAGE, rank)) for rank in range(layout.world_size)]
    sends, copies = [], []
    for rank in range(layout.world_size):
        messages = trainer.bridge.plan.for_rank(rank)
        sends += messages["sends"]
        copies += messages["lane_sends"]
    volumes = [math.prod(size for _, size in message["send_box"]) for message in sends]
    for message, volume in zip(sends, volumes, strict=True):
        share = volume / sum(volumes)
        transfers.append(Transfer((IMAGES, message["sender"]), (LANGUAGE, message["receiver"]), share))
    lane_copies = {Transfer((LANGUAGE, m["sender"]), (LANGUAGE, m["receiver"]), copy=True) for m in copies}
    transfers += sorted(lane_copies, key=repr)
    for module in layout.modules.values():  # between pipeline stages: to the same coordinate
        per_stage = module.tp * module.dp
        stages = [rank for rank in module.ranks if module.stage(rank) < module.pp - 1]
        transfers += [Transfer((module.name, rank), (module.name, rank + per_stage)) for rank in stages]
    return transfers
