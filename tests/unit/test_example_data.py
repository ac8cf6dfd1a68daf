"""The example's data: what is held out, how numbers are written, how lanes share a batch."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from vlm_digits.data import (
    ANSWER,
    END,
    IMAGE,
    PAD,
    SEQUENCE_LENGTH,
    TEST,
    TOKENS_PER_IMAGE,
    TRAIN,
    Numbers,
    as_text,
    compose,
)


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    return Numbers(seed=1)


def test_test_images_are_never_trained_on(numbers: Numbers) -> None:
    train, test = numbers.indices[TRAIN], numbers.indices[TEST]
    assert len(np.intersect1d(train, test)) == 0
    assert len(train) + len(test) == 1797
    assert 0.19 < len(test) / 1797 < 0.21
    trained = {image.numpy().tobytes() for image in numbers._images[train]}
    for step in range(4):
        images = numbers.batch(TEST, step, 64).images
        assert not any(image.numpy().tobytes() in trained for image in images)
        for image in numbers.batch(TRAIN, step, 64).images:
            assert image.numpy().tobytes() in trained


def test_every_digit_is_held_out_in_proportion(numbers: Numbers) -> None:
    held_out = np.bincount(numbers._digits.numpy()[numbers.indices[TEST]], minlength=10)
    all_of_it = np.bincount(numbers._digits.numpy(), minlength=10)
    assert np.all(np.abs(held_out / all_of_it - 0.2) < 0.01)


def test_tokens_of_a_number() -> None:
    batch = compose(torch.arange(3 * 64.0).reshape(3, 8, 8), torch.tensor([4, 7, 0]), [1, 2])
    assert batch.numbers() == ["4", "70"]
    pad = [PAD] * SEQUENCE_LENGTH
    assert batch.input_ids[0].tolist() == ([IMAGE] * 4 + [ANSWER, 4] + pad)[:SEQUENCE_LENGTH]
    assert batch.input_ids[1].tolist() == ([IMAGE] * 8 + [ANSWER, 7, 0] + pad)[:SEQUENCE_LENGTH]
    assert batch.labels[1].tolist() == ([PAD] * 8 + [7, 0, END] + pad)[:SEQUENCE_LENGTH]
    assert batch.loss_mask.sum(dim=1).tolist() == [2.0, 3.0]
    assert batch.loss_mask[1].nonzero().flatten().tolist() == [8, 9, 10]


def test_same_batch_on_every_rank_and_another_at_every_step(numbers: Numbers) -> None:
    again = Numbers(seed=1)
    first, second = numbers.batch(TRAIN, 5, 32), again.batch(TRAIN, 5, 32)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.input_ids, second.input_ids)
    assert numbers.batch(TRAIN, 6, 32).numbers() != first.numbers()
    assert Numbers(seed=2).batch(TRAIN, 5, 32).numbers() != first.numbers()
    assert sorted(set(first.counts)) == [1, 2, 3, 4]


@pytest.mark.parametrize("lanes", [1, 2, 3, 5])
def test_lanes_share_a_batch(numbers: Numbers, lanes: int) -> None:
    batch = numbers.batch(TRAIN, 0, 16)
    parts = [batch.lane(index, lanes) for index in range(lanes)]
    assert [len(part) for part in parts] == [(i + 1) * 16 // lanes - i * 16 // lanes for i in range(lanes)]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    for part in parts:
        assert part.images.size(0) == sum(part.counts)
        image_tokens = (part.input_ids == IMAGE).sum(dim=1)
        assert image_tokens.tolist() == [count * TOKENS_PER_IMAGE for count in part.counts]


def test_text_of_tokens() -> None:
    assert as_text([1, 2, END, 7]) == "12"
    assert as_text([END]) == ""
    assert as_text([1, PAD, 3]) == "1?3"
