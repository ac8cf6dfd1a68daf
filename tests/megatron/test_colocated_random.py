"""Random numbers of modules on the same ranks: replicas draw the same ones, shards do not, whatever the other does."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import tiny_mimo
import torch
import torch.distributed as dist
from launch import launch

SAMPLES = 4
SEEDS = (8, 0, 2)  # the first has pictures in half of its samples only
ENCODER_WEIGHT = "modality_submodules.images.encoders.clip.decoder.layers.0.mlp.linear_fc1.weight"
LANGUAGE_WEIGHT = "language_model.decoder.layers.0.mlp.linear_fc1.weight"


def provider(encoder: dict[str, int], language: dict[str, int]) -> Any:
    """Provider of a model with dropout whose weights are drawn as on a GPU: every rank draws its own shard."""
    made = tiny_mimo.provider(encoder, language, colocated=True)
    image_spec = made.modality_submodules_spec["images"]
    configs = [made.language_model_spec.params["config"]]
    configs.append(image_spec.submodules["encoders"]["clip"].params["transformer_config"])
    configs.append(image_spec.submodules["input_projections"][0].params["config"])
    for config in configs:
        config.hidden_dropout = config.attention_dropout = 0.3
        config.use_cpu_initialization = False
    return made


def share_states(*_: object) -> contextlib.AbstractContextManager[None]:
    """As if there were one random state for all modules."""
    return contextlib.nullcontext()


def run_rank(
    rank: int, world_size: int, encoder: dict[str, int], language: dict[str, int], shared: bool
) -> dict[str, Any]:
    import mimo_ext.megatron as mimo
    from mimo_ext.megatron import module_random

    if shared:
        module_random.ModuleRandomState.own = share_states
    lanes = {"images": encoder.get("dp", 1), "language": language.get("dp", 1)}
    lane = {name: rank * lanes[name] // world_size for name in lanes}
    with mimo.cpu():
        made = provider(encoder, language)
        groups = made.get_or_build_infra().pg_collections
        mimo.cpu.manual_seed(5, groups["language"])
        model = made.provide()
        weights = dict(model.named_parameters())
        rows: list[torch.Tensor] = []
        hidden: list[torch.Tensor] = []
        model.modality_submodules["images"].encoders["clip"].register_forward_hook(lambda *args: rows.append(args[2]))
        # Not the losses: cross entropy over shards of the vocabulary makes them equal again.
        model.language_model.decoder.register_forward_hook(lambda *args: hidden.append(args[2]))
        for step in range(len(SEEDS)):
            data = tiny_mimo.batch(SAMPLES, seed=SEEDS[step])
            mine = {
                name: tiny_mimo.take(data, lane[name] * SAMPLES // k, (lane[name] + 1) * SAMPLES // k)
                for name, k in lanes.items()
            }
            images = mine["images"]["images"]
            output, _ = model(
                mine["language"]["ids"],
                torch.arange(tiny_mimo.SEQ).expand_as(mine["language"]["ids"]),
                tiny_mimo.causal_mask(),
                labels=mine["language"]["labels"],
                modality_inputs={"images": {"clip": {"x": images}}} if len(images) else None,
            )
            output.sum().backward()
        model.close()
        dist.barrier()
    return tiny_mimo.arrays(
        {
            "weights": {"encoder": weights[ENCODER_WEIGHT], "language": weights[LANGUAGE_WEIGHT]},
            "rows": rows,
            "hidden": hidden,
            "gradient": weights["language_model.decoder.final_layernorm.weight"].grad,
        }
    )


def equal(first: Any, second: Any) -> bool:
    return bool((first == second).all())


def test_tensor_parallel_ranks_of_the_language_model_drop_the_same_elements() -> None:
    """They are data-parallel ranks of the encoder, with other numbers of pictures."""
    first, second = launch(run_rank, 2, {"dp": 2}, {"tp": 2}, False, timeout=90)
    assert equal(first["weights"]["encoder"], second["weights"]["encoder"])
    assert not equal(first["weights"]["language"], second["weights"]["language"])
    assert [len(rows) for rows in first["rows"]] != [len(rows) for rows in second["rows"]]
    for mine, other in zip(first["hidden"], second["hidden"], strict=True):
        assert equal(mine, other)
    assert equal(first["gradient"], second["gradient"])


def test_tensor_parallel_ranks_of_the_encoder_drop_the_same_elements() -> None:
    first, second = launch(run_rank, 2, {"tp": 2}, {"dp": 2}, False, timeout=90)
    assert not equal(first["weights"]["encoder"], second["weights"]["encoder"])
    assert equal(first["weights"]["language"], second["weights"]["language"])
    assert len(first["rows"]) == len(SEEDS)
    for mine, other in zip(first["rows"], second["rows"], strict=True):
        assert equal(mine, other)


def test_one_state_for_all_modules_would_not_do() -> None:
    first, second = launch(run_rank, 2, {"dp": 2}, {"tp": 2}, True, timeout=90)
    assert not equal(first["weights"]["encoder"], second["weights"]["encoder"])
    assert not equal(first["hidden"][-1], second["hidden"][-1])


def draw_and_fail(state: Any, draw: Any) -> list[float]:
    drawn = []
    with contextlib.suppress(ZeroDivisionError), state.own():
        drawn = draw()
        _ = 1 / 0
    return drawn


@pytest.mark.parametrize("seeded", [True, False])
def test_a_module_draws_as_on_ranks_of_its_own_and_leaves_no_trace(seeded: bool) -> None:
    import mimo_ext.megatron as mimo
    from mimo_ext.megatron.module_random import ModuleRandomState

    with mimo.cpu():
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        def draw() -> list[float]:
            numbers = [float(torch.rand(()))]
            if seeded:
                with get_cuda_rng_tracker().fork():
                    numbers.append(float(torch.rand(())))
            return numbers

        def seed(number: int) -> None:
            mimo.cpu.manual_seed(number) if seeded else torch.manual_seed(number)

        seed(3)
        alone = [draw() for _ in range(4)]
        seed(3)
        state, mixed, own = ModuleRandomState(tp_rank=1), [], []
        for _ in range(4):
            mixed.append(draw())
            with state.own():
                own.append(draw())
        assert mixed == alone
        seed(4)
        with state.own():
            other = draw()
        seed(3)
        again = draw_and_fail(state, draw)
        assert draw() == alone[0]  # also after an error nothing is left behind
        assert [numbers[0] for numbers in own] == [numbers[0] for numbers in alone]  # replicas: the same seed
        assert again == own[0] != other
        if seeded:  # shards: another state for each tensor-parallel rank
            assert not {numbers[1] for numbers in own} & {numbers[1] for numbers in alone}
