"""Handwritten numbers of one to four digits, composed from the digit images that scikit-learn ships.

Every rank composes the same global batch from (seed, split, step) and keeps the samples of its own data-parallel lane,
so no rank has to hand data to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

IMAGE_SIZE = 8
PATCH_SIZE = 4
TOKENS_PER_IMAGE = (IMAGE_SIZE // PATCH_SIZE) ** 2
MAX_DIGITS = 4

# Vocabulary: the ten digits, then the special tokens. 16 entries, which 1, 2 or 4 tensor-parallel ranks share evenly.
END, PAD, IMAGE, ANSWER = 10, 11, 12, 13
VOCAB_SIZE = 16
SEQUENCE_LENGTH = MAX_DIGITS * TOKENS_PER_IMAGE + 1 + MAX_DIGITS  # image tokens, the ANSWER token, the digits

TRAIN, TEST = 0, 1


@dataclass
class NumberBatch:
    """A batch of B numbers that show N digit images in all.

    Attributes:
        images: float32 ``[N, 8, 8]``, in the order of the samples.
        counts: digit images of each sample, B ints.
        input_ids: int64 ``[B, S]``: image tokens, ANSWER, the digits, PAD.
        labels: int64 ``[B, S]``: the token that follows; END after the last digit, PAD where no loss is taken.
        loss_mask: float32 ``[B, S]``: 1 where the model writes its answer (ANSWER and the digits), else 0.
        position_ids: int64 ``[B, S]``.
    """

    images: torch.Tensor
    counts: list[int]
    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.counts)

    def samples(self, start: int, stop: int) -> NumberBatch:
        """The samples ``[start, stop)`` with their images."""
        first = sum(self.counts[:start])
        last = first + sum(self.counts[start:stop])
        rows = slice(start, stop)
        return NumberBatch(
            self.images[first:last],
            self.counts[rows],
            self.input_ids[rows],
            self.labels[rows],
            self.loss_mask[rows],
            self.position_ids[rows],
        )

    def lane(self, index: int, lanes: int) -> NumberBatch:
        """The samples of lane `index` of `lanes`: ``[floor(index * B / lanes), floor((index + 1) * B / lanes))``."""
        return self.samples(index * len(self) // lanes, (index + 1) * len(self) // lanes)

    def to(self, device: torch.device) -> NumberBatch:
        """The same batch with its tensors on `device`."""
        tensors = (self.input_ids, self.labels, self.loss_mask, self.position_ids)
        return NumberBatch(self.images.to(device), self.counts, *(tensor.to(device) for tensor in tensors))

    def numbers(self) -> list[str]:
        """The numbers shown, as text."""
        return [as_text(row[mask.bool()].tolist()) for row, mask in zip(self.labels, self.loss_mask, strict=True)]


def as_text(tokens: Sequence[int]) -> str:
    """Text of an answer's tokens, up to its END; a token that is neither a digit nor END is written '?'."""
    text = ""
    for token in tokens:
        if token == END:
            return text
        text += str(token) if token < 10 else "?"
    return text


class Numbers:
    """Numbers composed from handwritten digits; images of the test split never occur in the training split.

    Args:
        seed: decides the split of the images and every composition.
        test_fraction: share of the images, of every digit, that is held out.
    """

    def __init__(self, seed: int, test_fraction: float = 0.2) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.seed = seed
        self._images = torch.from_numpy(digits.images.astype(np.float32) / 8.0 - 1.0)
        self._digits = torch.from_numpy(digits.target.astype(np.int64))
        order = np.random.default_rng([seed, 2]).permutation(len(self._digits))
        test: list[int] = []
        train: list[int] = []
        for digit in range(10):
            of_digit = order[digits.target[order] == digit]
            held_out = round(len(of_digit) * test_fraction)
            test.extend(of_digit[:held_out])
            train.extend(of_digit[held_out:])
        self.indices = {TRAIN: np.sort(np.array(train)), TEST: np.sort(np.array(test))}

    def batch(self, split: int, step: int, size: int) -> NumberBatch:
        """The batch of `size` numbers of `split` (TRAIN or TEST) at `step`; the same on every rank."""
        rng = np.random.default_rng([self.seed, split, step])
        counts = rng.integers(1, MAX_DIGITS + 1, size).tolist()
        chosen = torch.from_numpy(rng.choice(self.indices[split], sum(counts)))
        return compose(self._images[chosen], self._digits[chosen], counts)


def compose(images: torch.Tensor, digits: torch.Tensor, counts: Sequence[int]) -> NumberBatch:
    """Make a batch of digit images.

    Args:
        images: float32 ``[N, 8, 8]``.
        digits: int64 ``[N]``, what the images show.
        counts: images of each sample; their sum is N.
    """
    size = len(counts)
    input_ids = torch.full((size, SEQUENCE_LENGTH), PAD, dtype=torch.int64)
    labels = torch.full((size, SEQUENCE_LENGTH), PAD, dtype=torch.int64)
    loss_mask = torch.zeros(size, SEQUENCE_LENGTH)
    first = 0
    for row, count in enumerate(counts):
        answer = digits[first : first + count]
        start = count * TOKENS_PER_IMAGE
        input_ids[row, :start] = IMAGE
        input_ids[row, start] = ANSWER
        input_ids[row, start + 1 : start + 1 + count] = answer
        labels[row, start : start + count] = answer
        labels[row, start + count] = END
        loss_mask[row, start : start + count + 1] = 1.0
        first += count
    position_ids = torch.arange(SEQUENCE_LENGTH).expand(size, -1).contiguous()
    return NumberBatch(images, list(counts), input_ids, labels, loss_mask, position_ids)
