"""Training over a layout: Megatron's MimoModel, DDP, schedules and optimizer around mimo_ext's bridge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo.optimizer import get_mimo_optimizer
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_model_config

from mimo_ext import Bridge
from mimo_ext.megatron import cpu
from mimo_ext.megatron.communicator import MultiModulePipelineCommunicator
from mimo_ext.megatron.config import MimoParallelismConfig, ModuleParallelismConfig
from mimo_ext.megatron.overlap import overlapped
from mimo_ext.megatron.parallel_utils import (
    build_pg_collection_for_schedule,
    finalize_model_grads_multimodule,
    get_module_to_grid_tuple,
    multimodule_no_sync,
    zero_grad_buffer_for_multimodule,
)
from mimo_ext.megatron.provider import MimoModelProvider
from mimo_ext.planning.links import Links

from .data import MAX_DIGITS, PAD, SEQUENCE_LENGTH, TOKENS_PER_IMAGE, TRAIN, NumberBatch, Numbers, as_text
from .layout import VlmLayout, check_batch
from .model import ENCODER, IMAGES, LANGUAGE, SPECIAL_TOKEN_IDS, language_spec, vision_spec

AXES = {"s": 0, "b": 1, "h": 2}  # of what travels between the pipeline stages


@dataclass
class Recipe:
    """How the model is trained."""

    seed: int = 0
    steps: int = 800
    batch: int = 32
    microbatches: int = 2
    lr: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    bf16: bool = False  # weights, activations and what travels; gradients are summed and weights updated in fp32

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return torch.bfloat16 if self.bf16 else torch.float32


@dataclass
class StepResult:
    """What this rank knows of a step: the sum of its tokens' losses and their number (0 where no loss is computed)."""

    loss_sum: float = 0.0
    tokens: int = 0


@dataclass
class Reading:
    """What the model read: for every sample the text it wrote and the number that the images show."""

    texts: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Share of numbers that are right as a whole."""
        return sum(text == number for text, number in zip(self.texts, self.numbers, strict=True)) / len(self.numbers)


class Trainer:
    """The model, the bridge and the optimizer of this rank. Collective over the default process group.

    Modules on ranks of their own run under the 1F1B schedule, with a communicator that carries rows from one to the
    other. Modules on the same ranks run one after the other, under the schedule without a pipeline: there the model
    itself carries the rows, within its forward pass.

    Args:
        layout: which ranks run which module; it covers the default group.
        numbers: the data.
        recipe: how to train.
        load: called with the rank's MimoModel before it is wrapped, to replace its initial weights.
        timeout: how long a transfer may take before the bridge raises.
        overlap: let transfers between modules on ranks of their own run while the ranks compute.
        links: between the modules, for the bridge's choice of how replicas come by their copies; default: its own.
        path: that choice itself; default "auto".
        extra_warmup: with `overlap`: microbatches that each stage computes ahead of the next one, beyond those of 1F1B.
        device: that this rank trains on: the CPU, or the current CUDA device.
        transport: what carries the tensors between the ranks, as of `mimo_ext.Bridge`; default: the ranks choose.
    """

    def __init__(
        self,
        layout: VlmLayout,
        numbers: Numbers,
        recipe: Recipe,
        load: Callable[[torch.nn.Module], None] | None = None,
        timeout: timedelta = timedelta(seconds=60),
        overlap: bool = True,
        extra_warmup: int = 0,
        links: Links | None = None,
        path: str | None = None,
        device: torch.device | str = "cpu",
        transport: str | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.layout, self.numbers, self.recipe = layout, numbers, recipe
        self.overlap, self.extra_warmup = overlap, extra_warmup
        self.modules = layout.modules_of(dist.get_rank())
        provider = build_provider(layout, recipe.dtype)
        self.infra = provider.get_or_build_infra()
        home = LANGUAGE if LANGUAGE in self.modules else IMAGES
        cpu.manual_seed(recipe.seed, self.infra.pg_collections[home])
        hook = None if load is None else partial(_call_on_first, load)
        self.model = provider.provide_distributed_model(
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False
            ),
            pre_wrap_hook=hook,
            mixed_precision_wrapper=lambda config, model: model,  # the encoder casts its images itself
        )[0]
        self.config = get_model_config(self.model)
        self.communicator: Any = None  # or that of another implementation: Megatron's schedule takes any
        if layout.colocated:
            self.model.build_bridges(timeout, transport)
        else:
            self.communicator = MultiModulePipelineCommunicator(
                self.infra.module_to_grid_map,
                self.infra.topology,
                self.config,
                dim_mapping=dict(AXES),
                module_output_ndim=self.infra.module_output_ndim,
                timeout=timeout,
                device=self.device,
                transport=transport,
                model=self.model,
                links=links,
                path=path,
            )
        self.pg_collection = build_pg_collection_for_schedule(self.infra)
        self.module_to_grid = get_module_to_grid_tuple(self.model, self.infra)
        self.config.no_sync_func = partial(multimodule_no_sync, module_to_grid_tuple=self.module_to_grid)
        self.config.finalize_model_grads_func = partial(
            finalize_model_grads_multimodule, infra=self.infra, module_to_grid_tuple=self.module_to_grid
        )
        self.optimizer = get_mimo_optimizer(self.model, optimizer_config(recipe))
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=recipe.lr,
            min_lr=0.0,
            lr_warmup_steps=recipe.warmup,
            lr_decay_steps=recipe.steps,
            lr_decay_style="cosine",
            start_wd=recipe.weight_decay,
            end_wd=recipe.weight_decay,
            wd_incr_steps=recipe.steps,
            wd_incr_style="constant",
        )

    @property
    def computes_loss(self) -> bool:
        """Whether this rank runs the last stage of the language model."""
        return self.communicator is None or bool(self.communicator.is_pp_last_stage)

    @property
    def bridge(self) -> Bridge | None:
        """The bridge from the encoder to the language model; None where each rank keeps the rows that it makes."""
        if self.communicator is not None:
            return self.communicator.bridge_comms[0].bridge
        bridges = self.model.colocated_bridges
        return None if bridges is None else bridges.bridge_of(IMAGES)

    def gradients(self, step: int) -> StepResult:
        """Forward and backward of all microbatches of `step`; leaves the finished gradients in ``param.main_grad``."""
        zero_grad_buffer_for_multimodule(self.module_to_grid)
        self.optimizer.zero_grad()
        batch = self.numbers.batch(TRAIN, step, self.recipe.batch)
        losses = self._run(batch, self.recipe.microbatches, _train_loss, forward_only=False)
        sums = [loss.tolist() for loss in losses] if self.computes_loss else []
        return StepResult(sum(total for total, _ in sums), int(sum(tokens for _, tokens in sums)))

    def update(self) -> float:
        """Clip the gradients, update weights and learning rate; returns the norm of all gradients. Collective."""
        successful, norm, _ = self.optimizer.step()
        if not successful:
            raise RuntimeError(f"rank {dist.get_rank()}: the gradients are not finite")
        self.scheduler.step(increment=1)
        return norm

    def mean_loss(self, results: list[StepResult]) -> float:
        """Mean loss per token of `results`, over all lanes. Collective."""
        speaks = self.computes_loss and self.pg_collection[LANGUAGE].tp.rank() == 0
        sums = torch.zeros(2, dtype=torch.float64)
        if speaks:
            sums += torch.tensor([[r.loss_sum, r.tokens] for r in results], dtype=torch.float64).sum(0)
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def exact(self, batch: NumberBatch) -> float:
        """Share of the numbers of `batch` that the model would write without an error. Collective.

        One forward pass with the true digits as input is enough. The model is causal, so as long as everything written
        so far is right, writing on greedily feeds it just these inputs: by induction over the tokens, the greedy answer
        is right as a whole if and only if every single answer token of this pass is.
        """
        chosen = self._chosen(batch)
        right = ((chosen == batch.labels) | (batch.loss_mask == 0)).all(dim=1)
        return float(right.float().mean())

    def read(self, batch: NumberBatch) -> Reading:
        """Let the model write greedily, token by token, what it sees in `batch`. Collective."""
        batch = batch.samples(0, len(batch))
        rows = torch.arange(len(batch))
        start = torch.tensor(batch.counts) * TOKENS_PER_IMAGE  # position of ANSWER
        column = torch.arange(SEQUENCE_LENGTH)
        batch.input_ids = torch.where(column > start[:, None], PAD, batch.input_ids)
        tokens = []
        for position in range(MAX_DIGITS + 1):
            at = (start + position).clamp(max=SEQUENCE_LENGTH - 1)
            tokens.append(self._chosen(batch)[rows, at])
            follows = start + position + 1
            fits = follows < SEQUENCE_LENGTH
            batch.input_ids[rows[fits], follows[fits]] = tokens[-1][fits]
        return Reading([as_text(row) for row in torch.stack(tokens, dim=1).tolist()], batch.numbers())

    def close(self) -> None:
        """Close the bridges; collective."""
        (self.communicator or self.model).close()

    def _chosen(self, batch: NumberBatch) -> torch.Tensor:
        """Likeliest token at every position of every sample, int64 ``[B, S]``, on every rank."""
        microbatches = self.recipe.microbatches
        check_batch(self.layout, len(batch), microbatches)
        chosen = torch.zeros(microbatches, len(batch) // microbatches, SEQUENCE_LENGTH, dtype=torch.int64)
        with torch.no_grad():
            found = self._run(batch, microbatches, self._likeliest, forward_only=True)
        if self.computes_loss and self.pg_collection[LANGUAGE].tp.rank() == 0:
            language = self.modules[LANGUAGE]
            lane, share = language.lane(dist.get_rank()), chosen.size(1) // language.dp
            chosen[:, lane * share : (lane + 1) * share] = torch.stack(found).cpu()
        dist.all_reduce(chosen)
        return chosen.flatten(0, 1)

    def _likeliest(self, batch: NumberBatch, logits: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        group = self.pg_collection[LANGUAGE].tp
        return gather_from_tensor_model_parallel_region(logits, group=group).argmax(dim=-1)

    def _run(
        self, batch: NumberBatch, microbatches: int, outcome: Callable[..., Any], forward_only: bool
    ) -> list[torch.Tensor]:
        size = len(batch) // microbatches
        parts = (batch.samples(i * size, (i + 1) * size) for i in range(microbatches))
        options = {
            "forward_step_func": partial(self._forward, outcome, forward_only),
            "data_iterator": ({name: self._lane(name, part) for name in self.modules} for part in parts),
            "model": self.model,
            "num_microbatches": microbatches,
            "seq_length": SEQUENCE_LENGTH,
            "micro_batch_size": size,
            "forward_only": forward_only,
            "collect_non_loss_data": forward_only,
        }
        if self.communicator is None:
            return forward_backward_no_pipelining(**options, pg_collection=self.pg_collection[LANGUAGE])
        schedule = forward_backward_pipelining_without_interleaving
        if self.overlap:
            schedule = overlapped(schedule, extra_warmup=self.extra_warmup)
        return schedule(**options, p2p_communicator=self.communicator, pg_collection=self.pg_collection)

    def _lane(self, name: str, microbatch: NumberBatch) -> NumberBatch:
        """The samples of this rank's lane of module `name`. Modules on the same ranks may have different lanes."""
        module = self.modules[name]
        return microbatch.lane(module.lane(dist.get_rank()), module.dp).to(self.device)

    def _forward(
        self,
        outcome: Callable[..., Any],
        forward_only: bool,
        lanes: Iterator[dict[str, NumberBatch]],
        model: torch.nn.Module,
    ) -> tuple[Any, Callable[..., Any]]:
        lane = next(lanes)
        inputs = {IMAGES: {ENCODER: {"images": lane[IMAGES].images}}} if IMAGES in lane else None
        if LANGUAGE not in lane:
            output, _ = model(input_ids=lane[IMAGES].input_ids, modality_inputs=inputs)
            return output, partial(outcome, lane[IMAGES])
        batch = lane[LANGUAGE]
        labels = batch.labels if self.computes_loss and not forward_only else None
        output, _ = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, labels=labels, modality_inputs=inputs
        )
        return output, partial(outcome, batch)


def _train_loss(batch: NumberBatch, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the answer tokens' losses and their number; the schedule divides by the number in all lanes at the end."""
    total = (losses * batch.loss_mask).sum()
    tokens = batch.loss_mask.sum().to(torch.int)
    return total, tokens, torch.stack([total.detach(), tokens.to(total.dtype)])


def _call_on_first(function: Callable[[torch.nn.Module], None], models: list[torch.nn.Module]) -> list[torch.nn.Module]:
    function(models[0])
    return models


def build_provider(layout: VlmLayout, dtype: torch.dtype = torch.float32) -> MimoModelProvider:
    """The provider of the model for `layout`, in fp32 or bf16."""
    modules = layout.modules
    language = modules[LANGUAGE]
    return MimoModelProvider(
        language_model_spec=language_spec(language.tp, language.pp, dtype),
        modality_submodules_spec={IMAGES: vision_spec(modules[IMAGES].tp, dtype)},
        special_token_ids=dict(SPECIAL_TOKEN_IDS),
        mimo_parallelism_config=MimoParallelismConfig(
            module_parallelisms={
                name: ModuleParallelismConfig(
                    tensor_model_parallel_size=module.tp,
                    pipeline_model_parallel_size=module.pp,
                    data_parallel_size=module.dp,
                    rank_offset=module.first_rank,
                )
                for name, module in modules.items()
            }
        ),
        bf16=dtype is torch.bfloat16,
    )


def optimizer_config(recipe: Recipe) -> OptimizerConfig:
    """AdamW, of fp32 weights; biases and norms are not decayed (Megatron's default)."""
    return OptimizerConfig(
        optimizer="adam",
        lr=recipe.lr,
        min_lr=0.0,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        clip_grad=recipe.clip,
        bf16=recipe.bf16,
        fp16=False,
        params_dtype=recipe.dtype,
        use_distributed_optimizer=False,
    )
