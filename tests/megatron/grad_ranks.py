"""Train a case of the gradient check on real ranks, as a program does: provider, DDP, schedule, bridge, optimizer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import grad_reference
import tiny_mimo
import torch
import torch.distributed as dist
from exchange import all_gather_json
from grad_cases import STEPS, TOKENS, Case, is_frozen, lane, microbatch, modality_inputs, specs

TIMEOUT_S = 60.0


@dataclass
class Difference:
    """How far the ranks' weights are from the reference's after training.

    Attributes:
        weight: largest absolute difference within a tensor over the largest absolute value of that tensor.
        change: the same over the largest absolute change of the tensor by training.
        norm: relative difference of the gradients' norm at any step; 0 for optimizers that do not tell it.
        worst: the parameter with the largest `weight`.
        seen: names of the compared parameters.
    """

    weight: float = 0.0
    change: float = 0.0
    norm: float = 0.0
    worst: str = ""
    seen: frozenset[str] = frozenset()


def compare_on_ranks(case: Case, expected: grad_reference.Trained, rank: int, rendezvous: str) -> Difference:
    """Train `case` on the ranks of a new default process group and compare the weights. Collective."""
    os.environ.update(WORLD_SIZE=str(case.world_size), RANK=str(rank))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=case.world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    import mimo_ext.megatron as mimo

    with mimo.cpu():
        ranks = Ranks(case, expected.initial)
        norms = [ranks.step(step) for step in range(STEPS)]
        mine = difference(case, ranks.model, expected, norms)
        ranks.close()
    everyone = [Difference(**found) for found in all_gather_json(asdict(mine) | {"seen": sorted(mine.seen)})]
    dist.barrier()
    dist.destroy_process_group()
    worst = max(everyone, key=lambda d: d.weight)
    return Difference(
        worst.weight,
        max(d.change for d in everyone),
        max(d.norm for d in everyone),
        worst.worst,
        frozenset().union(*(d.seen for d in everyone)),
    )


class Ranks:
    """The model, the communicator and the optimizer of this rank. Collective."""

    def __init__(self, case: Case, weights: dict[str, torch.Tensor]) -> None:
        from megatron.core.distributed import DistributedDataParallelConfig
        from megatron.core.utils import get_model_config

        from mimo_ext.megatron import cpu, parallel_utils

        self.case = case
        provider = build_provider(case)
        self.infra = provider.get_or_build_infra()
        self.groups = {name: groups for name, groups in self.infra.pg_collections.items() if groups is not None}
        cpu.manual_seed(1234, next(iter(self.groups.values())))
        [self.model] = provider.provide_distributed_model(
            DistributedDataParallelConfig(
                use_distributed_optimizer=case.optimizer == "mimo distributed", overlap_grad_reduce=case.overlap
            ),
            pre_wrap_hook=partial(load, weights),
        )
        config = self.config = get_model_config(self.model)
        self.pairs = parallel_utils.get_module_to_grid_tuple(self.model, self.infra)
        config.no_sync_func = partial(parallel_utils.multimodule_no_sync, module_to_grid_tuple=self.pairs)
        self.finalize = partial(
            parallel_utils.finalize_model_grads_multimodule, infra=self.infra, module_to_grid_tuple=self.pairs
        )
        config.finalize_model_grads_func = self.finalize
        self.communicator: Any = None
        if not case.colocated:
            from mimo_ext.megatron import MultiModulePipelineCommunicator

            self.communicator = MultiModulePipelineCommunicator(
                self.infra.module_to_grid_map,
                self.infra.topology,
                config,
                module_output_ndim=self.infra.module_output_ndim,
                timeout=timedelta(seconds=TIMEOUT_S),
                device="cpu",
                model=self.model,
            )
        self.update = self._megatrons_update() if "mimo" in case.optimizer else self._torchs_update()

    def step(self, step: int) -> float | None:
        """Train one step; returns the norm of all gradients where the optimizer tells it."""
        from megatron.core.pipeline_parallel import schedules

        from mimo_ext.megatron import parallel_utils

        case = self.case
        parallel_utils.zero_grad_buffer_for_multimodule(self.pairs)
        arguments: dict[str, Any] = {
            "forward_step_func": self._forward,
            "data_iterator": iter([microbatch(case, step, index) for index in range(case.microbatches)]),
            "model": [self.model],
            "num_microbatches": case.microbatches,
            "seq_length": tiny_mimo.SEQ,
            "micro_batch_size": lane(0, 1).stop,
            "forward_only": False,
        }
        if case.colocated:
            schedules.forward_backward_no_pipelining(**arguments, pg_collection=self.groups["language"])
        else:
            schedules.forward_backward_pipelining_without_interleaving(
                **arguments,
                p2p_communicator=self.communicator,
                pg_collection=parallel_utils.build_pg_collection_for_schedule(self.infra),
            )
        return self.update()

    def close(self) -> None:
        """End the transfers; collective."""
        from mimo_ext.megatron.parallel_utils import unwrap_megatron_mimo_model

        if self.communicator is not None:
            self.communicator.close()
        unwrap_megatron_mimo_model(self.model).close()

    def _forward(self, batches: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Callable[..., Any]]:
        case, data = self.case, next(batches)
        arguments: dict[str, Any] = {"modality_inputs": {}}
        for name, groups in self.groups.items():  # the language model's samples are the last word on ids
            samples = lane(groups.dp.rank(), groups.dp.size())
            arguments["input_ids"] = data["ids"][samples]
            if name == "language":
                arguments["position_ids"] = torch.arange(tiny_mimo.SEQ).expand_as(arguments["input_ids"])
                if groups.pp.rank() == groups.pp.size() - 1:
                    arguments.update(labels=data["labels"][samples], loss_mask=data["loss_mask"][samples])
            elif groups.pp.rank() == 0:
                arguments["modality_inputs"] |= modality_inputs(case, data, samples, [name])
        arguments["modality_inputs"] = arguments["modality_inputs"] or None
        output, loss_mask = model(**arguments)
        return output, partial(self._loss, loss_mask)

    def _loss(self, mask: torch.Tensor, losses: torch.Tensor) -> tuple[Any, ...]:
        # The model has cut the mask as it cut the tokens: to this context-parallel rank's part.
        total, tokens = (losses * mask).sum(), mask.sum()
        if not self.case.mean_by_lane:
            return total, tokens.int(), {}
        dist.all_reduce(tokens, group=self.groups["language"].cp)
        return total / tokens.clamp(min=1.0), {}

    def _torchs_update(self) -> Callable[[], float | None]:
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        optimizer = grad_reference.make_optimizer(self.case, parameters) if parameters else None

        def update() -> None:
            if optimizer is None:
                return
            for parameter in parameters.values():
                parameter.grad = parameter.main_grad
            optimizer.step()
            optimizer.zero_grad()

        return update

    def _megatrons_update(self) -> Callable[[], float | None]:
        from megatron.core.models.mimo.optimizer import get_mimo_optimizer
        from megatron.core.optimizer import OptimizerConfig

        kind = "sgd" if "sgd" in self.case.optimizer else "adam"
        optimizer = get_mimo_optimizer(
            self.model,
            OptimizerConfig(
                optimizer=kind,
                lr=grad_reference.LEARNING_RATE[kind],
                weight_decay=grad_reference.WEIGHT_DECAY if kind == "adam" else 0.0,
                adam_beta1=grad_reference.BETAS[0],
                adam_beta2=grad_reference.BETAS[1],
                adam_eps=grad_reference.EPS,
                sgd_momentum=grad_reference.MOMENTUM,
                clip_grad=self.case.clip,
                params_dtype=torch.float32,
                use_distributed_optimizer=self.case.optimizer == "mimo distributed",
            ),
        )
        if self.case.folded:
            from mimo_ext.megatron.folding import FoldedMimoOptimizer

            optimizer = FoldedMimoOptimizer(optimizer)
            self.config.finalize_model_grads_func = partial(self.finalize, fold_into=optimizer)
        for group in optimizer.param_groups:  # as the scheduler of a training loop does
            group["weight_decay"] *= group["wd_mult"]
        self.config.grad_scale_func = optimizer.scale_loss

        def update() -> float | None:
            success, norm, _ = optimizer.step()
            if not success:
                raise RuntimeError(f"rank {dist.get_rank()}: the gradients are not finite")
            optimizer.zero_grad()
            return norm

        return update


def build_provider(case: Case) -> Any:
    from mimo_ext.megatron.config import MimoParallelismConfig
    from mimo_ext.megatron.cpu_layers import get_gpt_layer_local_spec
    from mimo_ext.megatron.provider import MimoModelProvider

    language, encoders = specs(case, get_gpt_layer_local_spec())
    offset, sizes = 0, {}
    for name, dims in (case.encoders | {"language": case.language}).items():
        sizes[name] = tiny_mimo.module_sizes(dims, 0 if case.colocated else offset)
        offset += sizes[name].total_ranks
    return MimoModelProvider(
        language,
        encoders,
        {name: TOKENS[name] for name in encoders},
        MimoParallelismConfig(sizes),
        bf16=False,
        freeze_language_model="language" in case.frozen,
        freeze_modality_encoders=dict.fromkeys(encoders, "encoders" in case.frozen),
        freeze_modality_projections=dict.fromkeys(encoders, "projections" in case.frozen),
    )


def load(weights: dict[str, torch.Tensor], models: list[Any]) -> list[Any]:
    """Replace this rank's initial weights by its parts of the reference's."""
    with torch.no_grad():
        for _, parameter, part in shards(models[0], weights):
            parameter.copy_(part)
    return models


def shards(model: Any, full: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.nn.Parameter, torch.Tensor]]:
    """Each parameter of this rank that takes part, with its name in the whole model and its part of that tensor."""
    from megatron.core.utils import unwrap_model

    language = unwrap_model(model.language_model) if model.language_model is not None else None
    for name, parameter in model.named_parameters():
        name = name.replace(".module.", ".", 1)
        if name.startswith("language_model."):
            group = language.pg_collection.tp
            first = language.decoder.layers[0].layer_number - 1
            marker = "language_model.decoder.layers."
            if name.startswith(marker):
                number, _, rest = name.removeprefix(marker).partition(".")
                name = f"{marker}{int(number) + first}.{rest}"
            if name == "language_model.output_layer.weight" and name not in full:
                name = "language_model.embedding.word_embeddings.weight"  # tied
        else:
            modality = name.split(".")[1]
            submodule = unwrap_model(model.modality_submodules[modality])
            if not submodule.is_first_stage and ".encoders." in name:
                continue  # Megatron builds the encoder on later stages too, and runs it on none
            group = submodule.encoders["clip"].pg_collection.tp
        whole = full[name]
        if getattr(parameter, "tensor_model_parallel", False) and group.size() > 1:
            whole = whole.chunk(group.size(), dim=parameter.partition_dim)[group.rank()]
        if whole.shape != parameter.shape:
            raise ValueError(f"{name}: this rank has {tuple(parameter.shape)}, its part is {tuple(whole.shape)}")
        yield name, parameter, whole


def difference(case: Case, model: Any, expected: grad_reference.Trained, norms: list[float | None]) -> Difference:
    """This rank's weights against its parts of the reference's."""
    found = Difference()
    seen = set()
    initial = {name: part for name, _, part in shards(model, expected.initial)}
    for name, parameter, part in shards(model, expected.final):
        seen.add(name)
        if is_frozen(case, name):
            if not torch.equal(parameter, initial[name]):
                raise AssertionError(f"rank {dist.get_rank()}: {name} is frozen and has changed")
            continue
        error = float((parameter.detach() - part).abs().max())
        if not math.isfinite(error):
            raise AssertionError(f"rank {dist.get_rank()}: {name} is not finite")
        # Relative to the whole tensor: a shard's own largest value depends on the layout.
        largest = float(expected.final[name].abs().max())
        moved = float((expected.final[name] - expected.initial[name]).abs().max())
        if error / largest >= found.weight:
            found.weight, found.worst = error / largest, name
        found.change = max(found.change, error / moved if moved else error)
    for norm, reference in zip(norms, expected.norms, strict=True):
        if norm is not None:
            if not math.isfinite(norm):
                raise AssertionError(f"rank {dist.get_rank()}: the norm of the gradients is {norm}")
            found.norm = max(found.norm, abs(norm - reference) / max(reference, 1e-30))
    found.seen = frozenset(seen)
    return found
