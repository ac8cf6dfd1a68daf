"""Cases of the gradient check: layouts, losses, data. Everything is stated once, for ranks and reference alike."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import tiny_mimo
import torch

STEPS = 3
SAMPLES = 12  # of a microbatch: 1, 2, 3, 4 and 6 lanes divide it
TOKENS = {"images": 60, "audio": 61}  # placeholder of each modality; text is below
MOST_ITEMS = {"images": 2, "audio": 1}  # of one sample

FOLDED = ", folded"  # ends the names of the cases that differ from others in `folded` alone

Sizes = dict[str, int]


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        name: what is special about it.
        encoders: modality -> sizes by dim ("tp", "cp", "dp", "pp"). Their ranks come first, in this order.
        language: sizes of the language model. Its ranks come last.
        colocated: all modules are on the language model's ranks, and run without pipelining.
        language_per_token, encoder_per_token: ``calculate_per_token_loss`` of either side.
        mean_by_lane: the loss function returns a mean over the tokens of its lane (two values) instead of sum and
            number of tokens (three). Only without per-token loss.
        microbatches: of one step.
        tokens: which positions count in the loss: "uneven" (another share of each sample's), "empty microbatch",
            "empty lane" (the first samples of every microbatch have none), "empty step" (the second step has none),
            "none" (no step has any).
        frozen: parts that are not trained: "encoders", "projections", "language".
        optimizer: "sgd" and "adam" are torch's on ``main_grad``; "mimo adam", "mimo sgd" and "mimo distributed" are
            Megatron's.
        clip: ``clip_grad``; only Megatron's optimizers clip.
        text_only: the first samples of every microbatch have no images and no audio.
        text_at_the_end: no sample of the last microbatch of the second step has any.
        position, tied: position embedding of the language model; whether input and output embeddings are one.
        sequence_parallel: of the language model.
        overlap: gradients are reduced during the backward pass.
        folded: the optimizer's step multiplies the gradients by their factor, instead of finalization.
    """

    name: str
    encoders: dict[str, Sizes]
    language: Sizes
    _: KW_ONLY
    colocated: bool = False
    language_per_token: bool = True
    encoder_per_token: bool = True
    mean_by_lane: bool = False
    microbatches: int = 2
    tokens: str = "uneven"
    frozen: tuple[str, ...] = ()
    optimizer: str = "mimo adam"
    clip: float = 0.0
    text_only: bool = False
    text_at_the_end: bool = False
    position: str = "rope"
    tied: bool = False
    sequence_parallel: bool = False
    overlap: bool = False
    folded: bool = False
    language_options: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        language = math.prod(self.language.values())
        if self.colocated:
            return language
        return language + sum(math.prod(sizes.values()) for sizes in self.encoders.values())

    @property
    def layout(self) -> str:
        def text(sizes: Sizes) -> str:
            return ",".join(f"{dim}{size}" for dim, size in sizes.items()) or "1"

        encoders = " + ".join(text(sizes) for sizes in self.encoders.values())
        joint = " on " if self.colocated else " -> "
        return f"{encoders}{joint}{text(self.language)}" + (" sp" if self.sequence_parallel else "")

    @property
    def loss(self) -> str:
        return f"{'token' if self.language_per_token else 'mean'}/{'token' if self.encoder_per_token else 'mean'}"

    @property
    def reference(self) -> str:
        """Name of the case whose run in one process is this one's too."""
        return self.name.removesuffix(FOLDED)

    @property
    def trained_by(self) -> str:
        return self.optimizer + (f" clip {self.clip:g}" if self.clip else "") + (" folded" if self.folded else "")


def lane(index: int, count: int) -> slice:
    """Samples of a lane."""
    return slice(index * SAMPLES // count, (index + 1) * SAMPLES // count)


def microbatch(case: Case, step: int, index: int) -> dict[str, Any]:
    """A whole microbatch.

    Returns:
        "ids", "labels" int64 and "loss_mask" float, all ``[SAMPLES, SEQ]``; for each modality its pictures
        ``[items, 3, 8, 8]`` and under "owner" the sample of each, by modality.
    """
    generator = torch.Generator().manual_seed(1000 * step + index)
    length = tiny_mimo.SEQ
    ids = torch.randint(0, min(TOKENS.values()), (SAMPLES, length), generator=generator)
    data: dict[str, Any] = {"owner": {}}
    free = torch.ones(SAMPLES, dtype=torch.int64)  # first position of each sample that no modality has taken
    for name in case.encoders:
        items = torch.randint(0, MOST_ITEMS[name] + 1, (SAMPLES,), generator=generator)
        items[-1] = MOST_ITEMS[name]  # never a microbatch without
        if case.text_only:
            items[: SAMPLES // 2] = 0
        if case.text_at_the_end and (step, index) == (1, case.microbatches - 1):
            items[:] = 0
        rows = items * tiny_mimo.ROWS_PER_IMAGE
        columns = torch.arange(length)
        ids[(columns >= free[:, None]) & (columns < (free + rows)[:, None])] = TOKENS[name]
        free += rows
        data["owner"][name] = torch.repeat_interleave(torch.arange(SAMPLES), items)
        data[name] = torch.randn(int(items.sum()), 3, 8, 8, generator=generator)
    share = torch.rand(SAMPLES, 1, generator=generator)
    mask = (torch.rand(SAMPLES, length, generator=generator) < share).float()
    empty = (
        case.tokens == "none"
        or (case.tokens == "empty step" and step == 1)
        or (case.tokens == "empty microbatch" and index == 1)
    )
    if empty:
        mask.zero_()
    elif case.tokens == "empty lane":
        mask[: SAMPLES // 2] = 0.0
    labels = torch.randint(0, min(TOKENS.values()), (SAMPLES, length), generator=generator)
    return data | {"ids": ids, "labels": labels, "loss_mask": mask}


def modality_inputs(case: Case, data: dict[str, Any], samples: slice, names: list[str]) -> dict[str, Any]:
    """Encoder inputs of the modalities `names` for some samples; a modality of which they have nothing is left out."""
    inputs = {}
    for name in names:
        owner = data["owner"][name]
        mine = (owner >= samples.start) & (owner < samples.stop)
        if mine.any():
            inputs[name] = {"clip": {"x": data[name][mine]}}
    return inputs


def specs(case: Case, layer_spec: Any) -> tuple[Any, dict[str, Any]]:
    """``(language spec, modality -> spec)`` of whole modules."""
    language, encoder = tiny_mimo.specs(
        language_per_token=case.language_per_token,
        encoder_per_token=case.encoder_per_token,
        tensor_model_parallel_size=case.language.get("tp", 1),
        sequence_parallel=case.sequence_parallel,
        **case.language_options,
    )
    language.params.update(
        transformer_layer_spec=layer_spec,
        position_embedding_type=case.position,
        share_embeddings_and_output_weights=case.tied,
    )
    return language, {name: copy.deepcopy(encoder["images"]) for name in case.encoders}


def is_frozen(case: Case, parameter: str) -> bool:
    """Whether the parameter of this name in the whole model is not trained."""
    if parameter.startswith("language_model."):
        return "language" in case.frozen
    return ("projections" if ".input_projections." in parameter else "encoders") in case.frozen


def make_case(
    name: str,
    images: Sizes,
    language: Sizes,
    loss: str = "token/token",
    audio: Sizes | None = None,
    **rest: Any,
) -> Case:
    """A case with one encoder, or two. `loss` is "language/encoder", each "token" or "mean"."""
    language_loss, encoder_loss = loss.split("/")
    flags = {"language_per_token": language_loss == "token", "encoder_per_token": encoder_loss == "token"}
    encoders = {"images": images} | ({} if audio is None else {"audio": audio})
    return Case(name, encoders, language, **flags, **rest)


MEAN, LANGUAGE_MEAN, ENCODER_MEAN = "mean/mean", "mean/token", "token/mean"

# Not the product of all that varies, but every pair of a kind of layout with a kind of loss, and every other
# value at least with one layout that scatters, one that gathers and one that neither divides.
CASES = [
    # data-parallel sizes: gathered, scattered, equal, not dividing
    make_case("fan-in", {"dp": 2}, {}, microbatches=4),
    make_case("fan-in, mean loss", {"dp": 4}, {"tp": 2}, MEAN, optimizer="mimo sgd", clip=0.3),
    make_case("fan-in, language by mean", {"dp": 4}, {"dp": 2}, LANGUAGE_MEAN, optimizer="sgd"),
    make_case("fan-in, encoder by mean", {"dp": 3}, {}, ENCODER_MEAN, microbatches=1),
    make_case("fan-out", {}, {"dp": 2}, clip=0.3),
    make_case("fan-out, mean loss", {"tp": 2}, {"dp": 2}, MEAN, microbatches=4, optimizer="adam"),
    make_case("fan-out, language by mean", {}, {"dp": 3}, LANGUAGE_MEAN, microbatches=1),
    make_case("fan-out, encoder by mean", {"dp": 2}, {"dp": 4}, ENCODER_MEAN, optimizer="mimo sgd"),
    make_case("equal", {"dp": 2, "tp": 2}, {"dp": 2, "tp": 2}, ENCODER_MEAN, clip=0.3),
    make_case("equal, mean loss by lane", {"dp": 2}, {"dp": 2}, MEAN, mean_by_lane=True, overlap=True),
    make_case("3 -> 2", {"dp": 3}, {"dp": 2}, optimizer="sgd"),
    make_case("3 -> 2, mean loss", {"dp": 3}, {"dp": 2}, MEAN, microbatches=1, clip=0.3),
    make_case("2 -> 3, language by mean", {"dp": 2}, {"dp": 3}, LANGUAGE_MEAN, microbatches=4),
    make_case("2 -> 3, encoder by mean", {"dp": 2}, {"dp": 3}, ENCODER_MEAN, overlap=True),
    # pipelines
    make_case("language pp 2", {"dp": 2}, {"tp": 2, "pp": 2}, microbatches=4, overlap=True),
    make_case("language pp 2, one microbatch", {"dp": 3}, {"dp": 2, "pp": 2}, LANGUAGE_MEAN, microbatches=1),
    make_case("language pp 2, tied embeddings", {"dp": 1}, {"dp": 2, "pp": 2}, MEAN, tied=True, clip=0.3),
    make_case("encoder pp 2", {"pp": 2}, {"dp": 2}, ENCODER_MEAN, microbatches=4, overlap=True),
    make_case("both pp 2, learned positions", {"dp": 2, "pp": 2}, {"pp": 2}, MEAN, position="learned_absolute"),
    # context and sequence parallelism of the language model
    make_case("cp 2", {"dp": 2}, {"cp": 2}),
    make_case("cp 2, mean loss", {}, {"cp": 2, "dp": 2}, MEAN, microbatches=4, clip=0.3),
    make_case("cp 2, mean loss by lane", {"dp": 3}, {"cp": 2, "dp": 2}, MEAN, mean_by_lane=True),
    make_case("cp 2, language by mean", {"dp": 2}, {"cp": 2, "dp": 3}, LANGUAGE_MEAN, optimizer="sgd"),
    make_case("cp 2 and pp 2, encoder by mean", {"dp": 2}, {"cp": 2, "pp": 2}, ENCODER_MEAN, microbatches=4),
    make_case("cp 4, learned positions", {"dp": 2}, {"cp": 4}, microbatches=1, position="learned_absolute"),
    make_case("sp", {"dp": 2}, {"tp": 2}, sequence_parallel=True, optimizer="mimo sgd", clip=0.3),
    make_case("sp and pp 2", {"dp": 1}, {"tp": 2, "pp": 2}, MEAN, sequence_parallel=True, microbatches=4),
    make_case("sp and cp 2", {"dp": 2}, {"tp": 2, "cp": 2}, LANGUAGE_MEAN, sequence_parallel=True, clip=0.3),
    make_case(
        "sp, RMSNorm, learned positions",
        {"dp": 3},
        {"tp": 2, "dp": 2},
        ENCODER_MEAN,
        sequence_parallel=True,
        position="learned_absolute",
        language_options={"normalization": "RMSNorm"},
    ),
    # encoders whose ranks repeat one another
    make_case("encoder cp 2", {"cp": 2}, {"dp": 2}, MEAN),
    make_case("encoder cp 2, language cp 2", {"cp": 2, "dp": 2}, {"cp": 2}, ENCODER_MEAN, clip=0.3),
    # two encoders with sizes of their own
    make_case("two encoders", {"dp": 2}, {"dp": 2}, audio={}, clip=0.3),
    make_case("two encoders, cp 2", {"dp": 3}, {"cp": 2}, MEAN, audio={"tp": 2}),
    make_case("two encoders, encoders by mean", {"dp": 3}, {"dp": 2}, ENCODER_MEAN, audio={}, overlap=True),
    make_case("two encoders of unequal depth", {"pp": 2}, {"dp": 2}, LANGUAGE_MEAN, audio={"dp": 2}, microbatches=4),
    # parts that are not trained
    make_case("frozen encoder", {"dp": 2}, {"dp": 2}, frozen=("encoders",), clip=0.3),
    make_case("frozen projection", {"dp": 3}, {"dp": 2}, ENCODER_MEAN, frozen=("projections",), optimizer="adam"),
    make_case("frozen language model", {"dp": 2}, {"cp": 2}, MEAN, frozen=("language",), optimizer="adam"),
    make_case("only the projection trained", {}, {"pp": 2}, LANGUAGE_MEAN, frozen=("encoders", "language")),
    make_case("only the language model trained", {"dp": 2}, {"tp": 2}, frozen=("encoders", "projections")),
    # tokens that count: none in a microbatch, a lane, a step, at all
    make_case("empty microbatch", {"dp": 3}, {"dp": 2}, microbatches=4, tokens="empty microbatch"),
    make_case("empty microbatch, mean loss", {"dp": 2}, {}, MEAN, tokens="empty microbatch"),
    make_case("empty lane", {"dp": 1}, {"dp": 2}, ENCODER_MEAN, tokens="empty lane", clip=0.3),
    make_case("empty lane, mean loss", {"dp": 2}, {"dp": 2, "cp": 2}, MEAN, tokens="empty lane"),
    make_case("empty step", {"dp": 2}, {"dp": 3}, tokens="empty step", clip=0.3),
    make_case("empty step, mean loss", {"dp": 2}, {"pp": 2}, LANGUAGE_MEAN, tokens="empty step"),
    make_case("no token at all", {"dp": 3}, {"dp": 2}, ENCODER_MEAN, tokens="none", optimizer="mimo sgd"),
    make_case("no token at all, mean loss", {"dp": 2}, {"cp": 2}, MEAN, tokens="none", optimizer="sgd"),
    # lanes with nothing but text
    make_case("text-only lanes", {"dp": 2}, {"dp": 2}, text_only=True, overlap=True),
    make_case("text-only lanes, 3 -> 2", {"dp": 3}, {"dp": 2}, LANGUAGE_MEAN, text_only=True, microbatches=4),
    make_case("text-only lanes, encoder pp 2", {"pp": 2, "dp": 2}, {"dp": 2}, text_only=True, overlap=True),
    make_case("text at the end of a step", {"dp": 2}, {"dp": 2}, MEAN, text_at_the_end=True, overlap=True),
    make_case(
        "text at the end of a step, encoder pp 2", {"pp": 2}, {"dp": 2}, text_at_the_end=True, overlap=True, clip=0.3
    ),
    make_case(
        "colocated, text at the end of a step", {"dp": 2}, {"tp": 2}, colocated=True, text_at_the_end=True, overlap=True
    ),
    # Megatron's distributed optimizer
    make_case("distributed optimizer", {"dp": 2}, {"dp": 2, "tp": 2}, optimizer="mimo distributed", clip=0.3),
    make_case("distributed optimizer, cp 2", {"dp": 2}, {"cp": 2}, ENCODER_MEAN, optimizer="mimo distributed"),
    # all modules on the same ranks, no pipelining
    make_case("colocated", {"dp": 2}, {"dp": 2}, colocated=True, clip=0.3),
    make_case("colocated, sp", {"tp": 2}, {"tp": 2}, MEAN, colocated=True, sequence_parallel=True),
    make_case("colocated, cp 2", {"cp": 2}, {"cp": 2}, colocated=True),
    make_case("colocated, cp 2, mean loss", {"cp": 2, "dp": 2}, {"cp": 2, "dp": 2}, MEAN, colocated=True, clip=0.3),
    make_case("colocated, cp 2, encoder by mean", {"cp": 2}, {"cp": 2}, ENCODER_MEAN, colocated=True),
    make_case("colocated, fan-in", {"dp": 4}, {"tp": 2, "dp": 2}, ENCODER_MEAN, colocated=True, clip=0.3),
    make_case("colocated, fan-out", {"tp": 2}, {"dp": 2}, LANGUAGE_MEAN, colocated=True, microbatches=4),
    make_case("colocated, 2 -> 3", {"cp": 3, "dp": 2}, {"cp": 2, "dp": 3}, MEAN, colocated=True, text_only=True),
    make_case("colocated, fan-in, mean loss", {"dp": 4}, {"dp": 2, "tp": 2}, MEAN, colocated=True, overlap=True),
    make_case("colocated, fan-in, by lane", {"dp": 4}, {"tp": 4}, MEAN, colocated=True, mean_by_lane=True),
    make_case("colocated, fan-out, sgd", {"tp": 2}, {"dp": 2}, ENCODER_MEAN, colocated=True, optimizer="sgd"),
    make_case(
        "colocated, fan-out, language by mean",
        {"dp": 2, "tp": 2},
        {"dp": 4},
        LANGUAGE_MEAN,
        colocated=True,
        microbatches=1,
        clip=0.3,
    ),
    make_case("colocated, 2 -> 3, tp 2", {"dp": 2, "cp": 3}, {"dp": 3, "tp": 2}, MEAN, colocated=True),
    make_case("colocated, fan-in, cp 2", {"dp": 2}, {"cp": 2}, colocated=True, clip=0.3),
    make_case("colocated, tp 2 to cp 2", {"tp": 2, "dp": 2}, {"cp": 2, "dp": 2}, MEAN, colocated=True),
    make_case("colocated, sp and cp 2", {"dp": 4}, {"tp": 2, "cp": 2}, MEAN, colocated=True, sequence_parallel=True),
    Case(
        "colocated, two encoders",
        {"images": {"dp": 4}, "audio": {"tp": 2, "dp": 2}},
        {"tp": 4},
        colocated=True,
        encoder_per_token=False,
    ),
    Case(
        "colocated, one of two encoders equal",
        {"images": {"dp": 2}, "audio": {"tp": 2}},
        {"tp": 2},
        colocated=True,
        clip=0.3,
    ),
    make_case("colocated, text-only lanes", {"dp": 4}, {"dp": 2, "tp": 2}, MEAN, colocated=True, text_only=True),
    make_case("colocated, frozen encoder", {"dp": 2}, {"tp": 2}, colocated=True, frozen=("encoders",)),
    make_case(
        "colocated, frozen language model",
        {"tp": 2},
        {"dp": 2},
        LANGUAGE_MEAN,
        colocated=True,
        frozen=("language",),
        optimizer="adam",
    ),
    make_case(
        "colocated, only the language model trained",
        {"dp": 2},
        {"tp": 2},
        colocated=True,
        frozen=("encoders", "projections"),
    ),
    make_case("colocated, empty lane", {"dp": 2}, {"tp": 2}, ENCODER_MEAN, colocated=True, tokens="empty lane"),
    make_case("colocated, no token at all", {"tp": 2}, {"dp": 2}, colocated=True, tokens="none", optimizer="sgd"),
    make_case(
        "colocated, distributed optimizer", {"dp": 4}, {"dp": 2, "tp": 2}, colocated=True, optimizer="mimo distributed"
    ),
]

# Cases that are trained a second time with the factors of the gradients folded into the optimizer's step.
TWICE = [
    "fan-in, mean loss",
    "fan-out",
    "fan-out, encoder by mean",
    "equal",
    "equal, mean loss by lane",
    "3 -> 2, mean loss",
    "2 -> 3, encoder by mean",
    "language pp 2, tied embeddings",
    "encoder pp 2",
    "cp 2, mean loss",
    "sp and cp 2",
    "encoder cp 2, language cp 2",
    "two encoders",
    "two encoders, cp 2",
    "frozen encoder",
    "only the projection trained",
    "only the language model trained",
    "empty microbatch",
    "empty step",
    "no token at all",
    "text at the end of a step, encoder pp 2",
    "distributed optimizer",
    "distributed optimizer, cp 2",
    "colocated, sp",
    "colocated, fan-in",
    "colocated, two encoders",
    "colocated, distributed optimizer",
]
CASES += [dataclasses.replace(case, name=case.name + FOLDED, folded=True) for case in CASES if case.name in TWICE]
