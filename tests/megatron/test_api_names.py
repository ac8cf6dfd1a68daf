"""What docs/api.toml lists and no other test looks at by its name; and the check of that table itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pipeline_model as pm
import pytest
import torch
from communicator_fakes import install, make
from megatron.core.transformer.spec_utils import ModuleSpec
from pipeline_model import Case, grid

from mimo_ext.megatron import communicator, config, parallel_utils
from mimo_ext.megatron import provider as provider_module
from mimo_ext.megatron.communicator import MultiModulePipelineCommunicator, RankModuleInfo
from mimo_ext.megatron.model import MimoModel
from mimo_ext.megatron.provider import MegatronMIMOProvider, MimoModelProvider
from mimo_ext.megatron.role import ModuleLayout, ModuleStageInfo, RankRole

ROOT = Path(__file__).resolve().parents[2]
CHAIN = Case(
    "",
    {"images": grid(0, dp=2), "language": grid(2, pp=2), "generator": grid(4, dp=1)},
    {"images": ["language"], "language": ["generator"], "generator": []},
    {"images": [[1, 1]]},
)


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`worlds(size)`: a world of threads on which the communicator runs."""
    return partial(install, monkeypatch)


# --- role


def test_stage_of_a_module_by_its_name() -> None:
    role = RankRole({"images": ModuleStageInfo(True, False), "language": ModuleStageInfo(False, True)})
    assert [role.is_first_stage(name) for name in ("images", "language", "audio")] == [True, False, False]
    assert [role.is_last_stage(name) for name in ("images", "language", "audio")] == [False, True, False]
    assert role.is_first_stage("audio") is False
    assert role.mode is ModuleLayout.UNIFIED


# --- communicator


def test_names_of_the_communicator() -> None:
    assert isinstance(communicator.logger, logging.Logger)
    assert communicator.logger.name == "mimo_ext.megatron.communicator"
    assert isinstance([2, 3], communicator.Shape.__args__[0].__origin__)
    assert isinstance(torch.Size([2]), communicator.Shape.__args__[1])
    bare = RankModuleInfo(0, 1, None, None, None)
    assert (bare.is_source_stage, bare.is_terminal_stage) == (True, True)
    assert dataclasses.asdict(RankModuleInfo(1, 2, None, [], [], False, True))["is_source_stage"] is False


def test_ends_of_the_module_graph(worlds: Any) -> None:
    elsewhere = SimpleNamespace(rank_offset=2, size=2)

    def body(rank: int) -> None:
        made = make(CHAIN)
        names = list(CHAIN.grids)
        assert [made._is_source_module(name) for name in names] == [True, False, False]
        assert [made._is_sink_module(name) for name in names] == [False, False, True]
        assert made.is_current_rank_in_grid(elsewhere) is (rank in (2, 3))

    worlds(5).run(body)


def test_attributes_that_programs_read(worlds: Any) -> None:
    def body(rank: int) -> None:
        made = make(CHAIN)
        assert made.module_to_grid_map is CHAIN.grids
        assert made.topology is CHAIN.topology
        assert made.config is pm.CONFIG
        assert made.module_output_ndim == CHAIN.output_ndim
        assert made.current_rank == rank
        ends = [(edge.src_module_name, edge.dest_module_name) for edge in made.bridge_comms]
        assert ends == [("images", "language"), ("language", "generator")]
        assert made.bridge_comms[0].src_grid is CHAIN.grids["images"]
        assert made.bridge_comms[0].dest_grid is CHAIN.grids["language"]
        assert list(made.rank_module_map) == [["images", "images", "language", "language", "generator"][rank]]
        assert [made.is_module_pp_first_stage(name) for name in CHAIN.grids] == [rank < 2, rank == 2, rank == 4]

    worlds(5).run(body)


def test_stages_of_the_documents_example() -> None:
    """Two encoders feed a language model, which feeds a generator."""
    grids = {
        "image_encoder": grid(0, tp=2, pp=2),
        "audio_encoder": grid(4, pp=3),
        "llm": grid(7, tp=2, pp=4),
        "generator": grid(15, dp=1),
    }
    topology = {"image_encoder": ["llm"], "audio_encoder": ["llm"], "llm": ["generator"], "generator": []}
    count = MultiModulePipelineCommunicator.compute_total_pipeline_stages
    assert count(topology, grids) == max(2, 3) + 4 + 1
    assert [count(topology, grids, rank) for rank in (0, 3, 4, 6, 7, 14, 15)] == [1, 2, 1, 3, 4, 7, 8]
    assert count(topology, grids, rank=14, module_name="llm") == 7
    with pytest.raises(ValueError, match="cycle"):
        count({**topology, "generator": ["llm"]}, grids)


# --- provider


@pytest.mark.parametrize("face", [MimoModelProvider, MegatronMIMOProvider])
@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"init_model_with_meta_device": True}, "init_model_with_meta_device=True is not supported"),
        ({"virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size=2 is not supported"),
    ],
)
def test_fields_that_are_not_supported_are_named(face: Any, field: dict[str, Any], message: str) -> None:
    spec = ModuleSpec(module=Mock, params={})
    with pytest.raises(NotImplementedError, match=message):
        face(language_model_spec=spec, **field).provide_distributed_model(wrap_with_ddp=False)


class Model(torch.nn.Module):
    """Stands for a MimoModel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(pipeline_dtype=None)
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.language_model = None
        self.modality_submodules = torch.nn.ModuleDict()

    def cuda(self, device: Any = None) -> Any:
        raise AssertionError("moved to a device")


@pytest.mark.parametrize("face", [MimoModelProvider, MegatronMIMOProvider])
def test_provide_moves_nothing_to_a_device(monkeypatch: pytest.MonkeyPatch, face: Any) -> None:
    monkeypatch.setattr(provider_module, "MimoModel", Model)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    made = face(language_model_spec=ModuleSpec(module=Mock, params={}))
    model = made.provide()
    assert model.weight.device.type == "cpu"
    assert model.weight.dtype is torch.float32  # the cast is provide_distributed_model's
    with pytest.raises(AssertionError, match="moved to a device"):
        made.provide_distributed_model(wrap_with_ddp=False)


@pytest.mark.parametrize("face", [MimoModelProvider, MegatronMIMOProvider])
def test_overlap_of_the_parameter_gather_asks_for_one_bucket(monkeypatch: pytest.MonkeyPatch, face: Any) -> None:
    asked = []

    def wrap(**kwargs: Any) -> Any:
        asked.append(kwargs.get("disable_bucketing", False))
        return kwargs.get("mimo_model", kwargs.get("megatron_mimo_model"))

    for name in ("wrap_mimo_model_distributed", "wrap_megatron_mimo_model_distributed"):
        monkeypatch.setattr(provider_module, name, wrap)
    monkeypatch.setattr(provider_module, "MimoModel", Model)
    monkeypatch.setattr(provider_module, "build_hypercomm_grids", lambda config: {})
    monkeypatch.setattr(face, "finalize", lambda self: None)
    monkeypatch.setattr(face, "provide", lambda self: Model())
    sizes = config.MimoParallelismConfig({"language": config.ModuleParallelismConfig(data_parallel_size=1)})
    made = face(language_model_spec=ModuleSpec(module=Mock), mimo_parallelism_config=sizes, bf16=False)
    made.provide_distributed_model(ddp_config="ddp")
    made.provide_distributed_model(ddp_config="ddp", overlap_param_gather_with_optimizer_step=True)
    assert asked == [False, True]


# --- parallel utils


def test_logger_of_the_parallel_utils() -> None:
    assert parallel_utils.logger.name == "mimo_ext.megatron.parallel_utils"


# --- model


def test_a_model_closes_its_bridges_once_under_both_names() -> None:
    made = MimoModel.__new__(MimoModel)
    torch.nn.Module.__init__(made)
    made.colocated_comms = {}
    closed: list[str] = []
    for name in ("close", "destroy"):
        made._bridges = SimpleNamespace(close=lambda name=name: closed.append(name))
        assert made.colocated_bridges is made._bridges
        getattr(made, name)()
        getattr(made, name)()
        assert made.colocated_bridges is None
    assert closed == ["close", "destroy"]


# --- the table


@pytest.fixture
def check_api(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_api", ROOT / "scripts" / "check_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "check_api", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_name_is_documented_and_proved(check_api: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    problems = check_api.check()
    assert not problems, "\n".join(problems)
    assert "names" in capsys.readouterr().out


def row(check_api: ModuleType, name: str, **entry: Any) -> Any:
    return check_api.read_row("mimo_ext.megatron.role", {"name": name, **entry})


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("RankRole.absent", {"method": "()"}, "RankRole.absent: no such name"),
        ("RankRole.unified", {"method": "(module_names)"}, "expected a method, got a classmethod"),
        ("RankRole.unified", {"classmethod": "(names)"}, r"expected \(names\), got \(module_names\)"),
        ("RankRole.unified", {"classmethod": "(module_names=None)"}, r"expected \(module_names=None\)"),
        ("RankRole.unified", {"classmethod": "()", "extra": "(module_names)"}, "module_names has no default"),
        ("RankRole.unified", {"classmethod": "(module_names", "extra": ""}, "is no signature"),
        ("RankRole.is_first_stage", {"property": True}, "expected a property, got"),
        ("RankRole.mode", {"field": "ModuleLayout.COLOCATED"}, "expected the default ModuleLayout.COLOCATED"),
        ("RankRole.absent", {"field": "None"}, "no such field"),
        ("ModuleStageInfo.is_first_stage", {"field": "False"}, r"got none \(it is required\)"),
        ("ModuleStageInfo", {"class": "(is_last_stage, is_first_stage)"}, "got .is_first_stage, is_last_stage."),
        ("ModuleLayout.UNIFIED", {"member": "'united'"}, "expected a member with the value 'united'"),
        ("MIMO_LANGUAGE_MODULE_KEY", {"datum": "'llm'"}, "expected 'llm', got 'language'"),
        ("logger", {"datum": "a Handler"}, "expected a Handler"),
        ("RankRole.rank", {"attribute": "rank"}, "no method of the class sets self.rank"),
        ("RankRole", {}, "expected one of class, .*, got none"),
        ("RankRole", {"class": "()", "tests": []}, r"unknown keys \['tests'\]"),
    ],
)
def test_the_check_sees_what_differs(check_api: ModuleType, name: str, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(check_api.Problem, match=message):
        check_api.check_row(row(check_api, name, **entry))


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ([], "no test is named"),
        (["megatron/test_role.py::test_absent"], "does not exist"),
        (["megatron/absent.py::test_x"], "no such file tests/megatron/absent.py"),
        (["megatron/test_role.py"], "test 'megatron/test_role.py'"),
        (["megatron/test_mimo_model.py::TestAlignment::test_absent"], "does not exist"),
    ],
)
def test_the_check_sees_missing_tests(check_api: ModuleType, tests: list[str], message: str) -> None:
    with pytest.raises(check_api.Problem, match=message):
        check_api.check_tests("name", tests)
    check_api.check_tests("name", ["megatron/test_mimo_model.py::TestAlignment::test_equals_upstream"])


def test_the_check_sees_names_that_no_table_has(check_api: ModuleType) -> None:
    known = [row(check_api, name, datum="") for name in ("logger", "RankRole", "RankRole.mode")]
    section = check_api.Section("", "mimo_ext.megatron.role", "document", "", known)
    missing = set(check_api.missing_names([section]))
    assert {"mimo_ext.megatron.role.ModuleLayout", "mimo_ext.megatron.role.RankRole.modules"} <= missing
    assert "mimo_ext.megatron.role.ModuleLayout.UNIFIED" in missing
    assert "mimo_ext.megatron.role.RankRole.mode" not in missing
    assert not [name for name in missing if "._" in name]


def test_the_check_looks_places_up(check_api: ModuleType) -> None:
    place = "megatron/core/pipeline_parallel/bridge_communicator.py"
    assert check_api.check_place("defect", f"{place}:180 dist.barrier") is True
    for wrong, message in [
        (f"{place}:181 dist.barrier", "does not hold 'dist.barrier'"),
        (f"{place}:99999 dist.barrier", "does not hold"),
        (f"{place} dist.barrier", "expected file:line and a word"),
    ]:
        with pytest.raises(check_api.Problem, match=message):
            check_api.check_place("defect", wrong)


def test_places_in_megatron_bridge_are_looked_up_where_it_is_given(
    check_api: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = "megatron/bridge/x.py:2 word"
    monkeypatch.delenv("MIMO_EXT_MEGATRON_BRIDGE", raising=False)
    assert check_api.check_place("defect", place) is False
    check_api._folder_of_release.cache_clear()
    (tmp_path / "megatron" / "bridge").mkdir(parents=True)
    (tmp_path / place.partition(":")[0]).write_text("first\nthe word\n")
    monkeypatch.setenv("MIMO_EXT_MEGATRON_BRIDGE", str(tmp_path))
    assert check_api.check_place("defect", place) is True
