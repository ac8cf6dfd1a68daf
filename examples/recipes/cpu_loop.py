"""Pre-training on the CPU by a recipe's config: what Megatron-Bridge's `pretrain_megatron_mimo` does on GPUs.

Set-up and loop follow the same steps with the same objects, so that a recipe can be tried on a laptop: finalize,
grids and groups, model with DDP per module, communicator, optimizer, gradient hooks, 1F1B. Checkpoints, validation and
logging are left to Megatron-Bridge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.mimo.optimizer import get_mimo_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from megatron.core.utils import get_model_config

from mimo_ext.megatron import cpu
from mimo_ext.megatron.communicator import MultiModulePipelineCommunicator
from mimo_ext.megatron.overlap import overlapped
from mimo_ext.megatron.parallel_utils import (
    build_pg_collection_for_schedule,
    finalize_model_grads_multimodule,
    get_module_to_grid_tuple,
    multimodule_no_sync,
    validate_data_loader_contract,
    validate_no_stub_ranks,
    zero_grad_buffer_for_multimodule,
)


def pretrain_rank(cfg: Any, forward_step_func: Callable, build_data_iterators_fn: Callable) -> Iterator[float]:
    """`pretrain` on one rank of a torchrun job: with the CPU switch and a gloo process group."""
    torch.set_num_threads(1)
    with cpu():
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        yield from pretrain(cfg, forward_step_func, build_data_iterators_fn)
        dist.barrier()
        dist.destroy_process_group()


def pretrain(cfg: Any, forward_step_func: Callable, build_data_iterators_fn: Callable) -> Iterator[float]:
    """Train `cfg.train.train_iters` steps; yields the mean loss per token of each. Collective over the world.

    To be called under `mimo_ext.megatron.cpu()`, with the default process group there.

    Args:
        cfg: config of a recipe; its model is a `MegatronMIMOProvider` of modules on ranks of their own.
        forward_step_func: `(data_iterator, model) -> (output, loss function)`.
        build_data_iterators_fn: `(cfg, infra) -> (training iterator, validation iterator or None)`.
    """
    infra, model = build_model(cfg)
    config = get_model_config(model)
    microbatches = cfg.train.global_batch_size // cfg.train.micro_batch_size
    validate_data_loader_contract(infra, cfg.train.global_batch_size, cfg.train.micro_batch_size, microbatches)
    pairs = get_module_to_grid_tuple(model, infra)
    pg_collection = build_pg_collection_for_schedule(infra)
    optimizer = get_mimo_optimizer(model, cfg.optimizer)
    scheduler = _scheduler(cfg, optimizer)
    config.no_sync_func = partial(multimodule_no_sync, module_to_grid_tuple=pairs)
    config.finalize_model_grads_func = partial(
        finalize_model_grads_multimodule, infra=infra, module_to_grid_tuple=pairs
    )
    config.grad_scale_func = optimizer.scale_loss
    data, _ = build_data_iterators_fn(cfg, infra)
    schedule = overlapped(forward_backward_pipelining_without_interleaving)  # transfers run while the ranks compute
    with MultiModulePipelineCommunicator(
        infra.module_to_grid_map,
        infra.topology,
        config,
        dim_mapping={"s": 0, "b": 1, "h": 2},
        module_output_ndim=infra.module_output_ndim,
        model=model,
    ) as communicator:
        for _ in range(cfg.train.train_iters):
            zero_grad_buffer_for_multimodule(pairs)
            optimizer.zero_grad()
            losses = schedule(
                forward_step_func=forward_step_func,
                data_iterator=data,
                model=model,
                num_microbatches=microbatches,
                seq_length=1,  # shapes travel with the tensors
                micro_batch_size=cfg.train.micro_batch_size,
                forward_only=False,
                p2p_communicator=communicator,
                pg_collection=pg_collection,
            )
            successful, _, _ = optimizer.step()
            if not successful:
                raise RuntimeError(f"rank {dist.get_rank()}: the gradients are not finite")
            scheduler.step(increment=1)
            yield _mean_loss(losses if communicator.is_pp_last_stage else [], pg_collection)


def build_model(cfg: Any) -> tuple[Any, Any]:
    """(infrastructure, model with DDP) of this rank; collective."""
    provider = cfg.model
    provider.finalize()
    infra = provider.build_infra()
    validate_no_stub_ranks(infra.module_to_grid_map, dist.get_world_size())
    (name,) = infra.participating_modules
    cpu.manual_seed(cfg.rng.seed, infra.pg_collections[name])
    [model] = provider.provide_distributed_model(ddp_config=cfg.ddp)
    return infra, model


def _scheduler(cfg: Any, optimizer: Any) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=cfg.optimizer.lr,
        min_lr=cfg.optimizer.min_lr,
        lr_warmup_steps=cfg.scheduler.lr_warmup_iters,
        lr_decay_steps=cfg.scheduler.lr_decay_iters,
        lr_decay_style=cfg.scheduler.lr_decay_style,
        start_wd=cfg.scheduler.start_weight_decay,
        end_wd=cfg.scheduler.end_weight_decay,
        wd_incr_steps=cfg.train.train_iters,
        wd_incr_style=cfg.scheduler.weight_decay_incr_style,
    )


def _mean_loss(losses: list[dict[str, torch.Tensor]], pg_collection: Any) -> float:
    """Mean over the loss tokens of all microbatches and lanes, on every rank."""
    sums = torch.zeros(2, dtype=torch.float64)
    # The tensor-parallel ranks hold the same losses: one of them speaks.
    if losses and pg_collection.get_language_model_collection().tp.rank() == 0:
        sums += torch.stack([loss["lm loss"] for loss in losses]).double().sum(0)
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])
