#!/usr/bin/env python3
"""A recipe as Megatron-Bridge has them: `vlm_digits_pretrain_config()` returns the config of a training run.

The model is the one of examples/vlm_digits, a vision transformer and a GPT that reads handwritten numbers; each module
has its own parallelism, and `config.model` is mimo_ext's provider. On GPUs, with Megatron-Bridge:

    from megatron.bridge.training.pretrain_megatron_mimo import pretrain_megatron_mimo
    import mimo_ext.megatron

    with mimo_ext.megatron.install():  # Megatron-Bridge's own calls reach mimo_ext's classes
        pretrain_megatron_mimo(vlm_digits_pretrain_config(), forward_step, build_data_iterators)

Where Megatron-Bridge cannot be imported the config is a `RecipeConfig`: the same fields, as far as this recipe sets
them. `recipes.cpu_loop.pretrain` takes the same three arguments and trains with it on the CPU:

    python examples/recipes/vlm_mimo.py                      (starts the four ranks itself)
    python examples/recipes/vlm_mimo.py --train-iters 200 --layout "images: dp=4; language: dp=2,pp=2"

What of Megatron-Bridge 0.6.2 does not run on a CPU: `import megatron.bridge` needs Transformer Engine, which is built
for CUDA only (megatron/bridge/peft/lora_layers.py imports it, and megatron/bridge/__init__.py leads there). Its
`ConfigContainer` therefore cannot be made on a CPU, and `setup_megatron_mimo` puts tensors on "cuda" and needs
nvidia-resiliency-ext and modelopt. Its model layer and its gradient hooks do run: tests/megatron/test_recipe.py trains
this recipe with them.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(path for path in sys.path if Path(path).resolve() != _here)]
    from vlm_digits.launch import quiet

    quiet()  # before Megatron is imported

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from vlm_digits.data import TRAIN, VOCAB_SIZE, NumberBatch, Numbers
from vlm_digits.layout import DEFAULT_LAYOUT, LayoutError, check_batch, parse_layout
from vlm_digits.model import ENCODER, IMAGES, LANGUAGE, SPECIAL_TOKEN_IDS, language_spec, vision_spec

from mimo_ext.megatron.config import MimoParallelismConfig, ModuleParallelismConfig
from mimo_ext.megatron.parallel_utils import unwrap_megatron_mimo_model
from mimo_ext.megatron.provider import MegatronMIMOProvider

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class TrainingConfig:
    """Megatron-Bridge's fields of this name; micro_batch_size counts the samples of all data-parallel ranks."""

    train_iters: int
    global_batch_size: int
    micro_batch_size: int


@dataclasses.dataclass
class SchedulerConfig:
    """Megatron-Bridge's fields of this name."""

    lr_decay_style: str
    lr_decay_iters: int
    lr_warmup_iters: int
    start_weight_decay: float
    end_weight_decay: float
    weight_decay_incr_style: str = "constant"


@dataclasses.dataclass
class RNGConfig:
    """Megatron-Bridge's field of this name."""

    seed: int


@dataclasses.dataclass
class RecipeConfig:
    """Stands for Megatron-Bridge's ConfigContainer where that cannot be imported."""

    model: MegatronMIMOProvider
    train: TrainingConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    ddp: DistributedDataParallelConfig
    rng: RNGConfig


def vlm_digits_provider(
    images: ModuleParallelismConfig | None = None, language: ModuleParallelismConfig | None = None
) -> MegatronMIMOProvider:
    """Provider of the model.

    Args:
        images: sizes and first rank of the vision encoder; default DP 2 on ranks 0 and 1.
        language: the same of the language model; default TP 2 on ranks 2 and 3.
    """
    images = images or ModuleParallelismConfig(data_parallel_size=2)
    language = language or ModuleParallelismConfig(tensor_model_parallel_size=2, data_parallel_size=1, rank_offset=2)
    return MegatronMIMOProvider(
        language_model_spec=language_spec(language.tensor_model_parallel_size, language.pipeline_model_parallel_size),
        modality_submodules_spec={IMAGES: vision_spec(images.tensor_model_parallel_size)},
        special_token_ids=dict(SPECIAL_TOKEN_IDS),
        # The document's class: DP counts need not divide one another, as they must in the released one.
        megatron_mimo_parallelism_config=MimoParallelismConfig({IMAGES: images, LANGUAGE: language}),
        bf16=False,
    )


def vlm_digits_pretrain_config(
    images: ModuleParallelismConfig | None = None,
    language: ModuleParallelismConfig | None = None,
    train_iters: int = 200,
    global_batch_size: int = 32,
    micro_batch_size: int = 16,
    lr: float = 1.5e-3,
    seed: int = 0,
) -> Any:
    """The whole config: a ConfigContainer of Megatron-Bridge where it can be imported, else a `RecipeConfig`.

    Args:
        images, language: see `vlm_digits_provider`.
        train_iters: updates of the weights.
        global_batch_size: samples of one update.
        micro_batch_size: samples of one microbatch, before each module takes its data-parallel share.
        lr: highest learning rate.
        seed: decides the data, its order and the weights.
    """
    try:
        from megatron.bridge.training import config as bridge
    except Exception as error:  # it fails in many ways where Transformer Engine is missing
        logger.info("Megatron-Bridge cannot be imported (%s: %s); a RecipeConfig it is", type(error).__name__, error)
        bridge = None
    optimizer: Any = bridge.OptimizerConfig if bridge else OptimizerConfig
    training: Any = bridge.TrainingConfig if bridge else TrainingConfig
    scheduler: Any = bridge.SchedulerConfig if bridge else SchedulerConfig
    ddp: Any = bridge.DistributedDataParallelConfig if bridge else DistributedDataParallelConfig
    rng: Any = bridge.RNGConfig if bridge else RNGConfig
    parts: dict[str, Any] = {
        "model": vlm_digits_provider(images, language),
        "train": training(
            train_iters=train_iters, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size
        ),
        "optimizer": optimizer(
            optimizer="adam",
            lr=lr,
            min_lr=0.0,
            weight_decay=0.05,
            adam_beta1=0.9,
            adam_beta2=0.98,
            clip_grad=1.0,
            bf16=False,
            fp16=False,
            params_dtype=torch.float32,
            use_distributed_optimizer=False,
        ),
        "scheduler": scheduler(
            lr_decay_style="cosine",
            lr_decay_iters=train_iters,
            lr_warmup_iters=min(100, train_iters // 8),
            start_weight_decay=0.05,
            end_weight_decay=0.05,
            weight_decay_incr_style="constant",
        ),
        "ddp": ddp(overlap_grad_reduce=False, use_distributed_optimizer=False),
        "rng": rng(seed=seed),
    }
    if bridge is None:
        return RecipeConfig(**parts)
    return bridge.ConfigContainer(
        **parts,
        # The iterators of `build_data_iterators` take the place of a dataset and its tokenizer.
        dataset=None,
        logger=bridge.LoggerConfig(log_interval=10),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB_SIZE),
        checkpoint=bridge.CheckpointConfig(save=None, load=None),
    )


def build_data_iterators(
    cfg: Any, infra: Any, train_state: Any = None
) -> tuple[Iterator[NumberBatch], Iterator[NumberBatch] | None]:
    """(training data, None) of this rank: its module's data-parallel share of every microbatch.

    Args:
        cfg: the config of `vlm_digits_pretrain_config`.
        infra: MimoModelInfra of its provider.
        train_state: Megatron-Bridge's; its ``step`` is where the data goes on.
    """
    (name,) = infra.participating_modules
    group = infra.pg_collections[name].dp
    return _lane(cfg, group.rank(), group.size(), getattr(train_state, "step", 0)), None


def _lane(cfg: Any, lane: int, lanes: int, step: int) -> Iterator[NumberBatch]:
    numbers = Numbers(cfg.rng.seed)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    size = cfg.train.micro_batch_size
    while True:
        batch = numbers.batch(TRAIN, step, cfg.train.global_batch_size)
        for first in range(0, len(batch), size):
            yield _on_device(batch.samples(first, first + size).lane(lane, lanes), device)
        step += 1


def _on_device(batch: NumberBatch, device: torch.device) -> NumberBatch:
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return NumberBatch(**{n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in tensors.items()})


def forward_step(data_iterator: Iterator[NumberBatch], model: torch.nn.Module) -> tuple[Any, Any]:
    """One forward pass of this rank's modules, as Megatron's schedules call it.

    Returns:
        (output, loss function): on the last stage of the language model the losses ``[B, S]``, elsewhere a dict of
        activations and None.
    """
    batch = next(data_iterator)
    role = unwrap_megatron_mimo_model(model).role
    if not role.has_language_module:
        output, _ = model(input_ids=batch.input_ids, modality_inputs={IMAGES: {ENCODER: {"images": batch.images}}})
        return output, None
    last = role.is_last_stage(LANGUAGE)
    output, _ = model(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels if last else None)
    return output, partial(loss_func, batch.loss_mask) if last else None


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Sum of the answer tokens' losses and their number; the schedule divides by the number in the whole batch."""
    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.to(total.dtype)])}


def main(arguments: list[str] | None = None) -> int:
    """Print the config and train with it on the CPU; returns the exit code for the shell."""
    from vlm_digits.launch import hide_gpus, run_rank, start_ranks

    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train-iters", type=int, default=20, help="updates of the weights (default: %(default)s)")
    parser.add_argument("--layout", default=DEFAULT_LAYOUT, help="sizes of the modules (default: '%(default)s')")
    options = parser.parse_args(arguments)
    try:
        config = vlm_digits_pretrain_config(**sizes_of(options.layout), train_iters=options.train_iters)
    except LayoutError as error:
        print(f"this cannot work (--layout '{options.layout}'): {error}", file=sys.stderr)
        return 2
    hide_gpus()
    if "RANK" not in os.environ:
        print(summary(config), flush=True)
        world_size = config.model.megatron_mimo_parallelism_config.total_world_size
        return start_ranks(Path(__file__).resolve(), arguments, world_size)

    def train() -> None:
        from recipes.cpu_loop import pretrain_rank

        for step, loss in enumerate(pretrain_rank(config, forward_step, build_data_iterators), 1):
            if dist.get_rank() == 0 and (step % 5 == 0 or step == options.train_iters):
                print(f"step {step:4d}  loss {loss:.4f}", flush=True)

    return run_rank(train)


def sizes_of(text: str, batch: int = 32, microbatches: int = 2) -> dict[str, ModuleParallelismConfig]:
    """Module name -> sizes, from a layout as examples/vlm_digits takes it. Raises LayoutError."""
    layout = parse_layout(text)
    if layout.colocated:
        raise LayoutError(
            "this recipe trains modules on ranks of their own; examples/vlm_digits trains both on the same"
        )
    check_batch(layout, batch, microbatches)
    return {
        name: ModuleParallelismConfig(
            tensor_model_parallel_size=module.tp,
            pipeline_model_parallel_size=module.pp,
            data_parallel_size=module.dp,
            rank_offset=module.first_rank,
        )
        for name, module in layout.modules.items()
    }


def summary(config: Any) -> str:
    """The config in words: one line per part, a line per module."""
    lines = [f"{type(config).__name__}: model = {type(config.model).__name__}"]
    for name, sizes in config.model.megatron_mimo_parallelism_config.module_parallelisms.items():
        ranks = f"ranks {sizes.rank_offset} to {sizes.rank_offset + sizes.total_ranks - 1}"
        lines.append(
            f"  {name:9} {ranks}: TP {sizes.tensor_model_parallel_size}, CP {sizes.context_parallel_size}, "
            f"DP {sizes.data_parallel_size}, PP {sizes.pipeline_model_parallel_size}"
        )
    for name, kind in (("train", TrainingConfig), ("scheduler", SchedulerConfig), ("rng", RNGConfig)):
        part = getattr(config, name)
        lines.append(f"  {name}: " + ", ".join(f"{f.name}={getattr(part, f.name)}" for f in dataclasses.fields(kind)))
    optimizer = config.optimizer
    lines.append(f"  optimizer: {optimizer.optimizer}, lr={optimizer.lr}, clip_grad={optimizer.clip_grad}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
