"""Modules on the same ranks with other parallel sizes, on real ranks, against the same model in one process.

Encoder and language model are stand-ins whose every row and every gradient can be told apart. Their tensor-parallel
ranks are replicas, and their context-parallel ranks take the loss of their part of the positions.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import RankFailure, launch
from test_mimo_model import AUDIO, HIDDEN, IMAGE, model
from tiny_mimo import Grid

from mimo_ext import BridgeError, BridgeTimeoutError

SEQ = 8
TOKENS = {"images": IMAGE, "audio": AUDIO}
ORDER = ("tp", "cp", "dp", "pp")


def grid(sizes: dict[str, int]) -> Grid:
    return Grid(0, **sizes)


def coordinates(sizes: dict[str, int], rank: int) -> dict[str, int]:
    found = {}
    for dim in ORDER:
        found[dim] = rank % sizes.get(dim, 1)
        rank //= sizes.get(dim, 1)
    return found


def only(names: tuple[str, ...], counts: list[list[int]]) -> list[list[int]]:
    """The counts without those of modalities that the model does not have."""
    return [[count if name in names else 0 for name, count in zip(TOKENS, of, strict=True)] for of in counts]


def microbatch(counts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Samples with ``counts[i] = [images, audio]`` positions, their encoder inputs and the weights of their loss."""
    generator = torch.Generator().manual_seed(sum(map(sum, counts)))
    ids = torch.randint(1, 80, (len(counts), SEQ), generator=generator)
    for sample, (images, audio) in enumerate(counts):
        ids[sample, 1 : 1 + images] = IMAGE
        ids[sample, 1 + images : 1 + images + audio] = AUDIO
    inputs = {
        name: torch.randn(sum(of[index] for of in counts), HIDDEN, generator=generator)
        for index, name in enumerate(TOKENS)
    }
    return {"ids": ids, "weights": torch.randn(SEQ, len(counts), HIDDEN, generator=generator), **inputs}


def reference(names: tuple[str, ...], data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Output, and the gradients of weights and inputs, of the whole model in this process."""
    whole = model(None, names)
    inputs = {name: data[name].clone().requires_grad_() for name in names}
    out, _ = whole(data["ids"], modality_inputs={name: {"encoder": {"x": x}} for name, x in inputs.items()})
    (out * data["weights"]).sum().backward()
    gradients = {
        name: (whole.modality_submodules[name].encoders["encoder"].weight.grad, inputs[name].grad) for name in names
    }
    return out.detach(), gradients


def lane(samples: int, index: int, count: int) -> slice:
    return slice(index * samples // count, (index + 1) * samples // count)


def check_microbatch(
    made: Any, sizes: dict[str, dict[str, int]], counts: list[list[int]], *, train: bool = True, tell: bool = False
) -> None:
    """Forward (and backward) of one microbatch; every value is compared with the reference."""
    rank, samples = dist.get_rank(), len(counts)
    names = tuple(name for name in sizes if name != "language")
    counts = only(names, counts)
    data = microbatch(counts)
    expected, gradients = reference(names, data)
    inputs, rows, mine = {}, {}, {}
    for name in names:
        column = list(TOKENS).index(name)
        own = lane(samples, coordinates(sizes[name], rank)["dp"], sizes[name].get("dp", 1))
        first = sum(of[column] for of in counts[: own.start])
        mine[name] = [of[column] for of in counts[own]]
        rows[name] = slice(first, first + sum(mine[name]))
        if sum(mine[name]):  # a lane without this modality gives the encoder nothing
            inputs[name] = data[name][rows[name]].clone().requires_grad_(train)
    position = coordinates(sizes["language"], rank)
    own = lane(samples, position["dp"], sizes["language"].get("dp", 1))
    made.zero_grad()
    with torch.set_grad_enabled(train):
        out, _ = made(
            data["ids"][own],
            modality_inputs={name: {"encoder": {"x": x}} for name, x in inputs.items()},
            row_counts=mine if tell else None,
        )
    torch.testing.assert_close(out.detach(), expected[:, own])
    if not train:
        return
    cp = sizes["language"].get("cp", 1)
    part = slice(position["cp"] * SEQ // cp, (position["cp"] + 1) * SEQ // cp)
    (out * data["weights"][:, own])[part].sum().backward()
    for name in names:
        weight, x = gradients[name]
        if name in inputs:
            torch.testing.assert_close(inputs[name].grad, x[rows[name]])
        # What DDP does: the sum over the lanes, each of which counts once.
        own_gradient = made.modality_submodules[name].encoders["encoder"].weight.grad
        replicas = sizes[name].get("tp", 1) * sizes[name].get("cp", 1)
        total = torch.zeros(HIDDEN) if own_gradient is None else own_gradient.clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total / replicas, weight)


RAGGED = [
    [[2, 0], [0, 1], [5, 0], [1, 2], [0, 0], [3, 1], [1, 0], [2, 2], [0, 3], [4, 1], [1, 0], [2, 0]],
    [[0, 0]] * 6 + [[3, 2], [1, 0], [0, 4], [2, 1], [2, 0], [1, 5]],  # half of the lanes see text alone
    [[0, 0]] * 12,
    [[1, 1]] * 12,
    [[0, 2], [3, 0], [0, 0], [1, 0], [2, 1], [0, 1]],  # another number of samples
]
LAYOUTS = [
    ({"dp": 3, "tp": 2}, {"dp": 2, "tp": 3}),  # neither count divides the other
    ({"dp": 2, "tp": 3}, {"dp": 3, "tp": 2}),
    ({"dp": 6}, {"tp": 6}),
    ({"tp": 6}, {"dp": 6}),
    ({"dp": 3, "tp": 2}, {"dp": 3, "cp": 2}),  # the language model splits its sequence
    ({"dp": 3, "cp": 2}, {"dp": 3, "cp": 2}),  # equal sizes, and still the gradients of two parts are to be summed
    ({"dp": 2, "cp": 3}, {"dp": 6}),
]


def layouts_rank(rank: int, world_size: int) -> None:
    for images, language in LAYOUTS:
        sizes = {"images": images, "language": language}
        made = model({name: grid(of) for name, of in sizes.items()})
        for counts in RAGGED:
            check_microbatch(made, sizes, counts)
        check_microbatch(made, sizes, RAGGED[0], tell=True)
        if language.get("dp", 1) <= 2:  # fewer samples than lanes of the encoder: some have none
            check_microbatch(made, sizes, [[2, 0], [1, 0]])
        made.close()


def test_rows_and_gradients_equal_one_process() -> None:
    launch(layouts_rank, 6)


def modalities_rank(rank: int, world_size: int) -> None:
    sizes = {"images": {"dp": 4}, "audio": {"tp": 2, "dp": 2}, "language": {"tp": 4}}
    made = model({name: grid(of) for name, of in sizes.items()}, ("images", "audio"))
    for counts in RAGGED:
        check_microbatch(made, sizes, counts)
        check_microbatch(made, sizes, counts, train=False)
    made.close()
    # One of two has the language model's sizes and needs no bridge.
    sizes["images"] = {"tp": 4}
    with_one = model({name: grid(of) for name, of in sizes.items()}, ("images", "audio"))
    for counts in RAGGED[:2]:
        check_microbatch(with_one, sizes, counts)
    assert with_one.colocated_bridges.names == ["audio"]
    with_one.close()


def test_each_modality_has_its_own_sizes_and_evaluation_runs_between_training_steps() -> None:
    launch(modalities_rank, 4)


def frozen_rank(rank: int, world_size: int) -> str:
    sizes = {"images": {"dp": 2}, "language": {"tp": 2}}
    made = model({name: grid(of) for name, of in sizes.items()})
    made.modality_submodules.requires_grad_(False)
    data = microbatch(only(("images",), RAGGED[0]))
    own = lane(12, rank, 2)
    first = sum(of[0] for of in RAGGED[0][: own.start])
    x = data["images"][first : first + sum(of[0] for of in RAGGED[0][own])]
    expected, _ = reference(("images",), data)
    for _ in range(2):
        out, _ = made(data["ids"], modality_inputs={"images": {"encoder": {"x": x}}})
        torch.testing.assert_close(out, expected)
        assert not out.requires_grad  # nothing is left to train: no gradient travels
    with pytest.raises(ValueError, match="all frozen") as error:
        made(data["ids"], modality_inputs={"images": {"encoder": {"x": x.requires_grad_()}}})
    made.close()
    return str(error.value)


def test_no_gradient_travels_to_a_frozen_encoder() -> None:
    for rank, text in enumerate(launch(frozen_rank, 2)):
        assert f"Rank {rank}, module 'images': expected inputs without gradients" in text


def wrong_rows_rank(rank: int, world_size: int) -> list[str]:
    """Every rank gives its encoder the samples of its lane of the *language model*."""
    sizes = {"images": {"dp": 2}, "language": {"tp": 2}}
    texts = []
    data = microbatch([[2, 0], [1, 0]])
    made = model({name: grid(of) for name, of in sizes.items()})
    with pytest.raises(ValueError, match="rows") as error:
        made(data["ids"], modality_inputs={"images": {"encoder": {"x": data["images"]}}})
    texts.append(str(error.value))
    made.close()
    made = model({name: grid(of) for name, of in sizes.items()})
    with pytest.raises(ValueError, match="rows") as error:  # no inputs, where the samples have pictures
        made(data["ids"])
    texts.append(str(error.value))
    made.close()
    made.special_token_ids.clear()
    with pytest.raises(ValueError, match="special token") as error:
        made(data["ids"])
    texts.append(str(error.value))
    made.close()
    return texts


def test_rows_of_the_wrong_lane_are_refused_before_they_are_sent() -> None:
    for rank, (wrong, missing, unknown) in enumerate(launch(wrong_rows_rank, 2)):
        want = [2, 1][rank]
        assert f"Rank {rank}, module 'images': expected {want} rows" in wrong
        assert "got an output of shape [3, 4]" in wrong
        assert f"expected {want} rows" in missing
        assert "got an output of shape [0, 4]" in missing
        assert "No special token ID defined for modality images" in unknown


def out_of_order_rank(rank: int, world_size: int) -> str:
    sizes = {"images": {"dp": 2}, "language": {"tp": 2}}
    made = model({name: grid(of) for name, of in sizes.items()})
    data = microbatch([[2, 0], [2, 0]])
    x = data["images"][2 * rank : 2 * rank + 2]
    first, second = (made(data["ids"], modality_inputs={"images": {"encoder": {"x": x}}})[0] for _ in range(2))
    with pytest.raises(RuntimeError) as error:
        second.sum().backward()
    first.sum().backward()
    made.close()
    return str(error.value)


def test_a_backward_out_of_order_is_refused() -> None:
    for rank, text in enumerate(launch(out_of_order_rank, 2)):
        assert f"Rank {rank}, module 'images': expected the gradient of forward pass 0, got that of forward pass 1" in (
            text
        )


def unequal_lanes_rank(rank: int, world_size: int) -> str:
    """The lanes of the language model have one and two samples."""
    made = model({"images": grid({"tp": 2}), "language": grid({"dp": 2})})
    made.build_bridges(timedelta(seconds=2))
    data = microbatch([[2, 0], [1, 0], [1, 0]])
    own = slice(0, 1) if rank == 0 else slice(1, 3)
    with pytest.raises(BridgeError) as error:
        made(data["ids"][own], modality_inputs={"images": {"encoder": {"x": data["images"]}}})
    dist.barrier()
    return str(error.value)


def test_lanes_of_the_language_model_with_different_numbers_of_samples_are_refused() -> None:
    texts = launch(unequal_lanes_rank, 2)
    # The first to notice says why; the other may only see that the first has gone.
    assert any("the lanes of module 'language' sent different microbatches: expected 2" in text for text in texts), (
        texts
    )


def late_rank(rank: int, world_size: int) -> str:
    made = model({"images": grid({"dp": 2}), "language": grid({"tp": 2})})
    made.build_bridges(timedelta(seconds=1))
    text = ""
    if rank == 0:
        data = microbatch([[2, 0], [1, 0]])
        with pytest.raises(BridgeTimeoutError) as error:
            made(data["ids"], modality_inputs={"images": {"encoder": {"x": data["images"][:2]}}})
        text = str(error.value)
    dist.barrier()
    return text


def test_a_rank_that_does_not_come_is_named() -> None:
    text, _ = launch(late_rank, 2)
    # It has its own row counts without asking. Whether its send or its receive of rows notices first is open.
    assert re.search(
        r"bridge 'images -> language', rank 0: (send|recv)_forward of microbatch 0: .*rank 1: nothing", text
    )


def precision_rank(rank: int, world_size: int) -> None:
    sizes = {"images": grid({"dp": 2}), "language": grid({"tp": 2})}
    made = model(sizes, pipeline_dtype=torch.bfloat16)
    data = microbatch([[2, 0], [1, 0]])
    x = (data["images"][:2] if rank == 0 else data["images"][2:]).requires_grad_()
    out, _ = made(data["ids"], modality_inputs={"images": {"encoder": {"x": x}}})
    out.sum().backward()
    assert made.colocated_bridges.bridge_of("images").dtype is torch.bfloat16
    placed = out.transpose(0, 1)[data["ids"] == IMAGE]
    torch.testing.assert_close(placed.detach(), 2 * data["images"].bfloat16().float(), rtol=0, atol=0)
    assert x.grad.dtype is torch.float32
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))
    made.close()


def test_rows_travel_in_the_language_models_precision() -> None:
    launch(precision_rank, 2)


def half_the_world_rank(rank: int, world_size: int) -> None:
    sizes = {"images": {"dp": 2}, "language": {"tp": 2}}
    if rank < 2:
        made = model({name: grid(of) for name, of in sizes.items()})
        check_microbatch_of_two(made)
        made.close()
    dist.barrier()


def check_microbatch_of_two(made: Any) -> None:
    data = microbatch([[2, 0], [1, 0]])
    expected, _ = reference(("images",), data)
    x = data["images"][:2] if dist.get_rank() == 0 else data["images"][2:]
    out, _ = made(data["ids"], modality_inputs={"images": {"encoder": {"x": x}}})
    torch.testing.assert_close(out.detach(), expected)
    out.sum().backward()


def test_ranks_outside_the_grids_need_not_take_part() -> None:
    launch(half_the_world_rank, 3)


def different_lanes_rank(rank: int, world_size: int) -> None:
    """Rank 1 believes in another layout."""
    images = {"dp": 2} if rank == 0 else {"tp": 2}
    made = model({"images": grid(images), "language": grid({"cp": 2})})
    made.build_bridges()


def test_ranks_with_different_grids_are_refused() -> None:
    with pytest.raises(RankFailure, match="the ranks describe different bridges"):
        launch(different_lanes_rank, 2)
