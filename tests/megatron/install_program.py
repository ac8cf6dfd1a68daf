"""A training script for Megatron-Core: image rows and text, each module on its own ranks, 1F1B between them.

Started once per rank with the usual environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). It trains a few steps on
made-up data that do not depend on the layout, so that every layout gives the same losses, and writes them and the
squared norms of this rank's weights to ``OUT/rank_N.json``.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY as LANGUAGE
from megatron.core.models.mimo.config.role import ModuleLayout
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from megatron.core.process_groups_config import MultiModuleProcessGroupCollection, ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

IMAGES, ENCODER = "images", "rows"
IMAGE_TOKEN, VOCAB, HIDDEN, FEATURES, SEQ = 30, 32, 16, 6, 8
BATCH, MICROBATCHES, MAX_ROWS = 6, 2, 4
DIMS = ["tp", "cp", "dp", "pp"]


class RowEncoder(MegatronModule):
    """[rows, FEATURES] -> [rows, HIDDEN]."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config)
        self.up = torch.nn.Linear(FEATURES, 2 * HIDDEN)
        self.down = torch.nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def sizes(text: str) -> dict[str, int]:
    """ "dp=2,pp=2" as a dict."""
    return {name: int(size) for name, size in (part.split("=") for part in text.split(","))}


def make_grid(dims: dict[str, int], rank_offset: int) -> HyperCommGrid:
    grid = HyperCommGrid([dims.get(dim, 1) for dim in DIMS], DIMS, rank_offset=rank_offset, backend="nccl")
    pp = dims.get("pp", 1)
    expert_shape = [1, 1, grid.size // pp, pp]
    grid.register_view("expert", shape=expert_shape, dim_names=["expt_tp", "ep", "expt_dp", "pp"], shared_dims=["pp"])
    for names in (["tp"], ["cp"], ["pp"], ["dp"], ["dp", "cp"], ["tp", "cp"], ["tp", "pp"]):
        grid.create_pg(names)
    for names in (["ep"], ["expt_tp"], ["expt_dp"]):
        grid.create_pg(names, view="expert")
    return grid


def groups_of(grid: HyperCommGrid) -> ProcessGroupCollection:
    groups = ProcessGroupCollection(tp=grid.get_pg("tp"), cp=grid.get_pg("cp"), pp=grid.get_pg("pp"))
    groups.dp = grid.get_pg("dp")
    groups.dp_cp = groups.intra_dp_cp = grid.get_pg(["dp", "cp"])
    groups.tp_cp, groups.mp = grid.get_pg(["tp", "cp"]), grid.get_pg(["tp", "pp"])
    groups.ep, groups.expt_tp = grid.get_pg(["ep"], view="expert"), grid.get_pg(["expt_tp"], view="expert")
    groups.expt_dp = groups.intra_expt_dp = grid.get_pg(["expt_dp"], view="expert")
    groups.embd = groups.pos_embd = None
    return groups


def make_config(pp: int = 1) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=pp,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
    )


def language_params(config: TransformerConfig) -> dict:
    return {
        "config": config,
        "transformer_layer_spec": get_gpt_layer_local_spec(),
        "vocab_size": VOCAB,
        "max_sequence_length": SEQ,
        "position_embedding_type": "learned_absolute",
    }


def build_model(grids: dict[str, HyperCommGrid], pp: int) -> MimoModel:
    config = make_config(pp)
    language = language_params(config)
    if grids[LANGUAGE].is_current_rank_in_grid():
        groups = groups_of(grids[LANGUAGE])
        language["pg_collection"] = groups
        language["pre_process"] = groups.pp.rank() == 0
        language["post_process"] = groups.pp.rank() == groups.pp.size() - 1
    encoder = ModuleSpec(module=RowEncoder, params={"config": config})
    mimo_config = MimoModelConfig(
        language_model_spec=ModuleSpec(module=GPTModel, params=language),
        modality_submodules_spec={
            IMAGES: ModuleSpec(module=VisionModalitySubmodules, params={}, submodules={"encoders": {ENCODER: encoder}})
        },
        special_token_ids={IMAGES: IMAGE_TOKEN},
        module_to_grid_map=grids,
    )
    model = MimoModel(mimo_config)
    assert model.role.mode is ModuleLayout.NON_COLOCATED
    assert isinstance(model, MimoModel)
    for name, parameter in model.named_parameters():
        fill(parameter, name.replace("layers.0.", f"layers.{layer_offset(grids, pp)}."))
    return model


def layer_offset(grids: dict[str, HyperCommGrid], pp: int) -> int:
    """Number of the first layer of this rank's pipeline stage."""
    return groups_of(grids[LANGUAGE]).pp.rank() * (2 // pp) if grids[LANGUAGE].is_current_rank_in_grid() else 0


def fill(parameter: torch.nn.Parameter, name: str) -> None:
    """Values that depend on the parameter's name alone."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        parameter.copy_(torch.empty(parameter.shape).normal_(std=0.3, generator=generator))


def microbatch(index: int, lane: int, lanes: int, ragged: bool) -> dict[str, torch.Tensor]:
    """This lane's samples; the image rows are those of its samples."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(0, IMAGE_TOKEN, (BATCH, SEQ), generator=generator)
    counts = torch.randint(0, MAX_ROWS + 1, (BATCH,), generator=generator) if ragged else torch.full((BATCH,), 2)
    for sample, count in enumerate(counts.tolist()):
        ids[sample, 1 : 1 + count] = IMAGE_TOKEN
    rows = torch.randn(BATCH, MAX_ROWS, FEATURES, generator=generator)
    labels = torch.randint(0, IMAGE_TOKEN, (BATCH, SEQ), generator=generator)
    loss_mask = (torch.rand(BATCH, SEQ, generator=generator) < 0.7).float()
    mine = range(lane * BATCH // lanes, (lane + 1) * BATCH // lanes)
    return {
        "ids": ids[mine],
        "labels": labels[mine],
        "loss_mask": loss_mask[mine],
        "rows": torch.cat([rows[sample, : counts[sample]] for sample in mine]),
    }


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    total, tokens = (losses * loss_mask).sum(), loss_mask.sum()
    return total, tokens.int(), {"sums": torch.stack([total.detach(), tokens])}


def forward_step(iterator, model):
    data = next(iterator)
    positions = torch.arange(SEQ).expand(len(data["ids"]), SEQ)
    modality_inputs = {IMAGES: {ENCODER: {"x": data["rows"]}}} if len(data["rows"]) else None
    output, _ = model(
        data["ids"],
        position_ids=positions,
        loss_mask=data["loss_mask"],
        labels=data["labels"],
        modality_inputs=modality_inputs if model.role.has_modality_modules else None,
    )
    return output, partial(loss_func, data["loss_mask"])


def finalize(module, groups, is_language, models, num_tokens, pg_collection=None, **options):
    """Sum of the gradients over the lanes, divided by the tokens of the language model's loss."""
    finalize_model_grads([module], num_tokens if is_language else None, pg_collection=groups)
    dist.broadcast(num_tokens, src=dist.get_world_size() - 1)
    if not is_language:
        module.scale_gradients(1.0 / num_tokens.item())


def train(options: argparse.Namespace) -> dict:
    sizes_of = {IMAGES: sizes(options.encoder), LANGUAGE: sizes(options.language)}
    images = make_grid(sizes_of[IMAGES], 0)
    grids = {IMAGES: images, LANGUAGE: make_grid(sizes_of[LANGUAGE], images.size)}
    name = IMAGES if images.is_current_rank_in_grid() else LANGUAGE
    groups, is_language = groups_of(grids[name]), name == LANGUAGE

    model = build_model(grids, sizes_of[LANGUAGE].get("pp", 1))
    config = model.config
    ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
    wrapped = DistributedDataParallel(
        config=config,
        ddp_config=ddp_config,
        module=model.language_model if is_language else model.modality_submodules[IMAGES],
        pg_collection=groups,
    )
    if is_language:
        wrapped.set_input_tensor = wrapped.module.set_input_tensor
        model.language_model = wrapped
    else:
        model.modality_submodules[IMAGES] = wrapped

    config.variable_seq_lengths = True
    config.no_sync_func = wrapped.no_sync
    config.finalize_model_grads_func = partial(finalize, wrapped, groups, is_language)
    communicator = MultiModulePipelineCommunicator(
        grids,
        {IMAGES: [LANGUAGE], LANGUAGE: []},
        config,
        dim_mapping={"s": 0, "b": 1, "h": 2},
        module_output_ndim={IMAGES: 2, LANGUAGE: 3},
    )
    collection = MultiModuleProcessGroupCollection({name: groups}, LANGUAGE if is_language else None)

    losses = []
    for step in range(options.steps):
        wrapped.zero_grad_buffer()
        lane, lanes = groups.dp.rank(), groups.dp.size()
        batches = [microbatch(m, lane, lanes, options.ragged) for m in range(MICROBATCHES)]
        reduced = forward_backward_pipelining_without_interleaving(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[model],
            num_microbatches=MICROBATCHES,
            seq_length=SEQ,
            micro_batch_size=BATCH,
            forward_only=False,
            p2p_communicator=communicator,
            pg_collection=collection,
        )
        with torch.no_grad():
            for parameter in wrapped.parameters():
                parameter -= options.lr * parameter.main_grad
        sums = torch.zeros(2)
        for entry in reduced if communicator.is_pp_last_stage else []:
            sums += entry["sums"]
        dist.all_reduce(sums)
        losses.append(float(sums[0] / sums[1]))
        if dist.get_rank() == 0:
            print(f"step {step}: loss {losses[-1]:.6f}", flush=True)
    weights = {name: float(p.detach().double().square().sum()) for name, p in model.named_parameters()}
    return {"losses": losses, "weights": weights, "communicator": type(communicator).__module__}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--encoder", default="dp=1")
    parser.add_argument("--language", default="dp=2")
    parser.add_argument("--ragged", action="store_true", help="samples differ in their number of image rows")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    started_here = not dist.is_initialized()
    if started_here:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    result = train(options)
    (options.out / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(result))
    if started_here:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
