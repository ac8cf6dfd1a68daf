"""Factors in the reduction itself. NCCL is played by gloo ranks that multiply as PREMUL_SUM says, and keep a record."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch
from test_folding_ranks import STEPS, TOKENS, ULP, Run, Touched, Variant
from tiny_mimo import Grid

from mimo_ext.megatron.premultiply import premultiply_in_reduction

VARIANTS = [
    Variant("mean loss", {"images": 2.0, "language": 1.0}, per_token=(False, False)),
    Variant("encoder by mean", {"images": 2.0, "language": 1.0}, per_token=(True, False), clip=0.3),
    Variant("language by mean", {"images": 0.5, "language": 1.0}, ({}, {"dp": 2}), per_token=(False, True)),
    Variant(
        "distributed",
        {"images": 0.5, "language": 1.0},
        ({}, {"dp": 2}),
        per_token=(False, True),
        distributed=True,
        kind="adam",
    ),
]


class PlayedNccl:
    """A gloo group that takes NCCL's PREMUL_SUM. `seen`: operation and factor of each collective."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.seen: list[tuple[str, float]] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.group, name)
        if "reduce" not in name:
            return method

        def reduce(*args: Any) -> Any:
            if args[-1].reduceOp == dist.ReduceOp.SUM:
                return method(*args)
            kind, factor = args[-1].reduceOp.__getstate__()
            assert kind == dist.ReduceOp.PREMUL_SUM
            self.seen.append(("scatter" if "scatter" in name else "allreduce", factor))
            for tensor in args[0] if name.startswith("allreduce") else args[1]:
                tensor.mul_(factor)
            args[-1].reduceOp = dist.ReduceOp.SUM
            return method(*args)

        return reduce


def play_nccl(pairs: list[tuple[Any, Any]]) -> list[PlayedNccl]:
    """Put such groups beneath the modules' reductions."""
    real = dist.get_backend
    dist.get_backend = lambda group=None: "nccl" if isinstance(group, PlayedNccl) else real(group)
    played = []
    for module, _ in pairs:
        for bucket_group in module.bucket_groups:
            for name in ("data_parallel_group", "intra_distributed_optimizer_instance_group"):
                if hasattr(bucket_group, name):
                    played.append(PlayedNccl(getattr(bucket_group, name)))
                    setattr(bucket_group, name, played[-1])
    return played


def premultiplied(infra: Any, pairs: list[tuple[Any, Any]], *, variant: Variant, played: list[PlayedNccl]) -> None:
    names = {id(grid): name for name, grid in infra.module_to_grid_map.items()}
    played += play_nccl(pairs)
    found = premultiply_in_reduction(infra, pairs, calculate_per_token_loss=variant.per_token[0])
    assert found == {names[id(grid)]: variant.factors[names[id(grid)]] for _, grid in pairs}


def every_variant(rank: int, world_size: int, variants: list[Variant]) -> list[list[tuple[str, float]]]:
    """Trains explicitly, and premultiplied both explicitly and folded; returns the collectives' factors."""
    import mimo_ext.megatron as mimo

    seen = []
    with mimo.cpu():
        for variant in variants:
            explicit = Run(variant, False)
            collectives: list[PlayedNccl] = []
            ways = [Run(variant, f, partial(premultiplied, variant=variant, played=collectives)) for f in (False, True)]
            for step in range(STEPS):
                expected, gradients, weights = explicit.step(step)
                for way in ways:
                    got, its_gradients, its_weights = way.step(step)
                    message = partial("{}, step {}, rank {}: {}".format, variant.name, step, rank)
                    assert got[0], message(got)
                    assert abs(got[1] - expected[1]) <= 8 * ULP * expected[1], message((got, expected))
                    scale = max(float(g.abs().max()) for g in gradients)
                    compare = partial(torch.testing.assert_close, msg=message)
                    compare(its_gradients, gradients, rtol=8 * ULP, atol=4 * ULP * scale)
                    compare(its_weights, weights, rtol=1e-6, atol=1e-6)
            folded = ways[1]
            folded.backward(STEPS)
            with Touched(folded.gradients()) as before:
                folded.finalize(folded.tokens())
            for name in folded.names:
                left = 1 / TOKENS if variant.per_token[0] else 1.0
                assert abs(float(folded.optimizer.pending_factor(name)) - left) <= ULP * left, (variant.name, name)
            played = [c for c in collectives if c.seen]
            # The only multiplication is the one that plays NCCL's.
            assert before.written.count("aten::mul_") == (1 if played else 0), (variant.name, before.written)
            seen.append(sorted({entry for c in played for entry in c.seen}))
    return seen


def test_training_equals_passes_over_the_gradients_and_the_factor_reaches_the_collective() -> None:
    first, second, third = launch(every_variant, 3, VARIANTS, timeout=90.0)
    # Where DDP's own factor times the correction is 1, a plain sum is all there is to do.
    reduce, scatter = [("allreduce", 0.5)], [("scatter", 0.5)]
    assert first == second == third == [[], [], reduce, scatter]


def module_of(group: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """What is read of a DDP with one bucket on two ranks."""
    config = SimpleNamespace(use_distributed_optimizer=False, **settings)
    bucket = SimpleNamespace(grad_data=torch.zeros(3, dtype=dtype), gradient_scaling_factor=0.5)
    bucket_group = SimpleNamespace(ddp_config=config, buckets=[bucket], data_parallel_group=group)
    return SimpleNamespace(
        config=SimpleNamespace(calculate_per_token_loss=False),
        ddp_config=config,
        bucket_groups=[bucket_group],
        expert_parallel_bucket_groups=[],
    )


def premultiply(module: Any, factor_of_two: bool = False) -> dict[str, float]:
    grids = {"images": Grid(0, dp=2), "language": Grid(2, dp=4 if factor_of_two else 2)}
    infra = SimpleNamespace(module_to_grid_map=grids)
    return premultiply_in_reduction(infra, [(module, grids["images"])], calculate_per_token_loss=False)


@pytest.fixture
def backend(monkeypatch, as_rank):
    as_rank(1)
    monkeypatch.setattr(dist, "get_backend", lambda group=None: group.backend)


def test_a_group_hands_the_product_of_all_factors_to_nccl(backend):
    calls = []
    group = SimpleNamespace(
        backend="nccl", size=lambda: 2, allreduce=lambda tensors, opts: calls.append((tensors, opts))
    )
    module = module_of(group)
    assert premultiply(module, factor_of_two=True) == {"images": 0.5}
    [bucket_group] = module.bucket_groups
    assert bucket_group.buckets[0].gradient_scaling_factor == 1.0  # no pass before the reduction
    wrapped = bucket_group.data_parallel_group
    assert wrapped.size() == 2
    tensor = torch.ones(3)
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.SUM
    wrapped.allreduce([tensor], options)
    [(tensors, options)] = calls
    assert tensors[0] is tensor
    assert options.reduceOp.__getstate__() == (dist.ReduceOp.PREMUL_SUM, 0.25)
    options.reduceOp = dist.ReduceOp.AVG
    with pytest.raises(ValueError, match="allreduce: expected a sum of gradients"):
        wrapped.allreduce([tensor], options)
    with pytest.raises(ValueError, match="Rank 1, module 'images': expected a reduction that multiplies nothing yet"):
        premultiply(module)


def test_reductions_that_cannot_multiply_are_refused_by_name_and_left_as_they_were(backend, monkeypatch):
    nccl = SimpleNamespace(backend="nccl")
    for module, message in (
        (module_of(SimpleNamespace(backend="gloo")), r"expected NCCL to multiply in the reduction .* got gloo"),
        (module_of(nccl, torch.bfloat16), r"expected gradients of float32 or float64 .* got torch.bfloat16"),
        (module_of(nccl, average_in_collective=True), "expected average_in_collective=False"),
        (module_of(nccl, reduce_scatter_with_fp32_accumulation=True), "reduce_scatter_with_fp32_accumulation=False"),
        (module_of(nccl, num_distributed_optimizer_instances=2), "num_distributed_optimizer_instances=1"),
    ):
        [bucket_group] = module.bucket_groups
        before = bucket_group.data_parallel_group
        with pytest.raises(ValueError, match=rf"Rank 1, module 'images': .*{message}"):
            premultiply(module)
        assert bucket_group.data_parallel_group is before
        assert bucket_group.buckets[0].gradient_scaling_factor == 0.5
    monkeypatch.delattr(dist, "_make_nccl_premul_sum")
    with pytest.raises(RuntimeError, match="cannot make NCCL's PREMUL_SUM"):
        premultiply(module_of(nccl))
