"""What training must give, by definition: megatron-core's whole model in one process, with plain autograd.

No schedule, DDP, bridge or finalization takes part; the optimizers are torch's. The loss of a step is

* per token: the sum of the losses of all tokens of the step over their number N (no gradient where N is 0);
* otherwise: the mean, over microbatches and over the ranks (data-parallel x context-parallel) that compute the loss, of
  each rank's mean over its own tokens; a rank without tokens has a mean of 0. With `mean_by_lane` the mean is over
  microbatches and lanes (data-parallel) of each lane's mean over its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny_mimo
import torch
import torch.distributed as dist
from grad_cases import STEPS, TOKENS, Case, is_frozen, lane, microbatch, modality_inputs, specs

LEARNING_RATE = {"sgd": 0.3, "adam": 1e-2}
MOMENTUM = 0.9
BETAS = (0.9, 0.99)
# Larger than Adam's default of 1e-8: with it the noise in a gradient that is zero but for rounding (the bias of the
# keys: softmax does not see it) would move the weight as far as a real gradient does.
EPS = 1e-3
WEIGHT_DECAY = 0.01


@dataclass
class Trained:
    """Weights by name before and after training, and the norm of all gradients at each step."""

    initial: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]
    norms: list[float]

    def save(self, path: Path) -> None:
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> Trained:
        return cls(**torch.load(path, weights_only=True))


def reference(case: Case) -> Trained:
    """Train the whole model. Needs a default process group of one rank."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.mimo import MimoModel, MimoModelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection

    import mimo_ext.megatron as mimo

    whole = SimpleNamespace(**vars(case))
    whole.language, whole.sequence_parallel = {}, False
    with mimo.cpu():
        mimo.cpu.manual_seed(7)
        language, encoders = specs(whole, get_gpt_layer_local_spec())
        names = ProcessGroupCollection.__dataclass_fields__
        groups = ProcessGroupCollection(**{n: dist.group.WORLD for n in names if not n.startswith("hcp")})
        language.params["pg_collection"] = groups
        for spec in encoders.values():
            spec.submodules["encoders"]["clip"].params["pg_collection"] = groups
            spec.submodules["input_projections"][0].params["tp_group"] = groups.tp
        model = MimoModel(MimoModelConfig(language, encoders, {name: TOKENS[name] for name in encoders}))
        parameters = dict(model.named_parameters())
        generator = torch.Generator().manual_seed(5)
        for name, parameter in parameters.items():
            # As large as it takes for signals and gradients to get through a model this narrow; norms and biases start
            # from other values than 1 and 0.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 0.2 * noise if parameter.ndim > 1 else parameter.data + 0.1 * noise
            parameter.requires_grad = not is_frozen(case, name)
        initial = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        optimizer = make_optimizer(case, trained)
        norms = []
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of_step(case, model, step).backward()
            norms.append(clip(case, list(trained.values())))
            optimizer.step()
        return Trained(initial, {name: parameter.detach() for name, parameter in parameters.items()}, norms)


def loss_of_step(case: Case, model: Any, step: int) -> torch.Tensor:
    """The one number whose gradient a step descends."""
    batches = [microbatch(case, step, index) for index in range(case.microbatches)]
    losses = []
    for data in batches:
        everything = lane(0, 1)
        output, _ = model(
            input_ids=data["ids"],
            position_ids=torch.arange(tiny_mimo.SEQ).expand_as(data["ids"]),
            labels=data["labels"],
            modality_inputs=modality_inputs(case, data, everything, list(case.encoders)),
        )
        losses.append(output * data["loss_mask"])
    if case.language_per_token:
        number = sum(float(data["loss_mask"].sum()) for data in batches)
        return torch.stack([loss.sum() for loss in losses]).sum() / max(number, 1.0)
    lanes = case.language.get("dp", 1)
    parts = [slice(None)] if case.mean_by_lane else chunks(case.language.get("cp", 1))
    means = []
    for loss, data in zip(losses, batches, strict=True):
        for index in range(lanes):
            for part in parts:
                own, mask = loss[lane(index, lanes)][:, part], data["loss_mask"][lane(index, lanes)][:, part]
                means.append(own.sum() / mask.sum().clamp(min=1.0))
    return torch.stack(means).mean()


def chunks(cp: int) -> list[Any]:
    """Positions of each context-parallel rank: chunks r and 2 cp - 1 - r of 2 cp equal ones."""
    width = tiny_mimo.SEQ // (2 * cp)
    pieces = [list(range(start, start + width)) for start in range(0, tiny_mimo.SEQ, width)]
    return [pieces[rank] + pieces[2 * cp - 1 - rank] for rank in range(cp)]


def make_optimizer(case: Case, parameters: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """torch's optimizer of a case; biases and norms do not decay. Also the one of the ranks without Megatron's."""
    if "sgd" in case.optimizer:
        return torch.optim.SGD(parameters.values(), lr=LEARNING_RATE["sgd"], momentum=MOMENTUM)
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=LEARNING_RATE["adam"], betas=BETAS, eps=EPS)


def clip(case: Case, parameters: list[torch.nn.Parameter]) -> float:
    """Scale the gradients so that their common 2-norm is at most `case.clip`; returns the norm before."""
    norm = float(torch.stack([p.grad.double().square().sum() for p in parameters]).sum().sqrt())
    if case.clip and norm > case.clip:
        for parameter in parameters:
            parameter.grad *= case.clip / (norm + 1e-6)  # Megatron's guard against a division by zero
    return norm
