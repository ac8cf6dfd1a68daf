from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, call

import pytest
import torch
from tiny_mimo import Grid

from mimo_ext.megatron import parallel_utils as utils


def mock_module(per_token: bool = False, **config) -> MagicMock:
    made = MagicMock()
    made.config = SimpleNamespace(calculate_per_token_loss=per_token, **config)
    return made


@pytest.fixture
def world(monkeypatch):
    """Infra with an encoder on ranks 0-3 and a language model on 4-5; a rank that is in both is a fiction."""
    finalize = MagicMock()
    monkeypatch.setattr(utils, "_finalize_model_grads", finalize)
    broadcast = MagicMock()
    monkeypatch.setattr("torch.distributed.broadcast", broadcast)
    monkeypatch.setattr(utils, "is_current_rank_in_grid", lambda grid: True)

    def build(encoder: Grid, language: Grid | None):
        grids = {"images": encoder} | ({"language": language} if language else {})
        groups = {name: object() for name in grids}
        return SimpleNamespace(module_to_grid_map=grids, pg_collections=groups)

    return SimpleNamespace(build=build, finalize=finalize, broadcast=broadcast)


def run(world, infra, encoder, language, num_tokens=None, **kwargs):
    pairs = [(language, infra.module_to_grid_map["language"]), (encoder, infra.module_to_grid_map["images"])]
    utils.finalize_model_grads_multimodule(
        ["ignored"], num_tokens, object(), infra=infra, module_to_grid_tuple=pairs, **kwargs
    )


def factors(made) -> list[float]:
    return [float(c.args[0]) for c in made.scale_gradients.call_args_list]


@pytest.mark.parametrize(
    ("encoder_sizes", "encoder_per_token", "language_sizes", "expected"),
    [
        ({"dp": 4}, False, {"dp": 2}, 2.0),
        ({"dp": 2}, False, {"dp": 4}, 0.5),
        ({"dp": 3}, False, {"dp": 2}, 1.5),
        ({"dp": 2}, False, {"dp": 2}, None),
        ({"dp": 4}, True, {"dp": 2}, 0.5),
        ({"dp": 2, "tp": 2}, False, {"dp": 1, "tp": 4, "pp": 2}, 2.0),
        # The language model's CP copies each hold a part of the loss: the mean is over dp x cp.
        ({"dp": 2}, False, {"dp": 2, "cp": 2}, 0.5),
        # An encoder replicated over CP is counted once: 4 DDP ranks, 2 copies of each gradient.
        ({"dp": 2, "cp": 2}, False, {"dp": 1}, 2.0),
        ({"dp": 2, "cp": 2}, True, {"dp": 1}, 0.5),
    ],
)
def test_factor_of_the_mean(world, encoder_sizes, encoder_per_token, language_sizes, expected):
    infra = world.build(Grid(0, **encoder_sizes), Grid(4, **language_sizes))
    encoder, language = mock_module(encoder_per_token), mock_module()
    run(world, infra, encoder, language)
    assert factors(encoder) == ([] if expected is None else [expected])
    language.scale_gradients.assert_not_called()
    world.broadcast.assert_not_called()


def test_encoder_that_splits_its_sequence_over_cp_has_no_copies(world):
    infra = world.build(Grid(0, dp=2, cp=2), Grid(4, dp=1))
    encoder = mock_module(context_parallel_size=2)
    run(world, infra, encoder, mock_module())
    assert factors(encoder) == [4.0]


def test_gtp_remat_ranks_hold_samples_of_their_own(world):
    names = ("tp", "gtp_remat", "cp", "dp", "pp")
    infra = world.build(Grid(0, names=names, dp=2, gtp_remat=2), Grid(4, dp=1))
    encoder = mock_module()
    run(world, infra, encoder, mock_module())
    assert factors(encoder) == [4.0]


def test_language_module_with_the_other_flag_is_scaled_too(world):
    infra = world.build(Grid(0, dp=2), Grid(4, dp=4))
    encoder, language = mock_module(True), mock_module(True)
    run(world, infra, encoder, language)
    assert factors(language) == [0.25]
    assert factors(encoder) == [0.25]


@pytest.mark.parametrize(("per_token", "expected"), [(True, 1 / 50), (False, 4 / 50)])
def test_factor_per_token(world, per_token, expected):
    infra = world.build(Grid(0, dp=4), Grid(4, dp=2))
    encoder, language = mock_module(per_token), mock_module(True)
    tokens = torch.tensor(50)
    run(world, infra, encoder, language, tokens)
    assert factors(encoder) == [pytest.approx(expected)]
    language.scale_gradients.assert_not_called()
    world.broadcast.assert_called_once_with(tokens, src=5)
    assert world.broadcast.call_args.args[0] is tokens


def test_no_tokens_leave_gradients_untouched(world):
    infra = world.build(Grid(0, dp=4), Grid(4, dp=2))
    encoder, language = mock_module(), mock_module(True)
    run(world, infra, encoder, language, torch.tensor(0))
    encoder.scale_gradients.assert_not_called()
    language.scale_gradients.assert_not_called()
    world.broadcast.assert_called_once()


@pytest.mark.parametrize(("tokens", "expected"), [(50, 4 / 50), (0, 1.0)])
def test_tokens_on_a_device_are_not_read(world, monkeypatch, tokens, expected):
    """The path that CUDA tensors take, on a CPU tensor: the factor is a tensor, and 1 where there are no tokens."""
    monkeypatch.setattr(utils, "_on_host", lambda tensor: False)
    infra = world.build(Grid(0, dp=4), Grid(4, dp=2))
    encoder = mock_module()
    run(world, infra, encoder, mock_module(True), torch.tensor(tokens, dtype=torch.int))
    [factor] = [c.args[0] for c in encoder.scale_gradients.call_args_list]
    assert isinstance(factor, torch.Tensor)
    assert factor.dim() == 0
    gradient = torch.ones(3)
    gradient *= factor
    torch.testing.assert_close(gradient, torch.full((3,), expected))


def test_each_module_is_finalized_over_its_own_groups(world):
    infra = world.build(Grid(0, dp=2), Grid(4, dp=2))
    encoder, language, tokens = mock_module(), mock_module(True), torch.tensor(3)
    run(world, infra, encoder, language, tokens, force_all_reduce=True)
    groups = infra.pg_collections
    assert world.finalize.call_args_list == [
        call([language], num_tokens=tokens, pg_collection=groups["language"], force_all_reduce=True),
        call([encoder], num_tokens=None, pg_collection=groups["images"], force_all_reduce=True),
    ]
    assert world.finalize.call_args_list[0].kwargs["num_tokens"] is tokens


def test_modules_are_found_by_the_identity_of_their_grid(world, as_rank):
    as_rank(1)
    infra = world.build(Grid(0, dp=2), Grid(4, dp=2))
    mine, stranger = infra.module_to_grid_map["images"], Grid(0, dp=2)
    # Equal is not the same: this module's gradients would be left as they are, without a word.
    with pytest.raises(ValueError, match=r"expected grids of infra.* got another one with a MagicMock"):
        utils.finalize_model_grads_multimodule(
            None, infra=infra, module_to_grid_tuple=[(mock_module(), mine), (mock_module(), stranger)]
        )
    world.finalize.assert_not_called()
    utils.finalize_model_grads_multimodule(None, infra=infra, module_to_grid_tuple=[(None, stranger), (None, mine)])
    world.finalize.assert_not_called()


def test_without_a_language_module_the_sum_is_wanted(world):
    infra = world.build(Grid(0, dp=2), None)
    encoder = mock_module()
    pairs = [(encoder, infra.module_to_grid_map["images"])]
    utils.finalize_model_grads_multimodule(None, torch.tensor(5), infra=infra, module_to_grid_tuple=pairs)
    assert factors(encoder) == [2.0]
    world.broadcast.assert_not_called()


def test_ranks_outside_a_grid_do_nothing(world, monkeypatch, as_rank):
    monkeypatch.undo()
    as_rank(9)
    grid = Grid(0, dp=2)
    made = mock_module()
    utils.zero_grad_buffer_for_multimodule([(made, grid)])
    with utils.multimodule_no_sync(module_to_grid_tuple=[(made, grid)]):
        pass
    assert made.mock_calls == []


def test_no_sync_enters_and_leaves_each_module_once(as_rank):
    as_rank(1)
    here, elsewhere, plain = MagicMock(), MagicMock(), Mock(spec=[])
    pairs = [(here, Grid(0, dp=2)), (elsewhere, Grid(2)), (plain, Grid(0, dp=2)), (None, Grid(0, dp=2))]
    no_sync = partial(utils.multimodule_no_sync, module_to_grid_tuple=pairs)
    with no_sync():
        here.no_sync.assert_called_once_with()
        here.no_sync.return_value.__enter__.assert_called_once_with()
        here.no_sync.return_value.__exit__.assert_not_called()
    here.no_sync.return_value.__exit__.assert_called_once()
    elsewhere.no_sync.assert_not_called()
    with pytest.raises(TypeError):
        utils.multimodule_no_sync(pairs)


def test_no_sync_leaks_nothing_when_one_raises(as_rank):
    as_rank(0)
    log = []

    @contextmanager
    def context(name, fails_on_exit=False):
        log.append(f"enter {name}")
        try:
            yield
        finally:
            log.append(f"leave {name}")
            if fails_on_exit:
                raise RuntimeError(f"{name} cannot be left")

    def broken():
        raise RuntimeError("cannot be entered")

    grid = Grid(0)
    a = Mock(no_sync=lambda: context("a"))
    b = Mock(no_sync=lambda: context("b", fails_on_exit=True))
    c = Mock(no_sync=broken)
    with (
        pytest.raises(RuntimeError, match="cannot be entered"),
        utils.multimodule_no_sync(module_to_grid_tuple=[(a, grid), (c, grid)]),
    ):
        pytest.fail("the body must not run")
    assert log == ["enter a", "leave a"]
    log.clear()
    with (
        pytest.raises(RuntimeError, match="b cannot be left"),
        utils.multimodule_no_sync(module_to_grid_tuple=[(a, grid), (b, grid)]),
    ):
        pass
    assert log == ["enter a", "enter b", "leave b", "leave a"]
    log.clear()
    with pytest.raises(ZeroDivisionError), utils.multimodule_no_sync(module_to_grid_tuple=[(a, grid)]):
        _ = 1 / 0
    assert log == ["enter a", "leave a"]


def test_zero_grad_buffer_once_per_module(as_rank):
    as_rank(0)
    here, elsewhere = MagicMock(), MagicMock()
    pairs = [(here, Grid(0)), (elsewhere, Grid(1)), (Mock(spec=[]), Grid(0)), (None, Grid(0))]
    utils.zero_grad_buffer_for_multimodule(pairs)
    here.zero_grad_buffer.assert_called_once_with()
    elsewhere.zero_grad_buffer.assert_not_called()


@pytest.mark.parametrize(("rank", "expected"), [(1, False), (2, True), (5, True), (6, False)])
def test_rank_in_grid_is_a_bool_of_two_numbers(as_rank, rank, expected):
    as_rank(rank)
    assert utils.is_current_rank_in_grid(SimpleNamespace(rank_offset=2, size=4)) is expected


def test_active_module():
    groups = object()
    infra = SimpleNamespace(pg_collections={"images": None, "language": groups})
    assert utils.get_active_module_pg(infra) == ("language", groups)
    for collections in ({"images": None}, {"images": groups, "language": groups}):
        with pytest.raises(AssertionError, match="exactly one module"):
            utils.get_active_module_pg(SimpleNamespace(pg_collections=collections))


def test_groups_for_the_schedule():
    from megatron.core.process_groups_config import MultiModuleProcessGroupCollection

    language, images = object(), object()
    made = utils.build_pg_collection_for_schedule(
        SimpleNamespace(pg_collections={"images": images, "language": language})
    )
    assert isinstance(made, MultiModuleProcessGroupCollection)
    assert made.module_pgs == {"images": images, "language": language}
    assert made.language_model_module_name == "language"
    made = utils.build_pg_collection_for_schedule(SimpleNamespace(pg_collections={"images": images, "language": None}))
    assert made.module_pgs == {"images": images}
    assert made.language_model_module_name is None


def test_groups_for_the_schedule_as_a_list(monkeypatch, caplog):
    refusing = Mock(side_effect=TypeError("one module at most"))
    monkeypatch.setattr("megatron.core.process_groups_config.MultiModuleProcessGroupCollection", refusing)
    images = object()
    made = utils.build_pg_collection_for_schedule(SimpleNamespace(pg_collections={"images": images, "language": None}))
    assert made == [images]
    assert "one module at most" in caplog.text


def test_unwrap(monkeypatch):
    class Model:
        pass

    monkeypatch.setattr(utils, "MimoModel", Model)
    model = Model()
    wrapped = SimpleNamespace(module=SimpleNamespace(module=model))
    assert utils.unwrap_megatron_mimo_model(wrapped) is model
    assert utils.unwrap_megatron_mimo_model(model) is model
    with pytest.raises(RuntimeError, match=r"Failed to unwrap model to MimoModel.*got int"):
        utils.unwrap_megatron_mimo_model(SimpleNamespace(module=3))


def test_module_to_grid_tuple(monkeypatch, as_rank, caplog):
    class Model:
        language_model = "the language model"
        modality_submodules = {"images": "the encoder"}  # noqa: RUF012

    monkeypatch.setattr(utils, "MimoModel", Model)
    grids = {"images": Grid(0), "language": Grid(0), "audio": Grid(0), "video": Grid(1)}
    as_rank(0)
    infra = SimpleNamespace(module_to_grid_map=grids)
    pairs = utils.get_module_to_grid_tuple(SimpleNamespace(module=Model()), infra)
    assert pairs == [("the encoder", grids["images"]), ("the language model", grids["language"])]
    assert "module 'audio' is not in the MimoModel" in caplog.text


def test_every_rank_needs_a_module():
    grids = {"images": Grid(0, dp=2), "language": Grid(1, dp=2)}
    utils.validate_no_stub_ranks(grids, world_size=3)
    with pytest.raises(ValueError, match=r"Ranks \[3, 4\] do not participate in any module"):
        utils.validate_no_stub_ranks(grids, world_size=5)


def test_data_loader_contract():
    infra = SimpleNamespace(module_to_grid_map={"images": Grid(0, dp=3), "language": Grid(3, dp=2)})
    check = partial(utils.validate_data_loader_contract, infra=infra)
    check(global_batch_size=12, micro_batch_size=6, num_microbatches=2)
    with pytest.raises(ValueError, match=r"Microbatch mismatch: 3 \* 6 = 18 != global_batch_size \(12\)"):
        check(global_batch_size=12, micro_batch_size=6, num_microbatches=3)
    with pytest.raises(ValueError, match="Micro batch size 4 not divisible by images DP size 3"):
        check(global_batch_size=12, micro_batch_size=4, num_microbatches=3)
    with pytest.raises(ValueError, match="Micro batch size 3 not divisible by language DP size 2"):
        check(global_batch_size=12, micro_batch_size=3, num_microbatches=4)


def test_data_loader_contract_asks_a_grid_that_can_be_asked():
    grid = Mock(spec=["get_pg_size"])
    grid.get_pg_size.return_value = 4
    infra = SimpleNamespace(module_to_grid_map={"images": grid})
    with pytest.raises(ValueError, match="not divisible by images DP size 4"):
        utils.validate_data_loader_contract(infra, 6, 6, 1)
    grid.get_pg_size.assert_called_once_with(["dp"])


def test_dp_size_by_name():
    assert utils._get_dp_size_from_grid(Grid(0, names=("dp", "tp"), dp=3, tp=2)) == 3
