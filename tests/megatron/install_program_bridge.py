"""A training script for Megatron-Bridge: the model of install_program.py, set up as `setup_megatron_mimo` does it."""

import argparse
import json
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from install_program import (
    ENCODER,
    IMAGE_TOKEN,
    IMAGES,
    LANGUAGE,
    MICROBATCHES,
    SEQ,
    RowEncoder,
    fill,
    forward_step,
    language_params,
    make_config,
    microbatch,
    sizes,
)
from megatron.bridge.models.megatron_mimo.build_model import build_megatron_mimo_model
from megatron.bridge.models.megatron_mimo.megatron_mimo_config import (
    MegatronMIMOParallelismConfig,
    ModuleParallelismConfig,
)
from megatron.bridge.models.megatron_mimo.megatron_mimo_provider import MegatronMIMOProvider
from megatron.bridge.training.megatron_mimo_parallel_utils import (
    build_pg_collection_for_schedule,
    finalize_model_grads_multimodule,
    get_module_to_grid_tuple,
    multimodule_no_sync,
    unwrap_megatron_mimo_model,
    zero_grad_buffer_for_multimodule,
)
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo.optimizer import get_mimo_optimizer
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import get_model_config


def module_sizes(dims: dict[str, int], rank_offset: int) -> ModuleParallelismConfig:
    return ModuleParallelismConfig(
        tensor_model_parallel_size=dims.get("tp", 1),
        pipeline_model_parallel_size=dims.get("pp", 1),
        data_parallel_size=dims.get("dp", 1),
        rank_offset=rank_offset,
    )


def make_provider(encoder: dict[str, int], language: dict[str, int]) -> MegatronMIMOProvider:
    config = make_config()
    encoders = {ENCODER: ModuleSpec(module=RowEncoder, params={"config": config})}
    images = ModuleSpec(module=VisionModalitySubmodules, params={}, submodules={"encoders": encoders})
    modules = {IMAGES: module_sizes(encoder, 0)}
    modules[LANGUAGE] = module_sizes(language, modules[IMAGES].total_ranks)
    return MegatronMIMOProvider(
        language_model_spec=ModuleSpec(module=GPTModel, params=language_params(config)),
        modality_submodules_spec={IMAGES: images},
        special_token_ids={IMAGES: IMAGE_TOKEN},
        megatron_mimo_parallelism_config=MegatronMIMOParallelismConfig(modules),
        fp16=False,
        bf16=False,
    )


def train(options: argparse.Namespace) -> dict:
    provider = make_provider(sizes(options.encoder), sizes(options.language))
    ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
    model, infra = build_megatron_mimo_model(provider, ddp_config=ddp_config, fp16=False, bf16=False)
    unwrapped = unwrap_megatron_mimo_model(model)
    for name, parameter in unwrapped.named_parameters():
        fill(parameter, name.replace(".module.", "."))

    config = get_model_config(model)
    communicator = MultiModulePipelineCommunicator(
        infra.module_to_grid_map,
        infra.topology,
        config,
        dim_mapping={"s": 0, "b": 1, "h": 2},
        module_output_ndim=infra.module_output_ndim,
    )
    collection = build_pg_collection_for_schedule(infra)
    pairs = get_module_to_grid_tuple(model, infra)
    optimizer_config = OptimizerConfig(optimizer="adam", lr=options.lr, clip_grad=1.0, params_dtype=torch.float32)
    optimizer = get_mimo_optimizer(unwrapped, optimizer_config)
    config.no_sync_func = partial(multimodule_no_sync, module_to_grid_tuple=pairs)
    config.finalize_model_grads_func = partial(
        finalize_model_grads_multimodule, infra=infra, module_to_grid_tuple=pairs
    )
    config.grad_scale_func = optimizer.scale_loss
    assert config.variable_seq_lengths

    [name] = infra.participating_modules
    lanes = infra.pg_collections[name].dp
    losses, norms = [], []
    for _ in range(options.steps):
        zero_grad_buffer_for_multimodule(pairs)
        optimizer.zero_grad()
        batches = [microbatch(m, lanes.rank(), lanes.size(), options.ragged) for m in range(MICROBATCHES)]
        reduced = forward_backward_pipelining_without_interleaving(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[unwrapped],
            num_microbatches=MICROBATCHES,
            seq_length=SEQ,
            micro_batch_size=6,
            forward_only=False,
            p2p_communicator=communicator,
            pg_collection=collection,
        )
        successful, norm, _ = optimizer.step()
        assert successful
        norms.append(float(norm))
        sums = torch.zeros(2)
        for entry in reduced if communicator.is_pp_last_stage else []:
            sums += entry["sums"]
        dist.all_reduce(sums)
        losses.append(float(sums[0] / sums[1]))
    weights = {name: float(p.detach().double().square().sum()) for name, p in unwrapped.named_parameters()}
    return {
        "losses": losses,
        "weights": weights | {f"norm {step}": norm for step, norm in enumerate(norms)},
        "communicator": type(communicator).__module__,
        "provider": type(provider).__module__,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--encoder", default="dp=1")
    parser.add_argument("--language", default="dp=2")
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result = train(options)
    (options.out / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
