"""What is wrong with the arguments of the Megatron layer is refused by name, with what was expected and what came.

One table: configs, roles, grids and groups, provider, DDP, gradient hooks, install, folding. Nothing here starts ranks;
what one rank of several refuses is in test_wrong_input_communicators.py.
"""

# ruff: noqa: E501 - the table has a line for each kind
from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.spec_utils import ModuleSpec
from test_folding import Setup
from tiny_mimo import Grid

import mimo_ext.megatron as mimo
from mimo_ext.megatron import parallel_utils as utils
from mimo_ext.megatron.builder import build_hypercomm_grids, populate_embedding_and_position_groups
from mimo_ext.megatron.config import MegatronMIMOParallelismConfig, MimoParallelismConfig, ModuleParallelismConfig
from mimo_ext.megatron.ddp import wrap_mimo_model_distributed
from mimo_ext.megatron.folding import FoldedMimoOptimizer
from mimo_ext.megatron.install import install, installed, uninstall
from mimo_ext.megatron.provider import MegatronMIMOProvider, MimoModelProvider
from mimo_ext.megatron.role import RankRole

RANK = 3


@dataclass(frozen=True)
class Wrong:
    """A call that is refused, and what its message must hold."""

    kind: str
    call: Callable[[], Any]
    error: type[Exception]
    pieces: tuple[str, ...]


def wrong(kind: str, call: Callable[[], Any], error: type[Exception], *pieces: str) -> Wrong:
    return Wrong(kind, call, error, pieces)


def sizes(tp: Any = 1, dp: Any = 1, offset: Any = 0, **others: Any) -> ModuleParallelismConfig:
    return ModuleParallelismConfig(tensor_model_parallel_size=tp, data_parallel_size=dp, rank_offset=offset, **others)


def finalized(images: Any, language: Any = None, world_size: Any = 4, face: Any = MimoParallelismConfig) -> None:
    """Four ranks: two of the encoder, two of the language model where nothing else is said."""
    face({"images": images, "language": language or sizes(dp=2, offset=2)}).finalize(world_size)


CONFIG = [
    wrong("a size of zero", lambda: finalized(sizes(tp=0)), ValueError, "module 'images': tensor_model_parallel_size must be positive, got 0"),
    wrong("a size by name", lambda: finalized(sizes(tp="2")), TypeError, "module 'images': tensor_model_parallel_size: expected an int, got '2' (str)"),
    wrong("half a size", lambda: finalized(sizes(dp=1.5)), TypeError, "module 'images': data_parallel_size: expected an int, got 1.5 (float)"),
    wrong("yes as a size", lambda: finalized(sizes(tp=True)), TypeError, "module 'images': tensor_model_parallel_size: expected an int, got True (bool)"),
    wrong("a negative offset", lambda: finalized(sizes(offset=-1)), ValueError, "module 'images': rank_offset must be non-negative, got -1"),
    wrong("half an offset", lambda: finalized(sizes(offset=0.5)), TypeError, "module 'images': rank_offset: expected an int, got 0.5 (float)"),
    wrong("no copies in a shared world", lambda: finalized(sizes(dp=None)), ValueError, "data_parallel_size must be set for every module", "(module 'images' has none)"),
    wrong("a world by name", lambda: MimoParallelismConfig({"language": sizes(dp=None)}).finalize("4"), TypeError, "module 'language': world_size: expected an int, got '4' (str)"),
    wrong("a world that does not divide", lambda: MimoParallelismConfig({"language": sizes(tp=3, dp=None)}).finalize(4), ValueError, "module 'language': world_size (4) is not divisible by", "(3)"),
    wrong("experts that do not divide", lambda: finalized(sizes(dp=2), sizes(dp=2, offset=2, expert_model_parallel_size=3)), ValueError, "module 'language': TP * CP * DP must be divisible by", "got TP=1, CP=1, DP=2, ETP=1, EP=3"),
    wrong("experts in an encoder", lambda: finalized(sizes(dp=2, expert_model_parallel_size=2)), ValueError, "Encoder modules must remain dense: module 'images' has expert_model_parallel_size=2"),
    wrong("modules in a list", lambda: MimoParallelismConfig([sizes()]).finalize(4), TypeError, "module_parallelisms: expected a dict", "got [ModuleParallelismConfig("),
    wrong("sizes in a dict", lambda: finalized({"tp": 2}), TypeError, "module 'images': expected a ModuleParallelismConfig, got {'tp': 2}"),
    wrong("no language model", lambda: MimoParallelismConfig({"llm": sizes(dp=4)}).finalize(4), ValueError, "Language module 'language' must be in module_parallelisms", "Found modules: ['llm']"),
    wrong("ranks that overlap in part", lambda: finalized(sizes(dp=3)), ValueError, "overlap in part: module 'language' has ranks [2, 4), module 'images' has [0, 3)"),
    wrong("ranks without a module between two", lambda: finalized(sizes(dp=1)), ValueError, "expected module 'language' to start at rank 1, got 2"),
    wrong("ranks without a module at the end", lambda: finalized(sizes(dp=2), world_size=5), ValueError, "covered ranks [0, 4), world_size is 5"),
    wrong("released: three tensor-parallel ranks", lambda: finalized(sizes(tp=3), sizes(offset=3), face=MegatronMIMOParallelismConfig), ValueError, "Module 'images' has TP=3, but TP size must be a power of 2"),
    wrong("released: copies that do not divide", lambda: finalized(sizes(dp=3), sizes(dp=2, offset=3), 5, MegatronMIMOParallelismConfig), ValueError, "Module 'images' has DP=3, module 'language' has DP=2"),
]  # fmt: skip


def role(images: Any, names: tuple[str, ...] = ("images",)) -> RankRole:
    return RankRole.from_grid_map({"images": images, "language": Grid(2, dp=2)}, list(names))


class World:
    """Of four ranks, this one among them."""

    def __enter__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(dist, "is_initialized", lambda: True)
        self._patch.setattr(dist, "get_world_size", lambda group=None: 4)
        self._patch.setattr(dist, "new_group", lambda *_, **__: pytest.fail("a group was made"))

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def embedding_groups(pipelines: Any) -> None:
    with World():
        populate_embedding_and_position_groups(pipelines)


def grids_of(**given: ModuleParallelismConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron.core.hyper_comm_grid.HyperCommGrid", lambda **_: pytest.fail("a grid was made"))
        build_hypercomm_grids(MimoParallelismConfig(given), backend="gloo")


ROLES_AND_GROUPS = [
    wrong("modules of other names", lambda: role(Grid(0, dp=2), ("audio",)), ValueError, "expected ['audio', 'language'], got ['images', 'language']"),
    wrong("a rank in no module", lambda: RankRole.from_grid_map({"images": Grid(0), "language": Grid(1)}, ["images"]), RuntimeError, "Rank 3 is not in any module grid", "'language': (1, 2)"),
    wrong("a module whose grid is missing", lambda: role(None), TypeError, "Rank 3, module 'images': expected a grid, got NoneType without rank_offset, size"),
    wrong("a grid that has no size", lambda: role(SimpleNamespace(rank_offset=0)), TypeError, "Rank 3, module 'images': expected a grid, got SimpleNamespace without size"),
    wrong("grids of sizes that nobody finalized", lambda: grids_of(language=sizes(dp=2), images=sizes(dp=None)), ValueError, "module 'images': expected sizes that finalize() has checked, got data_parallel_size=None"),
    wrong("grids of experts that do not divide", lambda: grids_of(language=sizes(dp=2, expert_model_parallel_size=4)), ValueError, "module 'language': expected sizes that finalize() has checked", "got 2 ranks and a product of 4"),
    wrong("one config under two names", lambda: build_hypercomm_grids(mimo_parallelism_config=1, megatron_mimo_parallelism_config=2), TypeError, "got both 'mimo_parallelism_config' and 'megatron_mimo_parallelism_config'"),
    wrong("pipelines that are ranks", lambda: embedding_groups([0, 1]), TypeError, "rank 3: embedding groups: pipeline 0: expected a list of ranks, got 0 (int)"),
    wrong("a number for pipelines", lambda: embedding_groups(2), TypeError, "rank 3: embedding groups: expected the rank lists of all pipelines or a process group, got 2 (int)"),
    wrong("a pipeline without ranks", lambda: embedding_groups([[0, 1], []]), ValueError, "rank 3: embedding groups: pipeline 1: expected one rank or more, got none"),
    wrong("a pipeline beyond the world", lambda: embedding_groups([[0, 1], [2, 4]]), ValueError, "rank 3: embedding groups: pipeline 1: expected ranks of the world (0..3), got [2, 4]"),
]  # fmt: skip


def provider(face: Any = MimoModelProvider, layout: Any = None, **arguments: Any) -> Any:
    given = {} if layout is None else {"mimo_parallelism_config": MimoParallelismConfig(layout)}
    return face(language_model_spec=ModuleSpec(module=MagicMock, params={}), **given, **arguments)


def in_a_world(call: Callable[[], Any]) -> None:
    with World():
        call()


def not_mine(made: Any) -> Any:
    """The provider's infrastructure is there, and this rank is in none of its modules."""
    made._remember(
        SimpleNamespace(module_to_grid_map={"language": Grid(0, dp=2)}, participating_modules=[], pg_collections={})
    )
    return made.provide()


TWO = {"images": sizes(dp=2), "language": sizes(dp=2, offset=2)}
PROVIDER = [
    wrong("no spec of a language model", lambda: MimoModelProvider().provide(), ValueError, "language_model_spec must be set before calling provide()"),
    wrong("a layout before the world", lambda: provider(layout=TWO).finalize(), RuntimeError, "requires torch.distributed to be initialized before finalize()"),
    wrong("a layout for more ranks", lambda: in_a_world(provider(layout={"language": sizes(dp=5)}).finalize), ValueError, "covered ranks [0, 5), world_size is 4"),
    wrong("a model on a rank without a module", lambda: not_mine(provider(layout={"language": sizes(dp=2)})), ValueError, "Rank 3 does not participate in any module", "'language': (0, 2)"),
    wrong("sizes of a language model of another name", lambda: provider(layout={"llm": sizes(dp=4)}).tensor_model_parallel_size, ValueError, "expected the language model's sizes under 'language'", "got modules ['llm']"),
    wrong("grids of somebody else", lambda: setattr(provider(), "_grids", {"language": Grid(0)}), ValueError, "_grids: expected None or the grids of build_infra(), got others"),
    wrong("DDP without a config", lambda: provider().provide_distributed_model(), ValueError, "ddp_config is required when wrap_with_ddp is True"),
    wrong("two precisions at once", lambda: provider().provide_distributed_model(wrap_with_ddp=False, fp16=True, bf16=True), ValueError, "expected at most one of fp16 and bf16, got both True"),
    wrong("FSDP", lambda: provider().provide_distributed_model(SimpleNamespace(use_megatron_fsdp=True)), NotImplementedError, "FSDP is not yet supported for MIMO models (use_megatron_fsdp=True)"),
    wrong("a meta device", lambda: provider().provide_distributed_model(wrap_with_ddp=False, init_model_with_meta_device=True), NotImplementedError, "init_model_with_meta_device=True is not supported"),
    wrong("virtual pipeline stages", lambda: provider(virtual_pipeline_model_parallel_size=2).provide_distributed_model(wrap_with_ddp=False), NotImplementedError, "virtual_pipeline_model_parallel_size=2 is not supported"),
    wrong("released: global model parallelism", lambda: provider(MegatronMIMOProvider).initialize_model_parallel(), NotImplementedError, "does not use global model parallelism"),
    wrong("released: a standard provider without a language model", lambda: MegatronMIMOProvider(standard_provider=SimpleNamespace()), TypeError, "standard_provider must define build_language_model_spec()"),
]  # fmt: skip


def wrap(grids: dict[str, Any], config: Any = "ddp", **modalities: Any) -> None:
    model = SimpleNamespace(language_model=MagicMock(spec=["config"]), modality_submodules=modalities)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron.core.distributed.DistributedDataParallel", MagicMock())
        wrap_mimo_model_distributed(model, config, None, grids, dict.fromkeys(grids, "groups"))


HERE = {"language": Grid(RANK), "images": Grid(RANK)}
DDP = [
    wrong("a language model without a grid", lambda: wrap({"llm": Grid(RANK)}), ValueError, "Rank 3: expected a grid of the language model under 'language', got grids of ['llm']"),
    wrong("no config of DDP", lambda: wrap(HERE, config=None), ValueError, "Rank 3, module 'language': ddp_config: expected a DistributedDataParallelConfig, got None"),
    wrong("an encoder without a config", lambda: wrap(HERE, images=SimpleNamespace(encoders={"clip": torch.nn.Linear(1, 1)})), AttributeError, "Encoder 'clip' in modality 'images'", "(it is a Linear)"),
    wrong("a modality without parts", lambda: wrap(HERE, images=SimpleNamespace(encoders={})), AttributeError, "Modality 'images' has no encoder, decoder or projection with a 'config'"),
]  # fmt: skip

INFRA = SimpleNamespace(
    module_to_grid_map={"images": Grid(RANK, dp=3), "language": Grid(RANK, dp=2)},
    pg_collections={"images": "groups", "language": "groups"},
)


def batch(samples: Any, micro: Any, microbatches: Any) -> None:
    utils.validate_data_loader_contract(INFRA, samples, micro, microbatches)


def gradients(num_tokens: Any = None, pairs: Any = (), **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_finalize_model_grads", lambda *_, **__: pytest.fail("gradients were reduced"))
        patch.setattr(dist, "broadcast", lambda *_, **__: pytest.fail("something was sent"))
        utils.finalize_model_grads_multimodule(
            None, num_tokens, infra=INFRA, module_to_grid_tuple=list(pairs), **options
        )


def of_infra(name: str) -> tuple[Any, Any]:
    return MagicMock(), INFRA.module_to_grid_map[name]


TRAINING = [
    wrong("no MimoModel inside", lambda: utils.unwrap_megatron_mimo_model(SimpleNamespace(module=3)), RuntimeError, "expected one inside SimpleNamespace, got int"),
    wrong("two modules where one is wanted", lambda: utils.get_active_module_pg(INFRA), AssertionError, "expected exactly one module with process groups on this rank, got 2: ['images', 'language']"),
    wrong("ranks that run nothing", lambda: utils.validate_no_stub_ranks({"language": Grid(0, dp=2)}, 4), ValueError, "Ranks [2, 3] do not participate in any module", "4 ranks"),
    wrong("a module beyond the world", lambda: utils.validate_no_stub_ranks({"images": Grid(0, dp=2), "language": Grid(2, dp=4)}, 4), ValueError, "Module 'language': expected ranks of the world, 0..3, got ranks [2, 6)"),
    wrong("microbatches that do not add up", lambda: batch(12, 6, 3), ValueError, "Microbatch mismatch: 3 * 6 = 18 != global_batch_size (12)"),
    wrong("samples that copies cannot share", lambda: batch(8, 4, 2), ValueError, "Micro batch size 4 not divisible by images DP size 3"),
    wrong("no samples", lambda: batch(0, 0, 0), ValueError, "global_batch_size must be positive, got 0"),
    wrong("negative samples, an even number of times", lambda: batch(12, -6, -2), ValueError, "micro_batch_size must be positive, got -6"),
    wrong("half a microbatch", lambda: batch(6, 12, 0.5), TypeError, "num_microbatches: expected an int, got 0.5 (float)"),
    wrong("a number of tokens that is no tensor", lambda: gradients(5), TypeError, "Rank 3: num_tokens: expected a 0-d integer tensor or None, got 5 (int)"),
    wrong("a module with a grid of another infra", lambda: gradients(pairs=[of_infra("images"), (torch.nn.Linear(1, 1), Grid(RANK, dp=2))]), ValueError, "Rank 3, module_to_grid_tuple: expected grids of infra.module_to_grid_map", "['images', 'language']", "got another one with a Linear"),
    wrong("an optimizer that takes no factor", lambda: gradients(fold_into=object()), TypeError, "Rank 3: expected a FoldedMimoOptimizer as fold_into", "got object"),
]  # fmt: skip


def nested(**second: Any) -> None:
    with install():
        install(**second)


def folded(act: Callable[[Setup], Any]) -> None:
    setup = Setup()
    setup.backward()
    act(setup)


def finalize_twice(setup: Setup) -> None:
    setup.finalize(2.0, 0.5)
    setup.finalize(2.0, 0.5)


def write_after_finalization(setup: Setup) -> None:
    setup.finalize(2.0, 0.5)
    setup.weights["language"].main_grad.add_(1.0)
    setup.optimizer.step()


def step_a_module(setup: Setup) -> None:
    setup.finalize(2.0, 0.5)
    setup.torchs["images"].step()


INSTALL_AND_FOLDING = [
    wrong("a number to exclude", lambda: install(3), TypeError, "exclude: expected names of modules, got 3 (int)"),
    wrong("a module to exclude, not its name", lambda: install([types]), TypeError, "exclude: expected names of modules, got [<module 'types'"),
    wrong("other exclusions inside", lambda: nested(exclude=["a_program"]), ValueError, "exclude of a nested install()", "got also ['a_program']"),
    wrong("overlap inside alone", lambda: nested(overlap=True), ValueError, "overlap of a nested install(): expected False, as in the first call, got True"),
    wrong("an end without a beginning", uninstall, RuntimeError, "uninstall() was called without install()"),
    wrong("an optimizer of another kind", lambda: FoldedMimoOptimizer(torch.optim.SGD([torch.zeros(1)])), TypeError, "expected a MimoOptimizer (of get_mimo_optimizer), got SGD"),
    wrong("gradients finalized twice", lambda: folded(finalize_twice), RuntimeError, "Rank 3, modules ['images', 'language']: expected a step of the optimizer", "got another finalization"),
    wrong("a step without finalization", lambda: folded(lambda setup: setup.optimizer.step()), RuntimeError, "Rank 3, modules ['images', 'language']: expected their gradients to be finalized before each step, got none"),
    wrong("an update without preparation", lambda: folded(lambda setup: setup.optimizer.step_with_ready_grads()), RuntimeError, "Rank 3: expected prepare_grads() before each update, got an update"),
    wrong("gradients written to after finalization", lambda: folded(write_after_finalization), RuntimeError, "Rank 3, module 'language': expected gradients as they were finalized"),
    wrong("a step of one module's own optimizer", lambda: folded(step_a_module), RuntimeError, "Rank 3, module 'images': expected the step of FoldedMimoOptimizer, got one of the module's own"),
]  # fmt: skip

TABLE = [*CONFIG, *ROLES_AND_GROUPS, *PROVIDER, *DDP, *TRAINING, *INSTALL_AND_FOLDING]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, as_rank: Callable[[int], None]) -> Iterator[None]:
    """Rank 3, without a process group; whatever is sent fails."""
    as_rank(RANK)
    for name in ("all_reduce", "all_gather", "broadcast", "new_group", "send", "recv"):
        monkeypatch.setattr(dist, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    with mimo.cpu():
        yield


@pytest.mark.parametrize("case", TABLE, ids=[case.kind for case in TABLE])
def test_it_is_refused_by_name_before_anything_is_sent(case: Wrong, alone: None) -> None:
    with pytest.raises(case.error) as caught:
        case.call()
    assert type(caught.value) is case.error
    for piece in case.pieces:
        assert piece in str(caught.value), str(caught.value)
    assert installed() is None


def test_what_is_right_is_not_refused(alone: None) -> None:
    """The same calls as in the table, with nothing wrong."""
    finalized(sizes(dp=2))
    finalized(sizes(tp=2), face=MegatronMIMOParallelismConfig)
    assert set(role(Grid(0, dp=2)).modules) == {"language"}
    in_a_world(provider(layout={"language": sizes(dp=4)}).finalize)
    wrap(HERE, images=SimpleNamespace(encoders={"clip": SimpleNamespace(config="config")}))
    utils.validate_no_stub_ranks({"images": Grid(0, dp=2), "language": Grid(2, dp=2)}, 4)
    batch(12, 6, 2)
    gradients(pairs=[(None, Grid(RANK)), (MagicMock(), Grid(RANK + 1))])
    with install("a_program"), install(["a_program"]):
        assert installed() is not None


def test_the_table_has_at_least_twenty_five_kinds() -> None:
    kinds = [case.kind for case in TABLE]
    assert len(kinds) == len(set(kinds)) >= 25
