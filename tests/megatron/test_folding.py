"""FoldedMimoOptimizer alone: which factor meets which gradients, what is refused. Real ranks: test_folding_ranks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_mimo import Grid

import mimo_ext.megatron as mimo
from mimo_ext.megatron import parallel_utils as utils

GRADIENTS = {"images": [3.0, -4.0], "language": [12.0, 0.0]}  # norms 5 and 12


@pytest.fixture
def alone(monkeypatch, as_rank):
    """One rank that is its whole world."""
    as_rank(3)
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: None)
    monkeypatch.setattr(dist, "broadcast", lambda *args, **kwargs: None)
    with mimo.cpu():
        yield


class Setup:
    """Two modules of two weights, updated by SGD with a learning rate of 1: a weight changes by minus its gradient."""

    def __init__(
        self, *, loss_scale: float | None = None, kind: type | None = None, fused: bool = False, **config: Any
    ):
        from megatron.core.models.mimo.optimizer import MimoOptimizer, ModuleOptimizerInfo
        from megatron.core.optimizer import OptimizerConfig
        from megatron.core.optimizer.grad_scaler import ConstantGradScaler
        from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer

        from mimo_ext.megatron.folding import FoldedMimoOptimizer

        self.config = OptimizerConfig(**({"clip_grad": 0.0, "bf16": loss_scale is not None} | config))
        self.weights, self.modules, self.torchs, infos = {}, {}, {}, {}
        for name in GRADIENTS:
            weight = self.weights[name] = torch.nn.Parameter(torch.zeros(2))
            buffer = torch.zeros(2)
            weight.main_grad = buffer[0:2].view(2)
            inner = self.torchs[name] = torch.optim.SGD([weight], lr=1.0, fused=fused)
            if loss_scale is not None:
                scaler = ConstantGradScaler(loss_scale)
                leaf = Float16OptimizerWithFloat16Params(inner, self.config, scaler, lambda *args: None)
            else:
                leaf = (kind or FP32Optimizer)(inner, self.config, lambda *args: None)
            leaf.grad_stats_parallel_group = None
            leaf.tp_group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
            infos[name] = ModuleOptimizerInfo(ChainedOptimizer([leaf]), None, None, True)
            ddp = SimpleNamespace(grad_data=buffer, extra_main_grads=[])
            self.modules[name] = SimpleNamespace(buffers=[ddp], expert_parallel_buffers=[])
        self.plain = MimoOptimizer(infos, self.config)
        self.optimizer = FoldedMimoOptimizer(self.plain)

    def finalize(self, images: Any, language: Any) -> None:
        self.optimizer.set_pending_factors({"images": images, "language": language}, self.modules)

    def backward(self, scale: float = 1.0) -> None:
        for name, values in GRADIENTS.items():
            self.weights[name].main_grad.copy_(scale * torch.tensor(values))

    def updates(self) -> dict[str, list[float]]:
        return {name: (-weight.detach()).tolist() for name, weight in self.weights.items()}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tensor", [False, True])
def test_each_module_is_updated_with_its_own_factor(alone, fused, tensor):
    setup = Setup(fused=fused)
    setup.backward()
    setup.finalize(torch.tensor(2.0) if tensor else 2.0, 0.5)
    assert float(setup.optimizer.pending_factor("images")) == 2.0
    assert setup.optimizer.step() == (True, pytest.approx(math.hypot(2 * 5, 0.5 * 12), rel=1e-7), None)
    assert setup.updates() == {"images": [6.0, -8.0], "language": [6.0, 0.0]}


@pytest.mark.parametrize("fused", [False, True])
def test_the_norm_of_the_corrected_gradients_is_clipped(alone, fused):
    setup = Setup(fused=fused, clip_grad=2.5)
    setup.backward()
    setup.finalize(0.6, 1 / 3)
    success, norm, _ = setup.optimizer.step()
    assert success
    assert norm == pytest.approx(5.0, rel=1e-6)  # of 3 and 4
    updates = setup.updates()
    assert updates["images"] == pytest.approx([0.9, -1.2], rel=1e-6)
    assert updates["language"] == pytest.approx([2.0, 0.0], rel=1e-6)


def test_a_loss_scale_is_divided_out_together_with_the_factor(alone):
    setup = Setup(loss_scale=8.0, clip_grad=100.0)
    setup.backward(scale=8.0)
    setup.finalize(2.0, 0.5)
    assert setup.optimizer.step() == (True, pytest.approx(math.hypot(10, 6), rel=1e-7), None)
    assert setup.updates() == {"images": [6.0, -8.0], "language": [6.0, 0.0]}


def test_an_infinity_skips_the_update_and_its_factors(alone):
    setup = Setup(loss_scale=8.0)
    setup.backward()
    setup.weights["images"].main_grad[0] = math.inf
    setup.finalize(2.0, 0.5)
    assert setup.optimizer.step() == (False, None, None)
    assert setup.updates() == {"images": [0.0, 0.0], "language": [0.0, 0.0]}
    setup.backward(scale=8.0)
    setup.finalize(3.0, 1.0)
    assert setup.optimizer.step()[0]
    assert setup.updates() == {"images": [9.0, -12.0], "language": [12.0, 0.0]}


def test_zeros_are_counted_and_only_those_of_the_gradients(alone):
    setup = Setup(log_num_zeros_in_grad=True)
    setup.backward()
    setup.finalize(2.0, 0.5)
    assert setup.optimizer.step()[2] == 1


def test_a_step_without_finalization_is_refused_by_name(alone):
    setup = Setup()
    setup.backward()
    with pytest.raises(
        RuntimeError, match=r"Rank 3, modules \['images', 'language'\]: expected .* finalized .* got none"
    ):
        setup.optimizer.step()
    setup.finalize(1.0, 1.0)
    setup.optimizer.step()
    with pytest.raises(RuntimeError, match="finalized before each step"):  # a factor is for one step
        setup.optimizer.step()
    setup.optimizer.set_pending_factors({"images": 1.0}, {})
    with pytest.raises(RuntimeError, match=r"modules \['language'\]"):
        setup.optimizer.step()
    assert setup.updates() == dict(GRADIENTS)


def test_a_second_finalization_before_the_step_is_refused(alone):
    setup = Setup()
    setup.finalize(2.0, 2.0)
    with pytest.raises(RuntimeError, match=r"modules \['images', 'language'\]: expected a step .* got another final"):
        setup.optimizer.check_no_factor_is_pending()
    setup.optimizer.prepare_grads()
    with pytest.raises(RuntimeError, match="has not been applied yet"):
        setup.finalize(1.0, 1.0)
    setup.optimizer.zero_grad()  # the training loop leaves the step out
    with pytest.raises(RuntimeError, match="expected prepare_grads"):
        setup.optimizer.step_with_ready_grads()
    setup.backward()
    setup.finalize(1.0, 1.0)
    setup.optimizer.step()
    assert setup.updates() == dict(GRADIENTS)


def test_gradients_that_are_added_after_finalization_are_refused(alone):
    setup = Setup()
    setup.backward()
    setup.finalize(2.0, 2.0)
    setup.weights["language"].main_grad.add_(torch.ones(2))  # as the backward hooks of DDP do
    with pytest.raises(RuntimeError, match="Rank 3, module 'language': expected gradients as they were finalized"):
        setup.optimizer.step()
    assert setup.updates() == {"images": [0.0, 0.0], "language": [0.0, 0.0]}


def test_no_other_step_updates_weights_whose_factor_waits(alone):
    setup = Setup()
    setup.torchs["images"].step()  # loading a checkpoint does: nothing waits
    setup.backward()
    setup.finalize(2.0, 2.0)
    with pytest.raises(RuntimeError, match="Rank 3, module 'images': expected the step of FoldedMimoOptimizer"):
        setup.plain.step()
    with pytest.raises(RuntimeError, match="module 'language'"):
        setup.torchs["language"].step()
    assert setup.updates() == {"images": [0.0, 0.0], "language": [0.0, 0.0]}
    setup.optimizer.step()
    assert setup.updates() == {"images": [6.0, -8.0], "language": [24.0, 0.0]}


def test_optimizers_that_cannot_take_a_factor_are_refused_by_name(alone):
    from megatron.core.optimizer.optimizer import FP32Optimizer

    from mimo_ext.megatron.folding import FoldedMimoOptimizer

    class LayerWiseOptimizer(FP32Optimizer):
        pass

    with pytest.raises(TypeError, match=r"Module 'images': expected one of .*'FP32Optimizer'.* got LayerWiseOptimizer"):
        Setup(kind=LayerWiseOptimizer)
    setup = Setup()
    with pytest.raises(TypeError, match=r"expected a MimoOptimizer .* got FoldedMimoOptimizer"):
        FoldedMimoOptimizer(setup.optimizer)
    with pytest.raises(TypeError, match="got SGD"):
        FoldedMimoOptimizer(setup.torchs["images"])
    setup.config.use_precision_aware_optimizer = True
    with pytest.raises(ValueError, match=r"Module 'images', FP32Optimizer: .* use_precision_aware_optimizer=False"):
        FoldedMimoOptimizer(setup.plain)
    setup.config.use_precision_aware_optimizer = False
    leaf = setup.plain.module_infos["language"].optimizer.chained_optimizers[0]
    leaf.ddp_config = SimpleNamespace(use_megatron_fsdp=True)
    with pytest.raises(ValueError, match="Module 'language', FP32Optimizer: expected use_megatron_fsdp=False"):
        FoldedMimoOptimizer(setup.plain)


class Module:
    """What finalization sees of a module. `scaled` are the factors that met its gradients."""

    def __init__(self, per_token: bool) -> None:
        self.config = SimpleNamespace(calculate_per_token_loss=per_token)
        self.buffers, self.expert_parallel_buffers = [], []
        self.scaled: list[float] = []

    def scale_gradients(self, factor: Any) -> None:
        self.scaled.append(float(factor))


def finalize(
    monkeypatch, tokens: torch.Tensor | None, per_token: tuple[bool, bool], optimizer: Any, premultiplied: float = 1.0
) -> list[Module]:
    """An encoder with DP 4 and a language model with DP 2, given as (language, encoder)."""
    grids = {"images": Grid(0, dp=4), "language": Grid(0, dp=2)}
    infra = SimpleNamespace(module_to_grid_map=grids, pg_collections={name: object() for name in grids})
    monkeypatch.setattr(utils, "is_current_rank_in_grid", lambda grid: True)

    def reduce(modules, num_tokens, **kwargs):
        if num_tokens is not None:
            modules[0].scale_gradients(1.0 / num_tokens.clamp(min=1))

    monkeypatch.setattr(utils, "_finalize_model_grads", reduce)
    modules = [Module(flag) for flag in per_token]
    if premultiplied != 1.0:
        for module in modules:
            setattr(module, utils._PREMULTIPLIED, premultiplied)
    pairs = [(modules[0], grids["language"]), (modules[1], grids["images"])]
    utils.finalize_model_grads_multimodule(None, tokens, infra=infra, module_to_grid_tuple=pairs, fold_into=optimizer)
    return modules


@pytest.mark.parametrize(
    ("tokens", "per_token", "expected"),
    [
        (50, (True, True), (1 / 50, 1 / 50)),
        (50, (True, False), (1 / 50, 4 / 50)),
        (0, (True, False), (1.0, 1.0)),
        (None, (False, False), (1.0, 2.0)),
        (None, (True, True), (1 / 2, 1 / 2)),
    ],
)
@pytest.mark.parametrize("on_device", [False, True])
def test_finalization_leaves_gradients_alone_and_hands_their_factors_over(
    alone, monkeypatch, tokens, per_token, expected, on_device
):
    if on_device:  # as for CUDA tensors, which are not read
        monkeypatch.setattr(utils, "_on_host", lambda tensor: False)
    given = None if tokens is None else torch.tensor(tokens)
    optimizer = Setup().optimizer
    modules = finalize(monkeypatch, given, per_token, optimizer)
    assert [module.scaled for module in modules] == [[], []]
    assert float(optimizer.pending_factor("language")) == pytest.approx(expected[0], rel=1e-7)
    assert float(optimizer.pending_factor("images")) == pytest.approx(expected[1], rel=1e-7)
    modules[0].scale_gradients(3.0)  # a module's own method is back
    assert modules[0].scaled == [3.0]
    explicit = finalize(monkeypatch, given, per_token, None)
    applied = [math.prod(module.scaled) for module in explicit]
    assert applied == pytest.approx(list(expected), rel=1e-7)


@pytest.mark.parametrize(
    ("tokens", "per_token", "expected"),
    [(50, (True, False), (1 / 200, 4 / 200)), (None, (False, False), (1 / 4, 2 / 4)), (0, (True, True), (1 / 4, 1.0))],
)
def test_what_the_reduction_has_multiplied_by_is_left_out(alone, monkeypatch, tokens, per_token, expected):
    given = None if tokens is None else torch.tensor(tokens)
    modules = finalize(monkeypatch, given, per_token, None, premultiplied=4.0)
    assert [math.prod(module.scaled) for module in modules] == pytest.approx(list(expected), rel=1e-7)


def test_finalization_refuses_what_takes_no_factor_before_it_reduces(alone, monkeypatch):
    setup = Setup()
    with pytest.raises(TypeError, match=r"Rank 3: expected a FoldedMimoOptimizer as fold_into .* got MimoOptimizer"):
        finalize(monkeypatch, None, (False, False), setup.plain)
    reduced = []
    setup.finalize(1.0, 1.0)
    monkeypatch.setattr(utils, "_start_missing_reduction", lambda *args: reduced.append(args))
    with pytest.raises(RuntimeError, match="expected a step of the optimizer"):
        finalize(monkeypatch, None, (False, False), setup.optimizer)
    assert reduced == []
