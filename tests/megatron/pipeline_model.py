"""A small multi-module model, run under 1F1B over a communicator on some ranks, and the same in one process.

Encoders (2-D outputs, ragged rows per sample) feed decoders (3-D outputs); all have one weight vector per pipeline
stage. Every sample, and every row within a sample, weighs differently in the loss, so that a row in the wrong place
changes both losses and gradients. Samples do not mix: the gradient of a rank is that of the samples of its lane.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import backward_step_multimodule, deallocate_output_tensor

HIDDEN = 6
DTYPE = torch.float64
AXES = {"s": 0, "b": 1, "h": 2}  # of the 3-D tensors
CONFIG = SimpleNamespace(pipeline_dtype=DTYPE, grad_scale_func=None, deallocate_pipeline_outputs=True, timers=None)


@dataclass
class Grid:
    """What the communicator may rely on, and no more."""

    rank_offset: int
    shape: list[int]
    dim_names: list[str]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = 1
        for extent in self.shape:
            self.size *= extent

    def coordinate(self, rank: int, dim: str) -> int:
        index = rank - self.rank_offset
        for name, extent in zip(self.dim_names, self.shape, strict=True):
            if name == dim:
                return index % extent
            index //= extent
        return 0

    def extent(self, dim: str) -> int:
        return dict(zip(self.dim_names, self.shape, strict=True)).get(dim, 1)

    def __contains__(self, rank: int) -> bool:
        return self.rank_offset <= rank < self.rank_offset + self.size


def grid(rank_offset: int, **dims: int) -> Grid:
    """`grid(4, tp=2, dp=2)`: the first dim varies fastest."""
    return Grid(rank_offset, list(dims.values()), list(dims))


@dataclass
class Case:
    """A model and its data: `rows[encoder][microbatch]` are the rows of each sample of the global microbatch."""

    name: str
    grids: dict[str, Grid]
    topology: dict[str, list[str]]
    rows: dict[str, list[list[int]]]
    counts_from: str = "tensor"  # where row counts come from: "tensor", "model", "argument" or "nowhere" (even split)

    @property
    def world_size(self) -> int:
        return max(g.rank_offset + g.size for g in self.grids.values())

    @property
    def num_microbatches(self) -> int:
        return len(next(iter(self.rows.values())))

    @property
    def output_ndim(self) -> dict[str, int]:
        return dict.fromkeys(self.rows, 2)

    def samples(self, module: str, rank: int, microbatch: int) -> range:
        total = len(next(iter(self.rows.values()))[microbatch])
        lanes, lane = self.grids[module].extent("dp"), self.grids[module].coordinate(rank, "dp")
        return range(lane * total // lanes, (lane + 1) * total // lanes)


def ragged(num_microbatches: int, batch: int, seed: int, zeros: bool = True) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    low = 0 if zeros else 1
    return torch.randint(low, 5, (num_microbatches, batch), generator=generator).tolist()


def weight(module: str, stage: int) -> torch.Tensor:
    seed = sum(map(ord, module)) * 31 + stage
    return torch.empty(HIDDEN, dtype=DTYPE).uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))


def encoder_input(encoder: str, microbatch: int, sample: int, rows: int) -> torch.Tensor:
    seed = sum(map(ord, encoder)) * 1009 + microbatch * 101 + sample
    return torch.empty(rows, HIDDEN, dtype=DTYPE).normal_(generator=torch.Generator().manual_seed(seed))


def pool(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """[R, h] -> [b, h]; the rows of a sample weigh differently."""
    parts = rows.split(counts)
    return torch.stack([(p * torch.arange(1, len(p) + 1, dtype=p.dtype)[:, None]).sum(0) for p in parts])


class Stage:
    """One pipeline stage of one module, for the samples of one lane."""

    def __init__(self, case: Case, module: str, stage: int) -> None:
        self.case, self.module, self.stage = case, module, stage
        self.weight = torch.nn.Parameter(weight(module, stage))
        self.is_encoder = module in case.rows
        self.is_last = stage == case.grids[module].extent("pp") - 1

    def __call__(self, inputs: dict[str, torch.Tensor], microbatch: int, samples: range) -> torch.Tensor:
        return torch.tanh(self._gather(inputs, microbatch, samples) * self.weight)

    def _gather(self, inputs: dict[str, torch.Tensor], microbatch: int, samples: range) -> torch.Tensor:
        if self.stage > 0:
            return inputs[self.module]
        if self.is_encoder:
            counts = self.case.rows[self.module][microbatch]
            return torch.cat([encoder_input(self.module, microbatch, s, counts[s]) for s in samples])
        hidden = torch.zeros(len(samples), HIDDEN, dtype=DTYPE)
        for source, destinations in self.case.topology.items():
            if self.module not in destinations:
                continue
            if source in self.case.rows:
                counts = self.case.rows[source][microbatch]
                hidden = hidden + pool(inputs[source], [counts[s] for s in samples])
            else:
                hidden = hidden + inputs[source].sum(0)
        return torch.stack([hidden, 2 * hidden])  # [2, b, h]

    def loss(
        self, output: torch.Tensor, microbatch: int, samples: range, cp: int = 1, cp_rank: int = 0
    ) -> torch.Tensor:
        """Each cp rank takes its share of the positions, as a context-parallel model would."""
        weights = torch.tensor([1.0 + s + 10 * microbatch for s in samples], dtype=DTYPE)
        share = torch.tensor([float(h % cp == cp_rank) for h in range(HIDDEN)], dtype=DTYPE)
        return (output * weights[:, None] * share).sum()


def train_rank(communicator: Any, case: Case, rank: int, forward_only: bool = False) -> dict[str, Any]:
    """Run 1F1B as Megatron's schedule does. Returns the weight gradient of each module of this rank, and the losses."""
    stages = {
        name: Stage(case, name, grid_.coordinate(rank, "pp")) for name, grid_ in case.grids.items() if rank in grid_
    }
    if not stages:
        return {"grads": {}, "losses": []}
    model = SimpleNamespace(row_counts={name: deque() for name in case.rows})
    if case.counts_from == "model":
        communicator.bind(model)
    sending: dict[str, Any] = {}  # options of the next send
    losses: list[float] = []
    first, last = communicator.is_pp_first_stage, communicator.is_pp_last_stage
    started = 0

    def forward(inputs: dict[str, torch.Tensor]) -> Any:
        nonlocal started
        microbatch, started = started, started + 1
        outputs: Any = {}
        for name, stage in stages.items():
            samples = case.samples(name, rank, microbatch)
            output = stage(inputs, microbatch, samples)
            if last and stage.is_last and not case.topology[name]:
                grid_ = case.grids[name]
                loss = stage.loss(output, microbatch, samples, grid_.extent("cp"), grid_.coordinate(rank, "cp"))
                losses.append(loss.item())
                return loss
            if stage.is_encoder:
                counts = [case.rows[name][microbatch][s] for s in samples]
                if case.counts_from == "tensor":
                    output._mimo_bridge_split_sizes = counts
                elif case.counts_from == "model":
                    model.row_counts[name].append(counts)
                elif case.counts_from == "argument":
                    sending["row_counts"] = {name: counts}
            outputs[name] = output
        return outputs

    if forward_only:
        with torch.no_grad():
            for _ in range(case.num_microbatches):
                inputs = communicator.recv_forward([()], first)
                output = forward(inputs)
                communicator.send_forward(output, last, **sending)
        return {"grads": {}, "losses": losses}

    def backward(inputs: Any, output: Any, grads: Any) -> dict[str, Any]:
        if isinstance(output, torch.Tensor):
            deallocated = SimpleNamespace(**{**vars(CONFIG), "deallocate_pipeline_outputs": False})
            return backward_step_multimodule(inputs, output, grads, deallocated, "language")
        return backward_step_multimodule(inputs, output, grads, CONFIG, "language")

    def free(output: Any) -> None:
        if isinstance(output, dict):
            deallocate_output_tensor(output, True)

    warmup = min(communicator.total_stages - communicator.current_stage - 1, case.num_microbatches)
    remaining = case.num_microbatches - warmup
    saved: list[tuple[Any, Any]] = []
    for _ in range(warmup):
        inputs = communicator.recv_forward([()], first)
        output = forward(inputs)
        communicator.send_forward(output, last, **sending)
        saved.append((inputs, output))
        free(output)
    if remaining:
        inputs = communicator.recv_forward([()], first)
    for i in range(remaining):
        output = forward(inputs)
        grads = communicator.send_forward_recv_backward(output, [()], last, **sending)
        saved.append((inputs, output))
        free(output)
        inputs, output = saved.pop(0)
        input_grads = backward(inputs, output, grads)
        if i == remaining - 1:
            communicator.send_backward(input_grads, first)
        else:
            inputs = communicator.send_backward_recv_forward(input_grads, [()], first)
    for _ in range(warmup):
        inputs, output = saved.pop(0)
        grads = communicator.recv_backward([()], last)
        communicator.send_backward(backward(inputs, output, grads), first)
    return {"grads": {name: stage.weight.grad for name, stage in stages.items()}, "losses": losses}


def check_rank(case: Case, rank: int, result: dict[str, Any], forward_only: bool = False) -> None:
    """Compare what `train_rank` gave with the model run in one process on the samples of the rank's lane."""
    for name, grid_ in case.grids.items():
        if rank not in grid_:
            continue
        stage = grid_.coordinate(rank, "pp")
        weights = {m: [Stage(case, m, s) for s in range(g.extent("pp"))] for m, g in case.grids.items()}
        terminal_losses: list[float] = []
        for microbatch in range(case.num_microbatches):
            samples = case.samples(name, rank, microbatch)
            total = torch.zeros((), dtype=DTYPE)
            outputs: dict[str, torch.Tensor] = {}
            for module in _in_order(case.topology):
                hidden = dict(outputs)
                for part in weights[module]:
                    hidden[module] = part(hidden, microbatch, samples)
                outputs[module] = hidden[module]
                if not case.topology[module]:
                    # A cp rank of the terminal module sees its share; what is upstream of it sees the sum.
                    cp, cp_rank = (grid_.extent("cp"), grid_.coordinate(rank, "cp")) if module == name else (1, 0)
                    loss = weights[module][-1].loss(outputs[module], microbatch, samples, cp, cp_rank)
                    total = total + loss
                    if module == name and stage == grid_.extent("pp") - 1:
                        terminal_losses.append(loss.item())
            if samples and total.requires_grad:
                total.backward()
        if terminal_losses:
            torch.testing.assert_close(result["losses"], terminal_losses)
        if not forward_only:
            expected = weights[name][stage].weight.grad
            got = result["grads"][name]
            torch.testing.assert_close(got, expected, msg=lambda text, n=name: f"rank {rank}, module {n}: {text}")


def _in_order(topology: dict[str, list[str]]) -> list[str]:
    order: list[str] = []
    while len(order) < len(topology):
        for name in topology:
            if name not in order and all(source in order for source, to in topology.items() if name in to):
                order.append(name)
    return order
