"""Real optimizers on real ranks, once with the correction as a pass of its own and once folded into the step.

Gradients are made up rather than computed; they go through DDP's reduction, finalization and Megatron's optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import tiny_mimo
import torch
from launch import launch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STEPS = 2
TOKENS = 37
ULP = 2.0**-23  # of float32, relative


@dataclass(frozen=True)
class Variant:
    """`sizes` of encoder and language model; `factors` expected of them, product of what DDP left over."""

    name: str
    factors: dict[str, float]
    sizes: tuple[dict[str, int], dict[str, int]] = ({"dp": 2}, {})
    colocated: bool = False
    per_token: tuple[bool, bool] = (True, True)  # language, encoder
    kind: str = "sgd"
    clip: float = 0.0
    bf16: bool = False
    loss_scale: float | None = None
    distributed: bool = False
    fused: bool = False
    frozen: dict[str, Any] = field(default_factory=dict)
    ulps: float = 1.0  # by how much gradients differ: roundings of the factor, of the clip coefficient, of its product


ONE, TWO = {"images": 1 / TOKENS, "language": 1 / TOKENS}, {"images": 2 / TOKENS, "language": 1 / TOKENS}
VARIANTS = [
    Variant("sgd", ONE),
    Variant("clipped", TWO, per_token=(True, False), clip=0.3, ulps=6),
    Variant("mean loss", {"images": 2.0, "language": 1.0}, per_token=(False, False), kind="adam"),
    Variant("fused", TWO, per_token=(True, False), kind="adam", fused=True, ulps=2),
    Variant("fused sgd, clipped", ONE, clip=0.3, fused=True, ulps=8),
    Variant("bf16 weights", TWO, per_token=(True, False), kind="adam", bf16=True, clip=0.3, ulps=6),
    Variant("loss scale", TWO, per_token=(True, False), bf16=True, loss_scale=1024.0, ulps=2),
    Variant("distributed", TWO, per_token=(True, False), kind="adam", distributed=True, clip=0.3, ulps=6),
    Variant("distributed bf16", ONE, kind="adam", distributed=True, bf16=True),
    Variant("frozen encoder", ONE, kind="adam", frozen={"freeze_modality_encoders": {"images": True}}),
    Variant("frozen language model", ONE, clip=0.3, frozen={"freeze_language_model": True}, ulps=6),
    Variant(
        "colocated",
        {"images": 3 / TOKENS, "language": 1 / TOKENS},
        sizes=({"dp": 3}, {"dp": 3}),
        colocated=True,
        per_token=(True, False),
        clip=0.3,
        ulps=6,
    ),
]


class Touched(TorchDispatchMode):
    """Notes the ops that read or write given memory."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.read: set[str] = set()
        self.written: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, given in zip(func._schema.arguments, args, strict=False):
            self._note(func, argument, given)
        for argument in func._schema.arguments:
            if argument.name in kwargs:
                self._note(func, argument, kwargs[argument.name])
        return func(*args, **kwargs)

    def _note(self, func: Any, argument: Any, given: Any) -> None:
        tensors = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
        mine = [t for t in tensors if t.untyped_storage().data_ptr() in self.memory and t.numel()]
        if not mine or func.is_view:
            return
        name = func._schema.name
        if argument.alias_info is not None and argument.alias_info.is_write:
            self.written += [name] * len(mine)
        else:
            self.read.add(name)


class Run:
    """Model and optimizer of one variant on this rank."""

    def __init__(self, variant: Variant, folded: bool, prepare: Callable[[Any, Any], None] | None = None) -> None:
        from megatron.core.distributed import DistributedDataParallelConfig
        from megatron.core.models.mimo.optimizer import get_mimo_optimizer
        from megatron.core.optimizer import OptimizerConfig

        from mimo_ext.megatron import cpu
        from mimo_ext.megatron import parallel_utils as utils
        from mimo_ext.megatron.folding import FoldedMimoOptimizer

        self.variant = variant
        encoder, language = variant.sizes
        provider = tiny_mimo.provider(
            encoder,
            language,
            bf16=variant.bf16,
            colocated=variant.colocated,
            language_per_token=variant.per_token[0],
            encoder_per_token=variant.per_token[1],
        )
        for name, value in variant.frozen.items():
            setattr(provider, name, value)
        infra = provider.get_or_build_infra()
        cpu.manual_seed(1234, next(groups for groups in infra.pg_collections.values() if groups is not None))
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=variant.distributed, grad_reduce_in_fp32=True)
        [self.model] = provider.provide_distributed_model(ddp)
        self.pairs = utils.get_module_to_grid_tuple(self.model, infra)
        if prepare is not None:
            prepare(infra, self.pairs)
        self.has_language = infra.pg_collections["language"] is not None
        self.optimizer = get_mimo_optimizer(
            utils.unwrap_megatron_mimo_model(self.model),
            OptimizerConfig(
                optimizer=variant.kind,
                lr=0.1,
                weight_decay=0.0,
                adam_eps=1e-3,
                clip_grad=variant.clip,
                bf16=variant.bf16,
                params_dtype=torch.bfloat16 if variant.bf16 else torch.float32,
                loss_scale=variant.loss_scale,
                use_distributed_optimizer=variant.distributed,
                log_num_zeros_in_grad=True,
            ),
        )
        for group in self.optimizer.param_groups if variant.fused else []:
            group["fused"] = True
        if folded:
            self.optimizer = FoldedMimoOptimizer(self.optimizer)
        self.finalize = partial(
            utils.finalize_model_grads_multimodule,
            [self.model],
            infra=infra,
            module_to_grid_tuple=self.pairs,
            fold_into=self.optimizer if folded else None,
        )
        self.names = {name for name, groups in infra.pg_collections.items() if groups is not None}

    def gradients(self) -> list[torch.Tensor]:
        """The memory of all gradients of this rank."""
        return [buffer.grad_data for module, _ in self.pairs for buffer in module.buffers]

    def backward(self, step: int) -> None:
        """Gradients as a backward pass would leave them: another sum of large numbers on each rank."""
        from torch.distributed import get_rank

        generator = torch.Generator().manual_seed(100 * step + get_rank())
        for module, _ in self.pairs:
            module.zero_grad_buffer()
            for parameter in module.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.main_grad.copy_(noise * (self.variant.loss_scale or 1.0))

    def tokens(self) -> torch.Tensor | None:
        if not self.variant.per_token[0]:
            return None
        dp = self.variant.sizes[1].get("dp", 1)
        return torch.tensor(TOKENS - 2 * (dp - 1) if self.is_first() else 2) if self.has_language else torch.tensor(0)

    def is_first(self) -> bool:
        from torch.distributed import get_rank

        return not self.variant.colocated or get_rank() == 0

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.optimizer_parameters()]

    def optimizer_parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, step: int) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
        """Returns the step's result, and gradients and weights as the optimizer leaves them."""
        self.backward(step)
        self.finalize(self.tokens())
        result = self.optimizer.step()
        gradients = [p.grad.clone() for p in self.optimizer_parameters() if p.grad is not None]
        return result, gradients, self.weights()


def both_ways(rank: int, world_size: int, variants: list[Variant]) -> None:
    import mimo_ext.megatron as mimo

    with mimo.cpu():
        for variant in variants:
            explicit, folded = Run(variant, False), Run(variant, True)
            initial = explicit.weights()
            torch.testing.assert_close(folded.weights(), initial, rtol=0, atol=0)
            trained = False
            for step in range(STEPS):
                expected, gradients, weights = explicit.step(step)
                got, folded_gradients, folded_weights = folded.step(step)
                message = partial("{}, step {}, rank {}: {}".format, variant.name, step, rank)
                assert (got[0], got[2]) == (True, expected[2]), message((got, expected))
                assert expected[1] > 0.01, message(expected)
                assert abs(got[1] - expected[1]) <= 4 * ULP * expected[1], message((got, expected))
                compare = partial(torch.testing.assert_close, atol=0.0, msg=message)
                compare(folded_gradients, gradients, rtol=variant.ulps * ULP)
                torch.testing.assert_close(folded_weights, weights, rtol=1e-6, atol=1e-6, msg=message)
                trained = trained or any(not torch.equal(*pair) for pair in zip(weights, initial, strict=True))
            assert trained == bool(explicit.optimizer_parameters()), message("nothing was trained")
            assert trained or variant.frozen, message("nothing was trained")
            folded.backward(STEPS)
            folded.finalize(folded.tokens())
            for name in folded.names:
                factor = float(folded.optimizer.pending_factor(name))
                assert abs(factor - variant.factors[name]) <= ULP * factor, message((name, factor))
            trainable = [p for module, _ in folded.pairs for p in module.parameters() if p.requires_grad]
            if trainable:  # what another backward pass adds
                trainable[-1].main_grad.add_(1.0)
                with pytest.raises(RuntimeError, match="expected gradients as they were finalized"):
                    folded.optimizer.prepare_grads()


def test_training_equals_an_explicit_correction_to_a_rounding() -> None:
    launch(both_ways, 3, VARIANTS, timeout=120.0)


def passes(rank: int, world_size: int, variant: Variant, folded: bool) -> tuple[set[str], set[str], list[str], int]:
    """Ops that touch gradient memory from backward to step, and in the step: those that read, those that write."""
    import mimo_ext.megatron as mimo

    with mimo.cpu():
        run = Run(variant, folded)
        run.backward(0)
        with Touched(run.gradients()) as before:
            run.finalize(run.tokens())
        with Touched(run.gradients()) as within:
            run.optimizer.step()
        return before.read | set(before.written), within.read, within.written, len(run.optimizer_parameters())


def every_way(rank: int, world_size: int) -> dict[str, Any]:
    fused = Variant("fused", ONE, kind="adam", fused=True, clip=0.3)
    clipped = Variant("clipped", ONE, kind="adam", clip=0.3)
    return {
        "explicit": passes(rank, world_size, clipped, False),
        "clipped": passes(rank, world_size, clipped, True),
        "fused": passes(rank, world_size, fused, True),
    }


def test_no_gradient_is_touched_between_backward_and_step_nor_multiplied_by_a_pass_of_its_own() -> None:
    for ways in launch(every_way, 3, timeout=60.0):
        between, _, written, parameters = ways["explicit"]
        assert "aten::mul_" in between  # the pass that the folded ways do without
        assert len(written) == parameters > 10  # clipping
        for way in ("clipped", "fused"):
            assert ways[way][0] == {"c10d::allreduce_coalesced_"}, way
            assert ways[way][1] >= {"aten::linalg_vector_norm"}, way  # read once, uncorrected
        # Clipping multiplies anyway: once, by the product.
        assert ways["clipped"][2] == ["aten::_foreach_mul_"] * parameters
        # Nothing but the update itself, which stores what it has multiplied.
        assert ways["fused"][2] == ["aten::_fused_adamw_"] * parameters
