"""The provider against stand-ins: what it calls, with what, in which order (real ranks: test_provider_ranks.py)."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, call

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from mimo_ext.megatron import provider as provider_module
from mimo_ext.megatron.config import MegatronMIMOParallelismConfig, MimoParallelismConfig, ModuleParallelismConfig
from mimo_ext.megatron.provider import MegatronMIMOInfra, MegatronMIMOProvider, MimoModelInfra, MimoModelProvider
from mimo_ext.megatron.role import ModuleLayout, ModuleStageInfo, RankRole

BASE = [["tp"], ["cp"], ["pp"], ["dp"], ["dp", "cp"], ["tp", "cp"], ["tp", "pp"], ["tp", "dp", "cp"]]
BASE += [["tp", "cp", "dp", "pp"]]
EXPERT = [["ep"], ["expt_tp"], ["expt_dp"], ["expt_tp", "ep"], ["expt_tp", "ep", "pp"]]
FACES = pytest.mark.parametrize("face", [MimoModelProvider, MegatronMIMOProvider])


class FakeGrid:
    """Has the groups that the builder makes and no others."""

    def __init__(self, name: str, mine: bool = True) -> None:
        self.name, self.mine = name, mine
        self.rank_offset, self.size = (0, 1) if mine else (1, 1)
        self.groups = {(None, "-".join(dims)): f"{name} {'-'.join(dims)}" for dims in BASE}
        self.groups |= {("expert", "-".join(dims)): f"{name} {'-'.join(dims)}" for dims in EXPERT}

    def get_pg(self, dims, view=None):
        assert isinstance(dims, list)
        return self.groups[view, "-".join(dims)]

    def get_rank_enum(self, dims):
        assert dims == ["pp"]
        return f"pipelines of {self.name}"

    def is_current_rank_in_grid(self):
        return self.mine


def sizes() -> dict[str, ModuleParallelismConfig]:
    return {
        "images": ModuleParallelismConfig(tensor_model_parallel_size=2, data_parallel_size=1),
        "language": ModuleParallelismConfig(
            tensor_model_parallel_size=4, pipeline_model_parallel_size=2, context_parallel_size=3, data_parallel_size=1,
            rank_offset=2,
        ),
    }  # fmt: skip


def make(face=MimoModelProvider, *, parallel=True, **kwargs):
    if parallel:
        config = (MimoParallelismConfig if face is MimoModelProvider else MegatronMIMOParallelismConfig)(sizes())
        key = "mimo_parallelism_config" if face is MimoModelProvider else "megatron_mimo_parallelism_config"
        kwargs[key] = config
    defaults = {
        "language_model_spec": ModuleSpec(module=Mock, params={"config": "config of the language model"}),
        "modality_submodules_spec": {"images": ModuleSpec(module=Mock, params={}, submodules={})},
        "special_token_ids": {"images": 9},
    }
    return face(**(defaults | kwargs))


@pytest.fixture
def stand_ins(monkeypatch):
    """Every name that the provider looks up, replaced in its module."""
    grids = {"images": FakeGrid("images", mine=False), "language": FakeGrid("language")}
    made = SimpleNamespace(
        grids=grids,
        build_hypercomm_grids=MagicMock(return_value=grids),
        populate_embedding_and_position_groups=MagicMock(side_effect=lambda r: (f"pos of {r}", f"embd of {r}")),
        is_pp_first_stage=MagicMock(return_value=True),
        is_pp_last_stage=MagicMock(return_value=False),
        MimoModel=MagicMock(),
        get_model_config=MagicMock(return_value=SimpleNamespace(pipeline_dtype=None)),
    )
    for name, value in vars(made).items():
        if name != "grids":
            monkeypatch.setattr(provider_module, name, value)
    return made


@FACES
def test_defaults(face):
    made = face()
    assert made.language_model_spec is None
    assert made.modality_submodules_spec == {}
    assert made.special_token_ids == {}
    assert (made.freeze_language_model, made.freeze_modality_encoders, made.freeze_modality_projections) == (
        False,
        {},
        {},
    )
    assert (made.fp16, made.bf16, made.use_cpu_initialization, made.init_model_with_meta_device) == (
        False, True, False, False,
    )  # fmt: skip
    assert made.virtual_pipeline_model_parallel_size is None
    assert made._cached_infra is None
    assert made._grids is None


@FACES
def test_sizes_are_the_language_models(face):
    made = make(face)
    assert made.tensor_model_parallel_size == 4
    assert made.pipeline_model_parallel_size == 2
    assert made.context_parallel_size == 3
    bare = make(face, parallel=False)
    assert bare.tensor_model_parallel_size == bare.pipeline_model_parallel_size == bare.context_parallel_size == 1


@FACES
def test_sizes_of_a_language_model_under_another_name_are_refused(face):
    made = make(face)
    config = made._parallelism()
    config.module_parallelisms["llm"] = config.module_parallelisms.pop("language")
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        with pytest.raises(ValueError, match=rf"{name}: expected .* under 'language' .*got modules .*'llm'"):
            getattr(made, name)


def test_infra_of_both_generations():
    assert MegatronMIMOInfra is MimoModelInfra
    infra = MimoModelInfra({}, {}, {}, [])
    assert infra.module_output_ndim == {}


@FACES
def test_infra(stand_ins, face):
    made = make(face)
    infra = made.build_infra()
    config = made._parallelism()
    stand_ins.build_hypercomm_grids.assert_called_once_with(config)
    assert infra.module_to_grid_map is stand_ins.grids
    assert infra.topology == {"images": ["language"], "language": []}
    assert infra.participating_modules == ["language"]
    assert infra.module_output_ndim == {"images": 2, "language": 3}
    assert infra.pg_collections["images"] is None
    groups = infra.pg_collections["language"]
    expected = {
        "tp": "tp", "dp": "dp", "pp": "pp", "cp": "cp", "dp_cp": "dp-cp", "intra_dp_cp": "dp-cp", "tp_cp": "tp-cp",
        "tp_dp_cp": "tp-dp-cp", "mp": "tp-pp", "intra_dist_opt": "tp-cp-dp-pp", "ep": "ep", "expt_tp": "expt_tp",
        "expt_dp": "expt_dp", "intra_expt_dp": "expt_dp", "tp_ep": "expt_tp-ep", "tp_ep_pp": "expt_tp-ep-pp",
        "dp_cp_gtp_remat": "dp-cp", "expt_dp_gtp_remat": "expt_dp", "tp_ep_pp_with_egtp_remat": "expt_tp-ep-pp",
    }  # fmt: skip
    assert {name: getattr(groups, name) for name in expected} == {n: f"language {d}" for n, d in expected.items()}
    # Every rank makes every module's embedding groups.
    assert stand_ins.populate_embedding_and_position_groups.call_args_list == [
        call("pipelines of images"),
        call("pipelines of language"),
    ]
    assert groups.pos_embd == "pos of pipelines of language"
    assert groups.embd == "embd of pipelines of language"


@pytest.mark.parametrize(("first", "last"), [(True, True), (True, False), (False, True), (False, False)])
def test_embedding_groups_by_stage(stand_ins, first, last):
    stand_ins.is_pp_first_stage.return_value, stand_ins.is_pp_last_stage.return_value = first, last
    groups = make().build_infra().pg_collections["language"]
    assert (groups.pos_embd is not None) is first
    assert (groups.embd is not None) is (first or last)


@FACES
def test_infra_without_parallelism(stand_ins, face):
    infra = make(face, parallel=False, modality_submodules_spec={}).build_infra()
    assert infra == MimoModelInfra({}, {"language": []}, {}, [], {})
    stand_ins.build_hypercomm_grids.assert_not_called()


def test_topology_and_ndim_can_be_given(stand_ins):
    infra = make(topology={"language": ["images"], "images": []}, module_output_ndim={"images": 3}).build_infra()
    assert infra.topology == {"language": ["images"], "images": []}
    assert infra.module_output_ndim == {"images": 3}


def test_infra_is_built_once_by_the_cache_only(stand_ins):
    made = make()
    assert made.build_infra() is not made.build_infra()
    assert made._cached_infra is None
    stand_ins.build_hypercomm_grids.reset_mock()
    infra = made.get_or_build_infra()
    made.provide()
    made.provide()
    assert made.get_or_build_infra() is infra
    assert made._grids is infra.module_to_grid_map
    stand_ins.build_hypercomm_grids.assert_called_once()


def test_released_face_builds_once_however_often_it_is_asked(stand_ins):
    made = make(MegatronMIMOProvider)
    assert made.build_infra() is made.build_infra()
    made.provide()
    assert made._grids is stand_ins.grids
    stand_ins.build_hypercomm_grids.assert_called_once()


@FACES
def test_grids_can_be_set_aside_and_brought_back(stand_ins, face):
    """As a program does that saves the provider without what was built from it."""
    made = make(face)
    infra = made.get_or_build_infra()
    grids = made._grids
    made._grids = None
    assert made._grids is made._cached_infra is None
    made._grids = grids
    assert made.get_or_build_infra() is infra
    made._grids = grids
    with pytest.raises(ValueError, match="expected None or the grids of build_infra"):
        made._grids = {"images": object()}
    assert stand_ins.build_hypercomm_grids.call_count == 1


def test_order_of_the_documents_fields():
    made = MimoModelProvider("language", {"images": "spec"}, {"images": 3}, "parallelism", True, {"images": True})
    assert made.mimo_parallelism_config == "parallelism"
    assert made.freeze_language_model is True
    assert made.freeze_modality_encoders == {"images": True}
    with pytest.raises(TypeError, match="positional"):
        MimoModelProvider(*["x"] * 13)


def test_groups_of_a_destroyed_world_are_not_reused(stand_ins, monkeypatch):
    made = make()
    first = made.get_or_build_infra()
    monkeypatch.setattr(provider_module, "_world", lambda: "another world")
    second = made.get_or_build_infra()
    assert second is not first
    assert made.get_or_build_infra() is second


@FACES
def test_provide(stand_ins, face):
    made = make(face)
    spec = made.language_model_spec
    model = made.provide(pre_process="ignored", post_process="ignored", vp_stage="ignored")
    assert model is stand_ins.MimoModel.return_value
    [config], kwargs = stand_ins.MimoModel.call_args
    groups = made._cached_infra.pg_collections["language"]
    assert kwargs == {"cp_group": "language cp", "tp_group": "language tp"}
    assert config.special_token_ids == {"images": 9}
    assert config.module_to_grid_map is stand_ins.grids
    assert config.language_model_spec.params["pg_collection"].tp == "language tp"
    assert config.language_model_spec.params["pre_process"] is True
    assert config.language_model_spec.params["post_process"] is False
    assert config.modality_submodules_spec["images"] is made.modality_submodules_spec["images"]
    assert spec.params == {"config": "config of the language model"}  # the user's spec is as it was
    assert model.pg_collection is groups


def test_roles_of_each_generation(stand_ins):
    """Programs compare the mode by identity with the enum of their generation."""
    from megatron.core.models.mimo.config.role import ModuleLayout as ReleasedLayout

    role = RankRole({"images": ModuleStageInfo(True, True)}, ModuleLayout.NON_COLOCATED)
    stand_ins.MimoModel.side_effect = lambda *args, **kwargs: SimpleNamespace(role=role)
    assert make().provide().role.mode is ModuleLayout.NON_COLOCATED
    assert make(MegatronMIMOProvider).provide().role.mode is ReleasedLayout.NON_COLOCATED


@FACES
def test_provide_without_parallelism(stand_ins, face):
    made = make(face, parallel=False)
    made.provide()
    [config], kwargs = stand_ins.MimoModel.call_args
    assert config.module_to_grid_map is None
    assert config.language_model_spec is made.language_model_spec
    assert kwargs == {}


@FACES
def test_provide_errors(stand_ins, face, as_rank):
    with pytest.raises(ValueError, match="language_model_spec must be set"):
        make(face, language_model_spec=None).provide()
    as_rank(5)
    stand_ins.grids["language"].mine = False
    with pytest.raises(ValueError, match=r"Rank 5 does not participate in any module.*'language': \(0, 1\)"):
        make(face).provide()


def test_language_config_takes_the_grids_sizes(stand_ins):
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=4, hidden_size=8, num_attention_heads=4, pipeline_dtype=torch.float32)
    made = make(language_model_spec=ModuleSpec(module=Mock, params={"config": config}))
    made.provide()
    given = stand_ins.MimoModel.call_args.args[0].language_model_spec.params["config"]
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    assert [getattr(given, name) for name in names] == [4, 2, 3]
    assert [getattr(config, name) for name in names] == [1, 1, 1]


@FACES
def test_modality_spec_gets_groups_and_sizes(face):
    encoder_config, groups = SimpleNamespace(tensor_model_parallel_size=1), SimpleNamespace(tp=MagicMock())
    groups.tp.size.return_value = 2
    spec = ModuleSpec(
        module=Mock,
        submodules={
            "encoders": {
                "a": ModuleSpec(module=Mock, params={"transformer_config": encoder_config}),
                "b": ModuleSpec(module=Mock, params=None),
            },
            "input_projections": [
                ModuleSpec(module=Mock, params=None),
                ModuleSpec(module=Mock, params={"tp_group": "own"}),
                "no spec",
            ],
        },
    )
    before = copy.deepcopy(spec)
    made = face()._inject_pg_collection_into_modality_spec(spec, groups)
    a, b = made.submodules["encoders"].values()
    assert a.params["pg_collection"] is b.params["pg_collection"] is groups
    assert a.params["transformer_config"].tensor_model_parallel_size == 2
    first, second, third = made.submodules["input_projections"]
    assert first.params["tp_group"] is groups.tp
    assert second.params["tp_group"] == "own"
    assert third == "no spec"
    assert spec == before
    assert encoder_config.tensor_model_parallel_size == 1
    assert face()._inject_pg_collection_into_modality_spec(ModuleSpec(module=Mock), groups).submodules is None


@FACES
def test_language_spec_gets_groups(face):
    spec = ModuleSpec(module=Mock, params=None)
    made = face()._inject_pg_collection_into_language_spec(spec, "groups", pre_process=False)
    assert made.params == {"pg_collection": "groups", "pre_process": False}
    assert spec.params is None


def parameters(count: int) -> torch.nn.Module:
    return torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(count)))


def submodule() -> torch.nn.Module:
    made = torch.nn.Module()
    made.encoders, made.input_projections = parameters(1), parameters(1)
    return made


@FACES
@pytest.mark.parametrize(
    ("flags", "frozen"),
    [
        ({}, ()),
        ({"freeze_language_model": True}, ("language_model.",)),
        ({"freeze_modality_encoders": {"a": True, "absent": True}}, ("modality_submodules.a.encoders.",)),
        (
            {"freeze_modality_projections": {"a": False, "b": True}},
            ("modality_submodules.b.input_projections.",),
        ),
    ],
)
def test_freezing(stand_ins, face, flags, frozen):
    model = torch.nn.Module()
    model.language_model = parameters(2)
    model.modality_submodules = torch.nn.ModuleDict({"a": submodule(), "b": submodule()})
    stand_ins.MimoModel.return_value = model
    make(face, **flags).provide()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is not name.startswith(frozen or ("-",)), name


def test_freezing_ranks_without_the_module(stand_ins):
    model = SimpleNamespace(language_model=None, modality_submodules={})
    make(freeze_language_model=True, freeze_modality_encoders={"images": True})._apply_freezing(model)


@FACES
def test_finalize(monkeypatch, face):
    made = make(face)
    with pytest.raises(RuntimeError, match=r"requires torch.distributed to be initialized before finalize\(\)"):
        made.finalize()
    make(face, parallel=False).finalize()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 30)
    with pytest.raises(ValueError, match=r"covered ranks \[0, 26\), world_size is 30"):
        made.finalize()


def test_initialize_model_parallel():
    assert make().initialize_model_parallel(seed=1, seed_kwargs={}, tensor_model_parallel_size=2) is None
    with pytest.raises(NotImplementedError, match="MegatronMIMO does not use global model parallelism"):
        make(MegatronMIMOProvider).initialize_model_parallel(seed=1)


class Model(torch.nn.Module):
    """Stands for a MimoModel: has a config and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(virtual_pipeline_model_parallel_size=None, pipeline_dtype=None)
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.language_model = None
        self.modality_submodules = torch.nn.ModuleDict()


@pytest.fixture
def real_model(stand_ins, monkeypatch):
    from megatron.core.utils import get_model_config

    monkeypatch.setattr(provider_module, "get_model_config", get_model_config)
    stand_ins.MimoModel.side_effect = lambda *args, **kwargs: Model()
    return stand_ins


@FACES
def test_distributed_model_without_parallelism_or_process_group(real_model, face):
    [model] = make(face, parallel=False, bf16=False).provide_distributed_model(wrap_with_ddp=False)
    assert isinstance(model, Model)
    assert model.config.variable_seq_lengths is True
    assert model.config.params_dtype is model.config.pipeline_dtype is torch.float32
    assert (model.config.fp16, model.config.bf16) == (False, False)
    assert model.weight.dtype is torch.float32


@pytest.mark.parametrize(
    ("fields", "arguments", "dtype"),
    [
        ({}, {}, torch.bfloat16),
        ({}, {"fp16": True}, torch.float16),
        ({}, {"bf16": False}, torch.float32),
        ({"fp16": True}, {}, torch.float16),  # bf16 is on by default
        ({"fp16": True, "bf16": False}, {}, torch.float16),
        ({"fp16": True, "bf16": False}, {"bf16": True}, torch.bfloat16),
        ({"bf16": False}, {"bf16": True}, torch.bfloat16),
    ],
)
def test_precision_of_both_faces(real_model, fields, arguments, dtype):
    from megatron.core.transformer.module import Float16Module

    [model] = make(parallel=False, **fields).provide_distributed_model(wrap_with_ddp=False, **arguments)
    assert isinstance(model, Float16Module) is (dtype is not torch.float32)
    inner = model.module if isinstance(model, Float16Module) else model
    assert inner.weight.dtype is inner.config.params_dtype is dtype
    released = make(MegatronMIMOProvider, parallel=False, **fields)
    [model] = released.provide_distributed_model(wrap_with_ddp=False, **arguments)
    assert isinstance(model, Model)
    assert model.weight.dtype is dtype


def test_float16_module_is_megatrons_of_that_moment(real_model, monkeypatch):
    monkeypatch.setattr("megatron.core.transformer.module.Float16Module", lambda config, model: ("other", model))
    [(text, model)] = make(parallel=False).provide_distributed_model(wrap_with_ddp=False)
    assert text == "other"
    assert model.weight.dtype is torch.bfloat16


def test_mixed_precision_wrapper_can_be_given(real_model):
    wrapper = Mock(side_effect=lambda config, model: ("wrapped", model))
    [(text, model)] = make(parallel=False).provide_distributed_model(
        wrap_with_ddp=False, mixed_precision_wrapper=wrapper
    )
    assert text == "wrapped"
    wrapper.assert_called_once_with(model.config, model)
    wrapper.reset_mock()
    make(parallel=False, bf16=False).provide_distributed_model(wrap_with_ddp=False, mixed_precision_wrapper=wrapper)
    wrapper.assert_not_called()


@FACES
def test_what_is_not_supported_is_named(real_model, face):
    made = make(face, parallel=False)
    for flag in ("use_megatron_fsdp", "use_torch_fsdp2"):
        with pytest.raises(NotImplementedError, match=rf"FSDP is not yet supported.*{flag}"):
            made.provide_distributed_model(ddp_config=object(), **{flag: True})
    with pytest.raises(NotImplementedError, match=r"FSDP is not yet supported.*use_megatron_fsdp"):
        made.provide_distributed_model(ddp_config=SimpleNamespace(use_megatron_fsdp=True))
    with pytest.raises(NotImplementedError, match="init_model_with_meta_device"):
        made.provide_distributed_model(wrap_with_ddp=False, init_model_with_meta_device=True)
    with pytest.raises(NotImplementedError, match="virtual_pipeline_model_parallel_size=2"):
        make(face, parallel=False, virtual_pipeline_model_parallel_size=2).provide_distributed_model(
            wrap_with_ddp=False
        )
    with pytest.raises(ValueError, match="ddp_config is required"):
        made.provide_distributed_model()
    with pytest.raises(ValueError, match="at most one of fp16 and bf16"):
        made.provide_distributed_model(wrap_with_ddp=False, fp16=True, bf16=True)


def test_hooks_run_in_order_and_given_ones_replace_registered_ones(real_model):
    made = make(parallel=False)
    log = []

    def hook(name, result=None):
        def run(models):
            log.append((name, type(models[0]).__name__))
            return result

        return run

    made.register_pre_wrap_hook(hook("second"))
    made.register_pre_wrap_hook(hook("first"), prepend=True)
    made.register_post_wrap_hook(hook("after"))
    made.provide_distributed_model(wrap_with_ddp=False)
    assert log == [("first", "Model"), ("second", "Model"), ("after", "Float16Module")]

    log.clear()
    replaced = [Model()]
    result = ["what the hook returns"]
    models = made.provide_distributed_model(
        wrap_with_ddp=False, pre_wrap_hook=[hook("a", replaced), hook("b")], post_wrap_hook=hook("c", result)
    )
    assert models is result
    assert log == [("a", "Model"), ("b", "Model"), ("c", "Float16Module")]
    assert replaced[0].config.variable_seq_lengths is True

    assert make()._resolve_hooks(None) is None
    single = hook("x")
    assert make()._resolve_hooks(single) is single


@pytest.mark.parametrize(("face", "wrapper", "model_key"), [
    (MimoModelProvider, "wrap_mimo_model_distributed", "mimo_model"),
    (MegatronMIMOProvider, "wrap_megatron_mimo_model_distributed", "megatron_mimo_model"),
])  # fmt: skip
def test_ddp_wrapping(real_model, monkeypatch, face, wrapper, model_key):
    wrap = Mock(side_effect=lambda **kwargs: kwargs[model_key])
    monkeypatch.setattr(provider_module, wrapper, wrap)
    monkeypatch.setattr(face, "finalize", lambda self: None)
    made = make(face)
    [model] = made.provide_distributed_model(ddp_config="ddp")
    inner = model if face is MegatronMIMOProvider else model.module
    kwargs = wrap.call_args.kwargs
    assert kwargs[model_key] is inner
    assert kwargs["ddp_config"] == "ddp"
    assert kwargs["grids"] is real_model.grids
    assert kwargs["pg_collections"] is made._cached_infra.pg_collections
    assert inner.weight.dtype is torch.bfloat16
    real_model.build_hypercomm_grids.assert_called_once()


@FACES
def test_the_model_moves_to_the_gpu_unless_told_otherwise(real_model, monkeypatch, face):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr(face, "_move_frozen_params_to_device", staticmethod(lambda model: None))
    moved = []
    monkeypatch.setattr(Model, "cuda", lambda self, device: moved.append(device), raising=False)
    made = make(face, parallel=False, bf16=False)
    made.provide_distributed_model(wrap_with_ddp=False)
    assert moved == [3]
    made.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    made.use_cpu_initialization = True
    made.provide_distributed_model(wrap_with_ddp=False)
    assert moved == [3]
    # Only the released default None can be told from an explicit False.
    made.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=False)
    assert moved == ([3, 3] if face is MegatronMIMOProvider else [3])


def test_finalize_of_bridge_configs(monkeypatch):
    import sys

    class TransformerConfig:
        finalize = Mock()

    module = SimpleNamespace(TransformerConfig=TransformerConfig)
    monkeypatch.setitem(sys.modules, "megatron.bridge.models.transformer_config", module)
    foreign = Mock()
    specs = {
        "images": ModuleSpec(
            module=Mock,
            submodules={
                "encoders": {"a": ModuleSpec(module=Mock, params={"transformer_config": TransformerConfig()})},
                "input_projections": [ModuleSpec(module=Mock, params={"config": TransformerConfig(), "x": foreign})],
            },
        ),
        "audio": None,
    }
    language = ModuleSpec(module=Mock, params={"config": TransformerConfig()})
    provider_module._finalize_transformer_configs_in_specs(language, specs)
    assert TransformerConfig.finalize.call_count == 3
    foreign.finalize.assert_not_called()


class Standard:
    """A provider of a single model."""

    tensor_model_parallel_size = context_parallel_size = pipeline_model_parallel_size = 1
    expert_model_parallel_size = expert_tensor_parallel_size = 1
    mtp_num_layers = 2
    special_token_ids = {"images": 5}  # noqa: RUF012
    modality_keys = {"images": "vit"}  # noqa: RUF012

    def __init__(self) -> None:
        self.stages = []

    def build_language_model_spec(self, pp_rank):
        self.stages.append(pp_rank)
        return ModuleSpec(module=Mock, params={"stage": pp_rank})

    def build_vision_encoder_spec(self):
        return ModuleSpec(module=Mock, params={"of": "the vision encoder"})


def test_from_standard_provider(stand_ins, monkeypatch):
    standard = Standard()
    made = MegatronMIMOProvider.from_standard_provider(
        standard_provider=standard, megatron_mimo_parallelism_config=MegatronMIMOParallelismConfig(sizes())
    )
    assert standard.stages == [0]
    assert standard.tensor_model_parallel_size == 4
    assert standard.pipeline_model_parallel_size == 2
    assert standard.context_parallel_size == 3
    assert standard.mtp_num_layers is None
    assert made.special_token_ids == {"images": 5}
    encoder = made.modality_submodules_spec["images"].submodules["encoders"]["vit"]
    assert encoder.params == {"of": "the vision encoder"}
    monkeypatch.setattr("torch.distributed.get_rank", lambda group=None: {"language pp": 1}[group])
    made.provide()
    assert standard.stages == [0, 1]
    assert stand_ins.MimoModel.call_args.args[0].language_model_spec.params["stage"] == 1


def test_standard_provider_that_lacks_something():
    class Bare:
        special_token_ids = None

    for missing, attributes in (
        ("build_language_model_spec", {}),
        ("build_vision_encoder_spec", {"build_language_model_spec": lambda: ModuleSpec(module=Mock)}),
        ("special_token_ids", {
            "build_language_model_spec": lambda: ModuleSpec(module=Mock),
            "build_mimo_modality_submodules_spec": lambda: {"images": ModuleSpec(module=Mock)},
        }),
    ):  # fmt: skip
        standard = Bare()
        vars(standard).update(attributes)
        with pytest.raises(TypeError, match=missing):
            MegatronMIMOProvider(standard_provider=standard)
