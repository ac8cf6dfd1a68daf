"""The same model in one process without any parallelism, to compare with: no schedule, no bridge, plain autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from mimo_ext.megatron import cpu

from .data import TRAIN, Numbers
from .model import ENCODER, IMAGES, SPECIAL_TOKEN_IDS, language_spec, vision_spec
from .trainer import Recipe


class Reference:
    """MimoModel with TP = PP = DP = 1, trained by torch.optim.AdamW. Needs a default process group of one rank.

    Args:
        numbers: the data.
        recipe: how to train; `microbatches` makes no difference here.
        weights: to begin with, by name; default: those of the recipe's seed.
    """

    def __init__(self, numbers: Numbers, recipe: Recipe, weights: dict[str, torch.Tensor] | None = None) -> None:
        self.numbers, self.recipe = numbers, recipe
        cpu.manual_seed(recipe.seed)
        self.model = build_single(single_rank_groups(), recipe.dtype)
        if weights is not None:
            load_shards(weights, self.model)
        # What the optimizer updates; in fp32 the weights themselves.
        self.masters = dict(self.model.named_parameters())
        if recipe.bf16:
            self.masters = {
                name: torch.nn.Parameter(weight.detach().float()) for name, weight in self.model.named_parameters()
            }
        decayed = [p for p in self.masters.values() if p.ndim > 1]
        others = [p for p in self.masters.values() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=recipe.lr,
            betas=recipe.betas,
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of all parameters by name."""
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def step(self, step: int) -> tuple[float, dict[str, torch.Tensor]]:
        """One step on the whole batch; returns its mean loss per token and the gradients before clipping."""
        batch = self.numbers.batch(TRAIN, step, self.recipe.batch)
        losses, _ = self.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            labels=batch.labels,
            modality_inputs={IMAGES: {ENCODER: {"images": batch.images}}},
        )
        loss = (losses * batch.loss_mask).sum() / batch.loss_mask.sum()
        self.model.zero_grad()
        loss.backward()
        gradients = {name: p.grad.float() for name, p in self.model.named_parameters() if p.grad is not None}
        for name, gradient in gradients.items():
            self.masters[name].grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(self.masters.values(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, step)
        self.optimizer.step()
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(self.masters[name])
        return loss.item(), gradients


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up from 0, then half a cosine down to 0."""
    if step <= recipe.warmup:
        return recipe.lr * step / recipe.warmup
    done = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
    return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def single_rank_groups() -> ProcessGroupCollection:
    """A collection whose every group is the default group, which has one rank."""
    world = dist.group.WORLD
    if dist.get_world_size() != 1:
        raise RuntimeError(f"the reference runs in one process, but there are {dist.get_world_size()} ranks")
    names = ProcessGroupCollection.__dataclass_fields__
    return ProcessGroupCollection(**{name: world for name in names if not name.startswith("hcp")})


def build_single(groups: ProcessGroupCollection, dtype: torch.dtype = torch.float32) -> MimoModel:
    """The whole model on this rank."""
    language, vision = language_spec(dtype=dtype), vision_spec(dtype=dtype)
    language.params["pg_collection"] = groups
    vision.submodules["encoders"][ENCODER].params["pg_collection"] = groups
    vision.submodules["input_projections"][0].params["tp_group"] = groups.tp
    return MimoModel(MimoModelConfig(language, {IMAGES: vision}, dict(SPECIAL_TOKEN_IDS))).to(dtype)


def matching_shards(
    model: MimoModel, full: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.nn.Parameter, torch.Tensor]]:
    """Pair every parameter of this rank's `model` with the part of the single-process tensor it stands for.

    Args:
        model: this rank's model, its modules wrapped in DDP or not.
        full: tensors of the single-process model by parameter name: weights, or gradients.

    Yields:
        The single-process name, the parameter of this rank, and its part of ``full[name]``.
    """
    modules = {f"modality_submodules.{name}": module for name, module in model.modality_submodules.items()}
    if model.language_model is not None:
        modules["language_model"] = model.language_model
    for prefix, wrapped in modules.items():
        module = unwrap_model(wrapped)
        first_layer = module.decoder.layers[0].layer_number - 1 if prefix == "language_model" else 0
        for name, parameter in module.named_parameters():
            name = f"{prefix}.{_global_layer(name, first_layer)}"
            tensor = full[name]
            if getattr(parameter, "tensor_model_parallel", False):
                axis = parameter.partition_dim
                parts = tensor.size(axis) // parameter.size(axis)
                tensor = tensor.chunk(parts, dim=axis)[_tp_rank(module, prefix, parts)]
            if tensor.shape != parameter.shape:
                raise ValueError(f"{name}: this rank has {tuple(parameter.shape)}, its part is {tuple(tensor.shape)}")
            yield name, parameter, tensor


def load_shards(full: dict[str, torch.Tensor], model: MimoModel) -> None:
    """Replace this rank's weights by its parts of the single-process weights `full`."""
    with torch.no_grad():
        for _, parameter, part in matching_shards(model, full):
            parameter.copy_(part)


def _global_layer(name: str, first_layer: int) -> str:
    """The parameter's name with the layer's number in the whole module instead of in this pipeline stage."""
    marker = "decoder.layers."
    if first_layer == 0 or not name.startswith(marker):
        return name
    number, _, rest = name[len(marker) :].partition(".")
    return f"{marker}{int(number) + first_layer}.{rest}"


def _tp_rank(module: torch.nn.Module, prefix: str, parts: int) -> int:
    holder = module if prefix == "language_model" else module.encoders[ENCODER].decoder
    group = holder.pg_collection.tp
    if group.size() != parts:
        raise ValueError(f"{prefix} is split in {parts}, but its tensor-parallel group has {group.size()} ranks")
    return group.rank()
