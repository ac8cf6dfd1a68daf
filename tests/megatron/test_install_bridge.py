"""`mimo_ext.megatron.install` and Megatron-Bridge: its sources, and stand-ins for what other versions have."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import textwrap
import types
from typing import Any

import bridge_sources
import pytest
from install_program_ranks import PROGRAM, Case, Row, problems, run_program
from launch import launch, run_ranks

import mimo_ext.megatron
from mimo_ext.megatron import _stand_ins

BRIDGE_PROGRAM = PROGRAM.with_name("install_program_bridge.py")
MIMO = "megatron.bridge.models.megatron_mimo."
TESTS = ("test_install", "test_install_bridge", "test_mimo_model", "test_communicator", "test_role")


@pytest.fixture(scope="module")
def sources() -> str:
    return str(bridge_sources.require().resolve())


def run(sources: str, world_size: int, install: bool, *arguments: str) -> Any:
    return run_ranks(run_program, world_size, install, [*arguments, "--ragged"], BRIDGE_PROGRAM, sources, timeout=120)


def test_a_program_of_megatron_bridge_trains_the_same_on_ours_and_where_it_is_refused(sources: str) -> None:
    """Losses, gradient norms and weights of a layout that Megatron trains; the losses of one that it refuses."""
    released = run(sources, 3, False).check()
    ours = run(sources, 3, True).check()
    assert problems([Row(Case("fan-out", "dp=1", "dp=2", 3, True), released, "", ours)]) == []
    assert {result["provider"] for result in released} == {MIMO + "megatron_mimo_provider"}
    assert {result["provider"] for result in ours} == {"mimo_ext.megatron._released_provider"}
    assert all(result["released_bridges"] for result in released)

    fan_in = ("--encoder", "dp=2", "--language", "dp=1")
    refused = run(sources, 3, False, *fan_in)
    assert "Fan-in with variable modality token counts is not supported" in "".join(refused.errors.values())
    for result in run(sources, 3, True, *fan_in).check():
        assert result["losses"] == pytest.approx(released[0]["losses"], rel=1e-5)


NAMES = [(home, name, ours) for home, names in _stand_ins.BRIDGE_HOMES.items() for name, ours in names.items()]
RELEASED = [entry for entry in NAMES if not entry[0].startswith("megatron.bridge.models.mimo.")]


def our_object(ours: str, name: str) -> Any:
    return getattr(importlib.import_module(f"mimo_ext.megatron.{ours}"), name)


def check_names(expect_ours: bool) -> None:
    for home, name, ours in RELEASED:
        value = getattr(importlib.import_module(home), name)
        assert (value is our_object(ours, name)) is expect_ours, (home, name, value)
    for importer, name in (
        (MIMO + "megatron_mimo_provider", "build_hypercomm_grids"),
        (MIMO + "megatron_mimo_provider", "MimoModel"),
        (MIMO + "megatron_mimo_provider", "wrap_megatron_mimo_model_distributed"),
        (MIMO + "llava_provider", "MegatronMIMOProvider"),
        ("megatron.bridge.training.megatron_mimo_parallel_utils", "MegatronMIMOInfra"),
    ):
        value = getattr(importlib.import_module(importer), name)
        assert value.__module__.startswith("mimo_ext.") is expect_ours, (importer, name, value)


def loaded_before(rank: int, world_size: int, sources: str) -> None:
    bridge_sources.use(sources)
    check_names(False)
    before = {
        name: dict(vars(module)) for name, module in sys.modules.items() if name.startswith(("megatron.", "test_"))
    }
    with mimo_ext.megatron.install(TESTS) as done:
        check_names(True)
        assert done.pending == [name for name in _stand_ins.SUPPLIED if name not in sys.modules]
        assert f"base class of {MIMO}llava_provider.LlavaMegatronMIMOProvider" in done.not_reached
    check_names(False)
    for name, names in before.items():
        now = vars(sys.modules[name])
        changed = [key for key in names.keys() | now.keys() if names.get(key) is not now.get(key)]
        assert not set(changed) - {"__warningregistry__"}, (name, changed)


def loaded_meanwhile(rank: int, world_size: int, sources: str) -> None:
    bridge_sources.use(sources)
    with mimo_ext.megatron.install(TESTS) as done:
        assert MIMO + "megatron_mimo_provider" in done.pending
        assert not [name for name in sys.modules if name.startswith(MIMO)], "install() imports no Megatron-Bridge"
        check_names(True)
        assert not [name for name in done.pending if name.startswith(MIMO)]
        places = {(entry.place, entry.name) for entry in done.replaced}
        assert (MIMO + "megatron_mimo_builder", "is_pp_first_stage") in places
        from megatron.bridge.models.megatron_mimo.llava_provider import LlavaMegatronMIMOProvider
        from megatron.bridge.models.model_provider import ModelProviderMixin

        assert issubclass(LlavaMegatronMIMOProvider, mimo_ext.megatron.MegatronMIMOProvider)
        assert issubclass(LlavaMegatronMIMOProvider, ModelProviderMixin)
        from megatron.bridge.models.mimo.mimo_provider import MimoModelProvider

        assert MimoModelProvider is mimo_ext.megatron.MimoModelProvider
    check_names(False)
    assert "megatron.bridge.models.mimo.mimo_provider" not in sys.modules
    provider = sys.modules[MIMO + "megatron_mimo_provider"]
    assert provider.__spec__.loader is provider.__loader__
    assert provider.MegatronMIMOProvider.__module__ == provider.__name__


@pytest.mark.parametrize("scene", [loaded_before, loaded_meanwhile])
def test_names_of_megatron_bridge_are_ours_until_the_end(sources: str, scene: Any) -> None:
    launch(scene, 1, sources, timeout=90)


# --- a package of the same name, so that no version is needed


@pytest.fixture
def package(tmp_path, monkeypatch):
    """``package({"models/mimo/mimo_builder.py": "text"})`` makes these files of an importable megatron.bridge."""
    if importlib.util.find_spec("megatron.bridge") is not None:
        pytest.skip("Megatron-Bridge is on the path")

    def make(files: dict[str, str]) -> None:
        for name, text in files.items():
            file = tmp_path / "megatron" / "bridge" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))
            for folder in file.relative_to(tmp_path / "megatron").parents:
                if str(folder) != ".":
                    (tmp_path / "megatron" / folder / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)

    # Which imports the real Megatron-Bridge where there is one, and is not to find this one.
    importlib.import_module("mimo_ext.megatron.provider")
    before = set(sys.modules)
    yield make
    import megatron

    for name in set(sys.modules) - before:
        if name == "megatron.bridge" or name.startswith("megatron.bridge."):
            del sys.modules[name]
    vars(megatron).pop("bridge", None)


BUILDER = """
    def build_hypercomm_grids(config): return "theirs"
    def is_pp_first_stage(group): return "theirs"
    def another(): return "theirs"
    """


def test_a_module_that_the_version_has_keeps_its_other_names(package) -> None:
    package({"models/mimo/mimo_builder.py": BUILDER, "user.py": "from .models.mimo.mimo_builder import *"})
    path = "megatron.bridge.models.mimo.mimo_builder"
    with mimo_ext.megatron.install(TESTS) as done:
        assert path in done.pending
        user = importlib.import_module("megatron.bridge.user")
        assert user.build_hypercomm_grids is mimo_ext.megatron.build_hypercomm_grids
        assert user.another() == "theirs"
        assert path not in done.pending
        lacking = f"{path}.is_pp_last_stage", f"{path} has no such name"
        assert lacking in done.left_alone
    assert user.build_hypercomm_grids(None) == user.is_pp_first_stage(None) == "theirs"


def test_a_module_that_the_version_lacks_is_ours_and_goes_again(package) -> None:
    package({"models/mimo/mimo_bridge.py": "class MimoBridge: pass"})
    specs = {name: importlib.import_module(f"mimo_ext.megatron.{name}").__spec__ for name in ("provider", "builder")}
    with mimo_ext.megatron.install(TESTS) as done:
        assert "megatron.bridge.models.mimo.mimo_provider" in done.pending
        assert "megatron.bridge" not in sys.modules
        # All forms of import, with the real packages as parents.
        import megatron.bridge.models.mimo.mimo_builder as builder
        from megatron.bridge.models.mimo import mimo_provider
        from megatron.bridge.models.mimo.mimo_bridge import MimoBridge

        assert builder is mimo_ext.megatron.builder
        assert mimo_provider is mimo_ext.megatron.provider
        assert MimoBridge.__module__ == "megatron.bridge.models.mimo.mimo_bridge"
        parent = sys.modules["megatron.bridge.models.mimo"]
        assert parent.mimo_provider is mimo_provider
    assert not hasattr(parent, "mimo_provider")
    assert not hasattr(parent, "mimo_builder")
    assert parent.mimo_bridge.MimoBridge is MimoBridge
    for name, spec in specs.items():
        assert importlib.import_module(f"mimo_ext.megatron.{name}").__spec__ is spec
    with pytest.raises(ModuleNotFoundError, match="mimo_provider"):
        importlib.import_module("megatron.bridge.models.mimo.mimo_provider")


def test_a_module_that_fails_while_it_loads_fails_as_without_us(package) -> None:
    package({"models/mimo/mimo_builder.py": BUILDER + "raise LookupError('its own')"})
    with mimo_ext.megatron.install(TESTS) as done:
        with pytest.raises(LookupError, match="its own"):
            importlib.import_module("megatron.bridge.models.mimo.mimo_builder")
        assert "megatron.bridge.models.mimo.mimo_builder" in done.pending
        assert "megatron.bridge.models.mimo.mimo_builder" not in sys.modules


def test_what_is_loaded_after_the_end_is_not_touched(package) -> None:
    package({"models/mimo/mimo_builder.py": BUILDER})
    with mimo_ext.megatron.install(TESTS):
        pass
    module = importlib.import_module("megatron.bridge.models.mimo.mimo_builder")
    assert isinstance(module, types.ModuleType)
    assert module.build_hypercomm_grids(None) == "theirs"
    assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("mimo_ext")]
