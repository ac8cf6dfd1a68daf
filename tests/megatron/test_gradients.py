"""Gradients of a MimoModel on real ranks against the same model in one process.

The tensors between the modules are carried by hand, as lists of numbers, so that only the Megatron layer is under test.
"""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import Any

import pytest
import tiny_mimo
import torch
from exchange import all_gather_json
from launch import launch

SAMPLES, MICROBATCHES = 4, 2


def microbatch(index: int) -> dict[str, torch.Tensor]:
    return tiny_mimo.batch(SAMPLES, seed=index)


def share(index: int, count: int) -> tuple[int, int]:
    return index * SAMPLES // count, (index + 1) * SAMPLES // count


def reference_rank(rank: int, world_size: int, language_dp: int) -> dict[str, Any]:
    """Weights, and their gradients for both losses, of the whole model on one rank with plain autograd."""
    import mimo_ext.megatron as mimo

    with mimo.cpu():
        torch.manual_seed(7)
        model = tiny_mimo.provider({}, {}, colocated=True).provide()
        gradients = {}
        for per_token in (False, True):
            model.zero_grad()
            total = sum(float(microbatch(m)["loss_mask"].sum()) for m in range(MICROBATCHES))
            for m in range(MICROBATCHES):
                data = microbatch(m)
                losses = tiny_mimo.forward(model, data) * data["loss_mask"]
                if per_token:
                    (losses.sum() / total).backward()
                    continue
                # Each data-parallel rank of the language model averages over its own tokens.
                loss = torch.zeros(())
                for lane in range(language_dp):
                    start, end = share(lane, language_dp)
                    loss = loss + losses[start:end].sum() / data["loss_mask"][start:end].sum()
                (loss / language_dp / MICROBATCHES).backward()
            gradients[per_token] = {n: p.grad.clone() for n, p in model.named_parameters()}
        return tiny_mimo.arrays({"weights": dict(model.named_parameters()), "gradients": gradients})


def tensors_of(rows: list[list[list[float]]]) -> list[torch.Tensor]:
    """[rows, h] of each sample."""
    return [torch.tensor(sample, dtype=torch.float32).view(len(sample), tiny_mimo.HIDDEN) for sample in rows]


def carried_step(model: Any, name: str, lane: int, lanes: dict[str, int], m: int, per_token: bool) -> torch.Tensor:
    """Forward and backward of one microbatch; returns this rank's number of tokens."""
    data = tiny_mimo.take(microbatch(m), *share(lane, lanes[name]))
    if name == "images":
        out = tiny_mimo.forward(model, data)["images"]
        # One line per sample: the language model's lanes may cut the samples elsewhere.
        rows = out.detach().split(list(model.row_counts["images"][-1]))
        all_gather_json((share(lane, lanes[name])[0], [sample.tolist() for sample in rows]))
        everyone = all_gather_json(None)
        start, end = share(lane, lanes[name])
        gradients = torch.zeros_like(out)
        for entry in everyone:
            if entry is None:
                continue
            first, grads = entry
            for sample, gradient in enumerate(tensors_of(grads), first):
                if start <= sample < end:
                    offset = sum(len(r) for r in rows[: sample - start])
                    gradients[offset : offset + len(gradient)] = gradient
        out.backward(gradients)
        return torch.zeros((), dtype=torch.int)

    everyone = all_gather_json(None)
    start, end = share(lane, lanes[name])
    received = {
        sample: rows for entry in everyone if entry for sample, rows in enumerate(tensors_of(entry[1]), entry[0])
    }
    rows = [received[sample] for sample in range(start, end)]
    leaf = torch.cat(rows).requires_grad_()
    model.set_input_tensor([{"images": leaf}])
    losses = tiny_mimo.forward(model, data) * data["loss_mask"]
    tokens = data["loss_mask"].sum()
    (losses.sum() if per_token else losses.sum() / tokens / MICROBATCHES).backward()
    assert leaf.grad is not None
    all_gather_json((start, [sample.tolist() for sample in leaf.grad.split([len(r) for r in rows])]))
    return tokens.int() if per_token else torch.zeros((), dtype=torch.int)


def distributed_rank(
    rank: int, world_size: int, lanes: dict[str, int], flags: list[tuple[bool, bool]], weights: dict[str, Any]
) -> list[dict[str, Any]]:
    """Gradients of this rank's module for each ``(language per token, encoder per token)``."""
    from megatron.core.distributed import DistributedDataParallelConfig

    import mimo_ext.megatron as mimo
    from mimo_ext.megatron import parallel_utils as utils

    results = []
    with mimo.cpu():
        for language_per_token, encoder_per_token in flags:
            provider = tiny_mimo.provider(
                {"dp": lanes["images"]},
                {"dp": lanes["language"]},
                language_per_token=language_per_token,
                encoder_per_token=encoder_per_token,
            )
            [model] = provider.provide_distributed_model(DistributedDataParallelConfig())
            infra = provider.get_or_build_infra()
            pairs = utils.get_module_to_grid_tuple(model, infra)
            name, groups = utils.get_active_module_pg(infra)
            names = {n.replace(".module.", ".", 1): p for n, p in model.named_parameters()}
            with torch.no_grad():
                for parameter_name, parameter in names.items():
                    parameter.copy_(torch.from_numpy(weights[parameter_name]))

            utils.zero_grad_buffer_for_multimodule(pairs)
            tokens = torch.zeros((), dtype=torch.int)
            no_sync = partial(utils.multimodule_no_sync, module_to_grid_tuple=pairs)
            for m in range(MICROBATCHES):
                last = m == MICROBATCHES - 1
                with contextlib.nullcontext() if last else no_sync():
                    tokens += carried_step(model, name, groups.dp.rank(), lanes, m, language_per_token)
            utils.finalize_model_grads_multimodule(
                [model],
                tokens if language_per_token else None,
                pg_collection=utils.build_pg_collection_for_schedule(infra),
                infra=infra,
                module_to_grid_tuple=pairs,
            )
            if language_per_token:
                expected = sum(int(microbatch(m)["loss_mask"].sum()) for m in range(MICROBATCHES))
                assert int(tokens) == expected, (rank, int(tokens), expected)
            results.append(tiny_mimo.arrays({n: p.main_grad for n, p in names.items()}))
    return results


FLAGS = [(False, False), (False, True), (True, True), (True, False)]


@pytest.mark.parametrize(("encoder_dp", "language_dp"), [(2, 1), (1, 2), (3, 2)])
def test_gradients_equal_one_process(encoder_dp: int, language_dp: int) -> None:
    [reference] = launch(reference_rank, 1, language_dp, timeout=90)
    lanes = {"images": encoder_dp, "language": language_dp}
    ranks = launch(distributed_rank, encoder_dp + language_dp, lanes, FLAGS, reference["weights"], timeout=120)
    for case, (language_per_token, encoder_per_token) in enumerate(FLAGS):
        expected = reference["gradients"][language_per_token]
        seen = set()
        for rank, results in enumerate(ranks):
            for name, gradient in results[case].items():
                seen.add(name)
                torch.testing.assert_close(
                    torch.from_numpy(gradient),
                    torch.from_numpy(expected[name]),
                    rtol=1e-4,
                    atol=1e-6,
                    msg=lambda text, where=(rank, name, language_per_token, encoder_per_token): f"{where}: {text}",
                )
        assert seen == set(expected)
        largest = max(float(abs(g).max()) for n, g in expected.items() if n.startswith("modality"))
        assert math.isfinite(largest)
        assert largest > 1e-3  # the comparison has something to compare
