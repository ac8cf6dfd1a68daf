"""Our MimoModel without process groups: the seam between modules, with stand-ins for encoder and language model."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.mimo import MimoModel as CoreMimoModel
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.config.role import ModuleLayout as ReleasedLayout
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from tiny_mimo import Grid

from mimo_ext.megatron.model import MimoModel
from mimo_ext.megatron.role import ModuleLayout

HIDDEN, IMAGE, AUDIO = 4, 90, 91
CONFIG = SimpleNamespace(
    hidden_size=HIDDEN, context_parallel_size=1, sequence_parallel=False, params_dtype=torch.float32
)


class Encoder(torch.nn.Module):
    """Rows times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((HIDDEN,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Embedding(torch.nn.Module):
    """Row i of the table is i."""

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None) -> torch.Tensor:
        return input_ids.float().unsqueeze(-1).expand(-1, -1, HIDDEN).transpose(0, 1)


class Language(torch.nn.Module):
    """Returns what it was given."""

    def __init__(self, config: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding()
        self.input_tensor = None

    def set_input_tensor(self, tensor: Any) -> None:
        self.input_tensor = tensor

    def forward(self, decoder_input: Any = None, **kwargs: Any) -> Any:
        return self.input_tensor if decoder_input is None else decoder_input


def model(grids: dict[str, Grid] | None = None, names=("images",), **config: Any) -> MimoModel:
    submodule = ModuleSpec(
        module=VisionModalitySubmodules,
        params={},
        submodules={"encoders": {"encoder": ModuleSpec(module=Encoder)}},
    )
    language = ModuleSpec(module=Language, params={"config": SimpleNamespace(**(vars(CONFIG) | config))})
    return MimoModel(
        MimoModelConfig(
            language_model_spec=language,
            modality_submodules_spec=dict.fromkeys(names, submodule),
            special_token_ids={"images": IMAGE, "audio": AUDIO},
            module_to_grid_map=grids,
        )
    )


def rows(count: int, start: int = 0) -> torch.Tensor:
    return (torch.arange(count * HIDDEN).reshape(count, HIDDEN) + start).float()


def inputs(x: torch.Tensor) -> dict[str, Any]:
    return {"images": {"encoder": {"x": x}}}


IDS = torch.tensor([[1, IMAGE, IMAGE, 2], [3, 4, 5, 6], [IMAGE, 7, 8, 9]])


def test_unified_model_runs_all_modules():
    made = model()
    assert isinstance(made, CoreMimoModel)
    assert made.role.mode is ModuleLayout.UNIFIED
    x = rows(3)
    out, loss_mask = made(IDS, modality_inputs=inputs(x), loss_mask="the mask")
    assert loss_mask == "the mask"
    assert out.shape == (4, 3, HIDDEN)
    torch.testing.assert_close(out[1, 0], 2 * x[0])
    torch.testing.assert_close(out[2, 0], 2 * x[1])
    torch.testing.assert_close(out[0, 2], 2 * x[2])
    torch.testing.assert_close(out[3, 1], torch.full((HIDDEN,), 6.0))


@pytest.mark.parametrize("grids", [{"images": Grid(0, dp=2), "language": Grid(0, dp=2)}, {}])
def test_modules_with_equal_sizes_on_the_same_ranks_need_no_bridge(as_rank, grids):
    as_rank(1)
    made = model(grids)
    assert made.role.mode is (ModuleLayout.COLOCATED if grids else ModuleLayout.UNIFIED)
    assert made.colocated_comms == {}
    assert made.mimo_config.module_to_grid_map is grids
    out, _ = made(IDS, modality_inputs=inputs(rows(3)))
    torch.testing.assert_close(out[1, 0], 2 * rows(3)[0])


@pytest.mark.parametrize(
    ("grids", "mode"),
    [
        (None, ReleasedLayout.COLOCATED),
        ({"images": Grid(0, dp=2), "language": Grid(0, dp=2)}, ReleasedLayout.COLOCATED),
        ({"images": Grid(0, dp=2), "language": Grid(2, dp=2)}, ReleasedLayout.NON_COLOCATED),
    ],
)
def test_released_roles_run_every_layout(as_rank, monkeypatch, grids, mode):
    """Programs of the released generation compare the mode by identity with megatron-core's own enum."""
    as_rank(1)
    monkeypatch.setattr(MimoModel, "released_roles", True)
    made = model(grids)
    assert made.role.mode is mode
    out, _ = made(IDS, modality_inputs=inputs(rows(3)))
    if mode is ReleasedLayout.COLOCATED:
        torch.testing.assert_close(out[1, 0], 2 * rows(3)[0])
    else:
        torch.testing.assert_close(out["images"], 2 * rows(3))


@pytest.mark.parametrize(
    ("images", "language", "error", "message"),
    [
        (Grid(0, pp=2), Grid(0, pp=2), NotImplementedError, r"'images' has pipeline_model_parallel_size=2"),
        (Grid(0, dp=2), Grid(1, dp=2), ValueError, r"Rank 0: module 'images' has ranks \[0, 2\), .*\[1, 3\)"),
    ],
)
def test_shared_ranks_that_cannot_work_are_refused_by_name(as_rank, images, language, error, message):
    as_rank(1)
    with pytest.raises(error, match=message):
        model({"images": images, "language": language})


def encoder_rank(as_rank, names=("images",), pp=1, rank=0) -> MimoModel:
    as_rank(rank)
    grids = {name: Grid(0, dp=3, pp=pp) for name in names}
    return model(grids | {"language": Grid(3 * pp, dp=2)}, names)


def test_encoder_rank_counts_rows_of_each_sample(as_rank):
    made = encoder_rank(as_rank)
    assert made.role.mode is ModuleLayout.NON_COLOCATED
    assert made.language_model is None
    out, _ = made(IDS, modality_inputs=inputs(rows(3)))
    torch.testing.assert_close(out["images"], 2 * rows(3))
    # More encoder than language lanes: upstream refuses uneven rows here.
    assert out["images"]._mimo_bridge_split_sizes == [2, 0, 1]
    assert made.row_counts["images"].popleft() == [2, 0, 1]
    out, _ = made(IDS[1:], modality_inputs=inputs(rows(1)))
    assert made.row_counts["images"].popleft() == [0, 1]


def test_even_counts_are_recorded_as_well(as_rank):
    made = encoder_rank(as_rank)
    made(IDS[[0, 0]], modality_inputs=inputs(rows(4)))
    assert list(made.row_counts["images"]) == [[2, 2]]
    made(IDS[:1], modality_inputs=inputs(rows(2)))
    # Nobody took the first entry: it must not be mistaken for the second output's.
    assert list(made.row_counts["images"]) == [[2]]


def test_unknown_counts_leave_no_old_entry(as_rank):
    made = encoder_rank(as_rank)
    made(IDS, modality_inputs=inputs(rows(3)))
    made(None, modality_inputs=inputs(rows(3)))
    assert not made.row_counts["images"]


def test_wrong_number_of_rows_is_named_before_it_is_sent(as_rank):
    made = encoder_rank(as_rank)
    with pytest.raises(ValueError, match=r"Rank 0, module 'images': expected 3 rows.*\[2, 0, 1\].*of 5 rows"):
        made(IDS, modality_inputs=inputs(rows(5)))


def test_stage_inside_the_encoder_counts_nothing(as_rank):
    made = encoder_rank(as_rank, pp=2)
    out, _ = made(IDS, modality_inputs=inputs(rows(9)))
    assert out["images"].shape == (9, HIDDEN)
    assert not made.row_counts["images"]


def test_text_only_batch_sends_zero_rows(as_rank):
    made = encoder_rank(as_rank)
    out, _ = made(IDS[1:2])
    empty = out["images"]
    assert empty.shape == (0, HIDDEN)
    assert empty.requires_grad
    assert empty.dtype == torch.float32
    assert made.row_counts["images"].popleft() == [0]
    made.bfloat16()
    assert made(IDS[1:2])[0]["images"].dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="images inputs are missing"):
        made(IDS)


def test_two_encoders_count_their_own_rows(as_rank):
    made = encoder_rank(as_rank, names=("images", "audio"))
    ids = torch.tensor([[IMAGE, 1, AUDIO], [AUDIO, AUDIO, 2]])
    both = {"images": {"encoder": {"x": rows(1)}}, "audio": {"encoder": {"x": rows(3)}}}
    made(ids, modality_inputs=both)
    assert {name: list(queue) for name, queue in made.row_counts.items()} == {"images": [[1, 0]], "audio": [[1, 2]]}


def language_rank(as_rank, pp=1, rank=3) -> MimoModel:
    as_rank(rank)
    return model({"images": Grid(0, dp=3), "language": Grid(3, pp=pp)})


def test_language_rank_places_what_it_receives(as_rank):
    made = language_rank(as_rank)
    assert len(made.modality_submodules) == 0
    x = rows(3, start=100).requires_grad_()
    made.set_input_tensor([{"images": x}])
    out, _ = made(IDS)
    torch.testing.assert_close(out[1:3, 0], x[:2])
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    torch.testing.assert_close(x.grad, torch.stack([weight[1, 0], weight[2, 0], weight[0, 2]]))


def test_stages_of_the_language_model(as_rank):
    first = language_rank(as_rank, pp=2)
    first.set_input_tensor([{"images": rows(3)}])
    out, _ = first(IDS)
    assert list(out) == ["language"]
    last = language_rank(as_rank, pp=2, rank=4)
    last.set_input_tensor([{"language": [out["language"]]}])
    assert last(IDS)[0] is out["language"]


def test_role_of_a_rank_outside(as_rank):
    with pytest.raises(RuntimeError, match="Rank 9 is not in any module grid"):
        language_rank(as_rank, rank=9)
    with pytest.raises(ValueError, match="must match modality module names"):
        model({"language": Grid(0)})


def test_methods_of_a_model_whose_constructor_was_not_run():
    """As programs' tests do, with stand-ins for what the methods read."""
    stub = MimoModel.__new__(MimoModel)
    stub.special_token_ids = {"images": IMAGE}
    stub.role = SimpleNamespace(mode=ReleasedLayout.NON_COLOCATED)
    stub.mimo_config = SimpleNamespace(language_model_spec=SimpleNamespace(params={"config": CONFIG}))
    output = rows(3)
    stub._attach_modality_split_sizes(output, IDS, "images")
    assert output._mimo_bridge_split_sizes == [2, 0, 1]
    assert stub._empty_encoder_output("images").shape == (0, HIDDEN)


def test_role_can_be_replaced():
    made = model()
    role = made.role
    made.role = "another"
    assert made.role == "another"
    made.role = role


class TestAlignment:
    TOKENS = {"images": IMAGE, "audio": AUDIO}  # noqa: RUF012

    def align(self, embeddings: dict[str, torch.Tensor], ids: torch.Tensor = IDS) -> torch.Tensor:
        return model().align_embeddings_by_token_positions(embeddings, ids, self.TOKENS)

    @pytest.mark.parametrize("seed", range(5))
    def test_values_and_gradients(self, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.tensor([1, IMAGE, AUDIO])[torch.randint(0, 3, (5, 7), generator=generator)]
        where = {"text": ids == 1, "images": ids == IMAGE, "audio": ids == AUDIO}
        embeddings = {
            name: torch.randn(int(mask.sum()), HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
            for name, mask in where.items()
        }
        out = self.align(embeddings, ids)
        assert out.shape == (7, 5, HIDDEN)
        assert out.is_contiguous()
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        (out * weight).sum().backward()
        for name, mask in where.items():
            torch.testing.assert_close(out.transpose(0, 1)[mask], embeddings[name])
            torch.testing.assert_close(embeddings[name].grad, weight.transpose(0, 1)[mask])

    def test_equals_upstream(self):
        embeddings = {"images": rows(3), "text": rows(9, start=50)}
        upstream = CoreMimoModel.align_embeddings_by_token_positions(model(), embeddings, IDS, {"images": IMAGE})
        torch.testing.assert_close(self.align(embeddings), upstream)

    @pytest.mark.parametrize(("name", "count"), [("images", 2), ("images", 4), ("text", 8), ("audio", 1)])
    def test_wrong_count_names_modality_expected_and_got(self, name, count):
        right = {"images": 3, "text": 9, "audio": 0}
        embeddings = {n: rows(c) for n, c in (right | {name: count}).items()}
        message = rf"Number of {name} tokens \({right[name]}\) does not match number of {name} embeddings \({count}\)"
        with pytest.raises(ValueError, match=message):
            self.align(embeddings)

    def test_missing_modality_is_named(self):
        with pytest.raises(ValueError, match=r"images tokens \(3\).*embeddings \(0\): embeddings .* are missing"):
            self.align({"text": rows(9)})

    def test_other_errors(self):
        with pytest.raises(ValueError, match="At least one modality"):
            self.align({})
        with pytest.raises(ValueError, match="No special token ID defined for modality video"):
            self.align({"text": rows(9), "video": rows(3)})
        with pytest.raises(ValueError, match=rf"Embeddings of images: expected shape \[rows, {HIDDEN}\], got \[3, 5\]"):
            self.align({"text": rows(9), "images": torch.zeros(3, 5)})

    def test_modality_without_rows_still_gets_a_gradient(self):
        empty = torch.zeros(0, HIDDEN, requires_grad=True)
        self.align({"text": rows(4), "images": empty}, IDS[1:2]).sum().backward()
        assert empty.grad is not None
        only = torch.zeros(0, HIDDEN, requires_grad=True)
        out = self.align({"images": only}, IDS[1:2])
        assert out.shape == (4, 1, HIDDEN)
        assert not out.any()
        out.sum().backward()
        assert only.grad is not None

    def test_without_text_the_other_positions_are_zero(self):
        out = self.align({"images": rows(3, start=1)})
        assert math.isclose(float(out.sum()), float(rows(3, start=1).sum()))
        assert not out[:, 1].any()

    def test_one_sample_without_batch_dim_and_dtype_of_text(self):
        out = self.align({"text": rows(2).bfloat16(), "images": rows(2)}, IDS[0])
        assert out.shape == (4, 1, HIDDEN)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out[1, 0].float(), rows(2)[0])
