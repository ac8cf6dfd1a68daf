"""Sharded delivery without process groups: what each rank builds of the combined embeddings, and what is refused.

That values and gradients of a whole step are those of replicated delivery is shown on real ranks in
test_sharded_ranks.py.
"""

from __future__ import annotations

import copy
import gc
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from tiny_mimo import Grid

from mimo_ext import RowShards
from mimo_ext.megatron import sharded
from mimo_ext.megatron.model import MimoModel
from mimo_ext.megatron.sharded import OwnPart, SequenceShards, ShardedDelivery
from mimo_ext.megatron.stage_io import ArrivingRows, Input, Output, StageIO

HIDDEN, IMAGE, AUDIO = 3, 90, 91
TOKENS = {"images": IMAGE, "audio": AUDIO}
LAYOUTS = [(2, 1, True), (1, 2, False), (2, 2, True), (2, 2, False), (3, 2, True), (1, 3, False), (4, 1, True)]


class Group:
    """Where a rank stands in a process group."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank


class Embedding(torch.nn.Module):
    """A word and a position embedding of float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.words = torch.nn.Parameter(torch.randn(80, HIDDEN, generator=generator, dtype=torch.float64))
        self.places = torch.nn.Parameter(torch.randn(24, HIDDEN, generator=generator, dtype=torch.float64))

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        embedded = self.words[input_ids]
        if position_ids is not None:
            embedded = embedded + self.places[position_ids]
        return embedded.transpose(0, 1)


class Language(torch.nn.Module):
    """Has an embedding, and nothing else."""

    def __init__(self, config: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding()


class Wire:
    """A bridge that has received what it is going to deliver; keeps what it was asked for."""

    name = "images -> language"

    def __init__(self, rows: torch.Tensor | None = None) -> None:
        self.rows = rows
        self.asked: list[Any] = []
        self.sent: list[Any] = []

    def irecv_forward(self, **options: Any) -> Any:
        self.asked.append(options)
        return SimpleNamespace(wait=lambda: self.rows, done=lambda: True)

    def irecv_backward(self) -> Any:
        raise AssertionError("nothing was sent")

    def send_forward(self, tensor: torch.Tensor, **options: Any) -> None:
        self.sent.append((tensor, options))


def ids_of(seed: int, batch: int = 3, length: int = 24) -> torch.Tensor:
    """Text in half of the positions; one sample has no audio."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 80, (batch, length), generator=generator)
    kind = torch.rand(batch, length, generator=generator)
    ids[kind < 0.3] = IMAGE
    ids[kind > 0.8] = AUDIO
    ids[0][ids[0] == AUDIO] = 7
    return ids


def whole(ids: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Rows of each modality, all samples."""
    generator = torch.Generator().manual_seed(100 + seed)
    return {
        name: torch.randn(int((ids == token).sum()), HIDDEN, generator=generator, dtype=torch.float64)
        for name, token in TOKENS.items()
    }


def combined(ids: torch.Tensor, rows: dict[str, torch.Tensor], text: torch.Tensor) -> torch.Tensor:
    """[s, b, h]: the whole sequence, position by position."""
    out = torch.empty(*ids.shape, HIDDEN, dtype=torch.float64)
    is_text = (ids != IMAGE) & (ids != AUDIO)
    out[is_text] = text
    for name, token in TOKENS.items():
        out[ids == token] = rows[name]
    return out.transpose(0, 1)


def delivery_of(tp: int, cp: int, sequence_parallel: bool) -> ShardedDelivery:
    shards = SequenceShards(tp, cp, sequence_parallel)
    return ShardedDelivery(frozenset(TOKENS), shards, {"images": (1, 2), "language": (1, 2)})


def own_rows(shards: SequenceShards, rows: torch.Tensor, mask: torch.Tensor, shard: int) -> torch.Tensor:
    """Those of a shard, cut out of all rows by the positions of a mask."""
    row_shards = shards.row_shards(mask, 0, 1)
    mine = [s for sample in range(len(mask)) for s, count in row_shards.segments(sample) for _ in range(count)]
    return rows[[index for index, s in enumerate(mine) if s == shard]]


@pytest.mark.parametrize(("tp", "cp", "sequence_parallel"), LAYOUTS)
@pytest.mark.parametrize("seed", range(3))
def test_each_rank_builds_its_part_of_the_combined_embeddings(monkeypatch, tp, cp, sequence_parallel, seed):
    ids, position_ids = ids_of(seed), torch.arange(24).expand(3, -1)
    is_text = (ids != IMAGE) & (ids != AUDIO)
    rows = {name: x.requires_grad_() for name, x in whole(ids, seed).items()}
    embedding = Embedding()
    text = embedding(ids[is_text][None], position_ids[is_text][None]).squeeze(1)
    expected = combined(ids, rows, text)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (expected * weight).sum().backward()
    gradients = {name: x.grad for name, x in rows.items()}
    total = torch.zeros_like(embedding.words), torch.zeros_like(embedding.places)

    delivery = delivery_of(tp, cp, sequence_parallel)
    parts = delivery.shards.parts
    for member in range(tp * cp):
        tp_rank, cp_rank = member % tp, member // tp
        # The tp ranks run in turn: each scatters what all of them have.
        monkeypatch.setattr(
            sharded, "scatter_to_sequence_parallel_region", lambda x, group: x.chunk(parts)[group.rank()]
        )
        shard = member if sequence_parallel else cp_rank
        wires = {}
        for name, token in TOKENS.items():
            leaf = own_rows(delivery.shards, rows[name].detach(), ids == token, shard).requires_grad_()
            wires[name] = Wire(leaf)
        arriving = {
            name: ArrivingRows(torch.empty(0, dtype=torch.float64, requires_grad=True), wire)
            for name, wire in wires.items()
        }
        mine = Embedding()
        groups = Group(cp_rank) if cp > 1 else None, Group(tp_rank) if sequence_parallel else None
        part = OwnPart(delivery, ids, TOKENS, arriving, *groups)
        for name, token in TOKENS.items():
            [asked] = wires[name].asked
            assert asked == {"row_shards": delivery.shards.row_shards(ids == token, 1, 2)}
        got = part.combine(part.text_embeddings(mine, position_ids))
        positions = delivery.shards.positions(24, cp_rank)[tp_rank if sequence_parallel else 0]
        assert got.is_contiguous()
        assert torch.equal(got, expected[positions])
        (got * weight[positions]).sum().backward()
        for name, token in TOKENS.items():
            expected_gradient = own_rows(delivery.shards, gradients[name], ids == token, shard)
            assert torch.equal(arriving[name].tensor.grad, expected_gradient)
        if sequence_parallel or tp_rank == 0:
            total[0].add_(mine.words.grad)
            total[1].add_(mine.places.grad)
    torch.testing.assert_close(total[0], embedding.words.grad)
    torch.testing.assert_close(total[1], embedding.places.grad)


def test_positions_are_where_megatron_puts_the_tokens():
    assert SequenceShards(2, 2, True).positions(8, 0).tolist() == [[0, 1], [6, 7]]
    assert SequenceShards(2, 2, True).positions(8, 1).tolist() == [[2, 3], [4, 5]]
    assert SequenceShards(2, 2, False).positions(8, 1).tolist() == [[2, 3, 4, 5]]
    assert SequenceShards(3, 1, True).positions(9, 0).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(("tp", "cp", "sequence_parallel"), LAYOUTS)
def test_intervals_of_the_sequence_tell_the_same_as_its_positions(tp, cp, sequence_parallel):
    """What language ranks tell an encoder on their ranks about samples that it does not see."""
    shards = SequenceShards(tp, cp, sequence_parallel)
    mask = ids_of(3, batch=4) == IMAGE
    counts = shards.interval_counts(mask)
    assert counts.sum(dim=1).tolist() == mask.sum(dim=1).tolist()
    assert shards.row_shards_of_intervals(counts, 1, 3) == shards.row_shards(mask, 1, 3)
    with pytest.raises(ValueError, match="expected a sequence length divisible by"):
        shards.interval_counts(mask[:, 1:])


def test_multimodal_positions_no_positions_and_one_sample():
    ids = torch.tensor([IMAGE, 1, 2, IMAGE])
    delivery = delivery_of(1, 2, False)
    embedding = Embedding()
    for position_ids, places in [
        (None, 0.0),
        (torch.tensor([[[5, 6, 7, 8]], [[0, 0, 0, 0]], [[0, 0, 0, 0]]]), embedding.places[[6, 7]]),
    ]:
        rows = torch.zeros(0, HIDDEN, dtype=torch.float64)
        arriving = {"images": ArrivingRows(torch.empty(0), Wire(rows))}
        part = OwnPart(delivery, ids, {"images": IMAGE}, arriving, Group(1), None)
        got = part.combine(part.text_embeddings(embedding, position_ids))
        assert torch.equal(got[:, 0], embedding.words[[1, 2]] + places)


def test_ranks_without_text_take_part_in_the_embedding():
    """All of its text is on the other tp rank: a rank's own list is filled up."""
    delivery = delivery_of(2, 1, True)
    seen = []

    class Watching(Embedding):
        def forward(self, input_ids: torch.Tensor, position_ids: Any) -> torch.Tensor:
            seen.append(input_ids.tolist())
            return super().forward(input_ids, position_ids)

    for ids, expected in [([[IMAGE, IMAGE, 5, 6]], [[0, 0, 5, 6]]), ([[IMAGE] * 4], [[0, 0]])]:
        arriving = {"images": ArrivingRows(torch.empty(0), Wire())}
        part = OwnPart(delivery, torch.tensor(ids), {"images": IMAGE}, arriving, None, Group(0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharded, "scatter_to_sequence_parallel_region", lambda x, group: x.chunk(2)[group.rank()])
            part.text_embeddings(Watching(), None)
        assert seen.pop() == expected


def test_an_embedding_that_can_scatter_does_so_in_one_step_and_is_left_as_it_was():
    delivery = delivery_of(2, 1, True)
    ids = torch.tensor([[1, IMAGE, 5, 6]])
    seen = []

    class Scattering(Embedding):
        def __init__(self, add_position_embedding: bool) -> None:
            super().__init__()
            self.scatter_to_sequence_parallel = self.reduce_scatter_embeddings = False
            self.word_embeddings = SimpleNamespace(reduce_scatter_embeddings=False)
            self.add_position_embedding, self.num_tokentypes = add_position_embedding, 0

        def options(self) -> tuple[bool, bool, bool]:
            words = self.word_embeddings.reduce_scatter_embeddings
            return self.scatter_to_sequence_parallel, self.reduce_scatter_embeddings, words

        def forward(self, input_ids: torch.Tensor, position_ids: Any) -> torch.Tensor:
            seen.append(self.options())
            if input_ids.eq(70).any():
                raise RuntimeError("the embedding fails")
            return super().forward(input_ids, position_ids).chunk(2)[1]

    for add_positions, expected in [(False, (True, True, True)), (True, (True, False, False))]:
        embedding = Scattering(add_positions)
        arriving = {"images": ArrivingRows(torch.empty(0), Wire())}
        part = OwnPart(delivery, ids, {"images": IMAGE}, arriving, None, Group(1))
        assert torch.equal(part.text_embeddings(embedding, None), embedding.words[[5, 6]])
        assert seen.pop() == expected
        assert embedding.options() == (False, False, False)
        part = OwnPart(delivery, ids.masked_fill(ids == 1, 70), {"images": IMAGE}, arriving, None, Group(1))
        with pytest.raises(RuntimeError, match="the embedding fails"):
            part.text_embeddings(embedding, None)
        assert embedding.options() == (False, False, False)


def test_rows_and_positions_that_do_not_fit_are_refused():
    delivery = delivery_of(1, 2, False)
    ids = torch.tensor([[IMAGE, 1, 2, 3]])

    def part(rows: torch.Tensor, ids: torch.Tensor = ids) -> OwnPart:
        return OwnPart(delivery, ids, TOKENS, {"images": ArrivingRows(torch.empty(0), Wire(rows))}, Group(0), None)

    with pytest.raises(ValueError, match=r"module 'images': expected 1 rows of width 3 .* got shape \[2, 3\]"):
        part(torch.zeros(2, HIDDEN)).combine(torch.zeros(1, HIDDEN))
    with pytest.raises(ValueError, match=r"Number of audio tokens \(1\) .* embeddings of this modality are missing"):
        part(torch.zeros(1, HIDDEN), torch.tensor([[IMAGE, 1, 2, AUDIO]]))
    with pytest.raises(ValueError, match=r"module 'language': expected a sequence length divisible by 4 .* length 6"):
        part(torch.zeros(1, HIDDEN), torch.zeros(1, 6, dtype=torch.int64))


# --- the model


def model(
    grids: dict[str, Grid] | None, tokens: dict[str, int] = TOKENS, cls: type = MimoModel, **options: Any
) -> MimoModel:
    encoder = ModuleSpec(module=torch.nn.Identity)
    submodule = ModuleSpec(module=VisionModalitySubmodules, params={}, submodules={"encoders": {"encoder": encoder}})
    config = SimpleNamespace(
        hidden_size=HIDDEN,
        # Adapters of the language model's ranks need real groups: none is made.
        context_parallel_size=1,
        sequence_parallel=options.pop("sequence_parallel", False),
        params_dtype=torch.float32,
    )
    names = ["images"] if grids is None else [name for name in grids if name != "language"]
    return cls(
        MimoModelConfig(
            language_model_spec=ModuleSpec(module=Language, params={"config": config}),
            modality_submodules_spec=dict.fromkeys(names, submodule),
            special_token_ids=tokens,
            module_to_grid_map=grids,
            kv_format=options.pop("kv_format", "sbhd"),
        ),
        **options,
    )


TO_CP = {"images": Grid(0, dp=2), "language": Grid(2, cp=2)}


class Reshaping(MimoModel):
    def align_embeddings_by_token_positions(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("grids", "options", "obstacle"),
    [
        (TO_CP, {}, None),
        ({"images": Grid(0, dp=2), "language": Grid(2, tp=2)}, {"sequence_parallel": True}, None),
        ({"images": Grid(0, dp=2), "language": Grid(2, tp=2)}, {}, "sequence parallelism or context parallelism"),
        (None, {}, "expected encoders with grids"),
        (
            {"images": Grid(0, dp=2), "language": Grid(0, dp=2)},
            {},
            "expected encoders on ranks of their own, or with other parallel sizes than the language model",
        ),
        # Its config says nothing of context parallelism: every rank has the whole sequence.
        ({"images": Grid(0, dp=2), "language": Grid(0, cp=2)}, {}, "a language model that splits its sequence"),
        (TO_CP, {"kv_format": "thd"}, "expected kv_format 'sbhd', got 'thd'"),
        (TO_CP, {"tokens": {"audio": AUDIO}}, r"special_token_ids of \['images'\], got none of \['images'\]"),
        (TO_CP, {"cls": Reshaping}, "own align_embeddings_by_token_positions, got that of Reshaping"),
    ],
)
def test_models_deliver_in_shards_where_they_can(as_rank, grids, options, obstacle):
    as_rank(1)
    assert model(grids, **options, sharded_delivery=False).sharded is None
    made = model(grids, **options)
    if obstacle is not None:
        assert made.sharded is None
        with pytest.raises(ValueError, match=rf"Rank 0: sharded_delivery=True: .*{obstacle}"):
            model(grids, **options, sharded_delivery=True)
        return
    assert made.sharded is not None
    assert made.sharded.modules == {"images"}
    assert made.sharded.lanes == {"images": (1, 2)}
    assert made.sharded.shards.num_shards == 2
    assert model(grids, **options, sharded_delivery=True).sharded is not None


def test_a_config_leads_to_the_model_that_was_built_with_it(as_rank):
    as_rank(1)
    made = model(TO_CP)
    config = made.config
    assert sharded.delivery_of(config) is made.sharded
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied.hidden_size == HIDDEN
        assert sharded.delivery_of(copied) is None
    other = model(TO_CP, sharded_delivery=False)
    assert sharded.delivery_of(other.config) is None
    del made, other
    gc.collect()
    assert sharded.delivery_of(config) is None
    assert sharded.delivery_of(object()) is None


@pytest.mark.parametrize("given", [None, False, True])
def test_a_provider_hands_sharded_delivery_on(monkeypatch, given):
    from mimo_ext.megatron import provider

    seen = []
    monkeypatch.setattr(provider, "MimoModel", lambda config, **options: seen.append(options) or SimpleNamespace())
    provider.MimoModelProvider(ModuleSpec(module=Language), sharded_delivery=given).provide()
    assert seen == [{} if given is None else {"sharded_delivery": given}]


def test_an_encoder_rank_says_which_rank_uses_its_rows(as_rank):
    as_rank(1)
    made = model(TO_CP)
    ids = torch.tensor([[IMAGE, IMAGE, 1, 2, 3, 4, IMAGE, 5], [5, 6, 7, 8, 9, IMAGE, 1, 2]])
    made._attach_modality_split_sizes(torch.zeros(4, HIDDEN), ids, "images")
    [shards] = made.sharded.row_shards["images"]
    assert shards == RowShards([[(0, 3)], [(1, 1)]], num_shards=2, num_samples=4, first_sample=2)
    made._attach_modality_split_sizes(torch.zeros(4, HIDDEN), None, "images")
    assert not made.sharded.row_shards["images"]  # nothing of the last output is left for one without ids


def test_inputs_that_were_not_announced_are_refused():
    delivery = delivery_of(1, 2, False)
    assert delivery.take({"images": torch.zeros(1)}) == {}
    first, second = (ArrivingRows(torch.empty(0), Wire()) for _ in range(2))
    delivery.arriving["images"].extend([first, second])
    for inputs in ({"images": second.tensor}, {"audio": first.tensor}, None):
        with pytest.raises(RuntimeError, match=r"module 'language': expected the input of 'images' .* in their order"):
            delivery.take(inputs)
    assert delivery.take({"images": first.tensor}) == {"images": first}
    assert delivery.take({"images": second.tensor}) == {"images": second}


# --- the communicator


def stage_io(inputs: list[Input], outputs: list[Output]) -> StageIO:
    return StageIO(0, torch.float64, torch.device("cpu"), inputs, outputs)


def test_rows_for_the_language_model_are_announced_and_others_received():
    images, audio = Wire(torch.ones(2, HIDDEN, dtype=torch.float64)), Wire(torch.zeros(1, HIDDEN))
    delivery = ShardedDelivery(frozenset(["images"]), SequenceShards(cp=2), {})
    io = stage_io([Input("images", images, False, destination="language"), Input("audio", audio, False)], [])
    io.share(delivery, "language")
    got = io.recv_forward(None)
    assert got["audio"] is audio.rows
    assert got["images"].requires_grad
    assert not images.asked
    [rows] = delivery.arriving["images"]
    assert rows.tensor is got["images"]
    shards = RowShards([[(0, 2)]], 2)
    rows.post(shards)
    assert images.asked == [{"row_shards": shards}]
    assert rows.wait() is got["images"]
    assert torch.equal(got["images"], images.rows)
    assert not got["images"].requires_grad  # as the bridge says: nothing is expected back
    with torch.no_grad():
        assert not io.recv_forward(None)["images"].requires_grad
    io.share(None, "language")
    assert io.recv_forward(None)["images"] is images.rows


def test_row_shards_go_to_the_language_model_only_and_must_be_there():
    to_language, to_generator = Wire(), Wire()
    delivery = ShardedDelivery(frozenset(["images"]), SequenceShards(cp=2), {})
    output = Output("images", [to_language, to_generator], False, 2, destinations=["language", "generator"])
    io = stage_io([], [output])
    io.share(delivery, "language")
    rows = torch.zeros(2, HIDDEN, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"rank 0, module images: .* give input_ids to the encoder's ranks"):
        io.send_forward({"images": rows}, None, {"images": [2]})
    assert not to_language.sent
    shards = RowShards([[(0, 2)]], 2)
    delivery.row_shards["images"].append(shards)
    io.send_forward({"images": rows}, None, {"images": [2]})
    assert to_language.sent == [(rows, {"row_shards": shards})]
    assert to_generator.sent == [(rows, {"row_counts": [2]})]
    assert not delivery.row_shards["images"]
