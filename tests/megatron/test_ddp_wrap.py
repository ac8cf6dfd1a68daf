from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest
import torch
from tiny_mimo import Grid

from mimo_ext.megatron.ddp import wrap_megatron_mimo_model_distributed, wrap_mimo_model_distributed


class Language(torch.nn.Module):
    config = "config of the language model"

    def set_input_tensor(self, tensor):
        self.got = tensor


class Wrapper(torch.nn.Module):
    def __init__(self, config, ddp_config, module, pg_collection, **options):
        super().__init__()
        self.module, self.config, self.options = module, config, options
        self.rest = (ddp_config, pg_collection)


def encoder(**attributes):
    made = torch.nn.Module()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def submodule(encoders=None, **parts):
    made = torch.nn.Module()
    made.encoders = torch.nn.ModuleDict(encoders or {})
    for name, value in parts.items():
        setattr(made, name, value)
    return made


def mimo(language=None, **modalities):
    return SimpleNamespace(language_model=language, modality_submodules=torch.nn.ModuleDict(modalities))


@pytest.fixture(autouse=True)
def ddp(monkeypatch, as_rank):
    as_rank(0)
    spy = MagicMock(side_effect=Wrapper)
    monkeypatch.setattr("megatron.core.distributed.DistributedDataParallel", spy)
    return spy


def test_each_module_is_wrapped_over_its_own_groups(ddp):
    language, images = Language(), submodule({"a": encoder(config="config of a"), "b": encoder(config="config of b")})
    model = mimo(language, images=images)
    groups = {"language": object(), "images": object()}
    grids = {"language": Grid(0), "images": Grid(0)}
    assert wrap_mimo_model_distributed(model, "ddp", None, grids, groups) is model
    assert ddp.call_args_list == [
        call(config=language.config, ddp_config="ddp", module=language, pg_collection=groups["language"]),
        call(config="config of a", ddp_config="ddp", module=images, pg_collection=groups["images"]),
    ]
    assert model.language_model.module is language
    assert model.modality_submodules["images"].module is images
    model.language_model.set_input_tensor("x")
    assert language.got == "x"


def test_released_argument_names_and_one_bucket():
    model = mimo(Language())
    wrap_megatron_mimo_model_distributed(
        megatron_mimo_model=model,
        ddp_config="ddp",
        megatron_mimo_parallelism_config=None,
        grids={"language": Grid(0)},
        pg_collections={"language": 1},
    )
    assert model.language_model.options == {}
    model = mimo(Language())
    wrap_mimo_model_distributed(model, "ddp", None, {"language": Grid(0)}, {"language": 1}, disable_bucketing=True)
    assert model.language_model.options == {"disable_bucketing": True}


@pytest.mark.parametrize(
    ("grids", "groups"),
    [
        ({}, {"images": 1}),
        ({"images": Grid(1)}, {"images": 1}),
        ({"images": Grid(0)}, {"images": None}),
        ({"images": Grid(0)}, {}),
    ],
)
def test_modules_of_other_ranks_stay_bare(ddp, grids, groups):
    images = submodule({"a": encoder(config="c")})
    model = mimo(None, images=images)
    wrap_mimo_model_distributed(model, "ddp", None, grids, groups)
    assert model.modality_submodules["images"] is images
    ddp.assert_not_called()


def test_config_without_encoders_comes_from_a_projection(ddp):
    images = submodule(input_projections=torch.nn.ModuleList([encoder(config="of the projection")]))
    wrap_mimo_model_distributed(mimo(None, images=images), "ddp", None, {"images": Grid(0)}, {"images": 1})
    assert ddp.call_args.kwargs["config"] == "of the projection"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (submodule({"clip": encoder()}), "Encoder 'clip' in modality 'images' does not have a 'config' attribute"),
        (submodule(), "Modality 'images' has no encoder, decoder or projection with a 'config'"),
    ],
)
def test_part_without_config_is_named(images, message):
    with pytest.raises(AttributeError, match=message):
        wrap_mimo_model_distributed(mimo(None, images=images), "ddp", None, {"images": Grid(0)}, {"images": 1})


def test_language_model_under_another_name_is_refused(ddp):
    model = mimo(Language())
    with pytest.raises(ValueError, match=r"grid of the language model under 'language', got grids of \['llm'\]"):
        wrap_mimo_model_distributed(model, "ddp", None, {"llm": Grid(0)}, {"llm": 1})
    ddp.assert_not_called()
