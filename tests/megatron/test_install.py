"""`mimo_ext.megatron.install` in one process: which names are ours, and that all is as before afterwards."""

from __future__ import annotations

import functools
import importlib.util
import logging
import subprocess
import sys
import textwrap
import threading
import types
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import pytest
from megatron.core.models.mimo import MimoModel as CoreMimoModel
from megatron.core.models.mimo.config import role as core_role
from megatron.core.pipeline_parallel.multimodule_communicator import (
    MultiModulePipelineCommunicator as CoreCommunicator,
)
from megatron.core.pipeline_parallel.multimodule_communicator import RankModuleInfo as CoreRankModuleInfo
from test_mimo_model import model as our_model
from tiny_mimo import Grid

import mimo_ext.megatron
from mimo_ext.megatron import _stand_ins
from mimo_ext.megatron import communicator as our_communicator
from mimo_ext.megatron.install import installed

# This file and the other tests hold Megatron's names on purpose.
TESTS = ("test_install", "test_mimo_model", "test_communicator", "test_role")
HOME = "megatron.core.pipeline_parallel.multimodule_communicator"


@pytest.fixture
def program(request):
    """``program("text of a module")``: the module, loaded and known to the import system until the test ends."""
    names = []

    def load(text: str, name: str = "a_program") -> types.ModuleType:
        module = types.ModuleType(name)
        sys.modules[name] = module
        names.append(name)
        exec(textwrap.dedent(text), vars(module))
        return module

    yield load
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _nothing_left():
    """Every test leaves every loaded module as it was, by identity."""
    before = everything()
    yield
    assert installed() is None
    after = everything()
    for name in before.keys() & after.keys():
        if name.startswith(("mimo_ext", "_pytest", "pluggy", "test_install")):
            continue
        module, old = before[name]
        assert after[name][0] is module, name
        changed = {k for k in old.keys() | after[name][1].keys() if old.get(k) is not after[name][1].get(k)}
        changed.discard("__warningregistry__")
        assert not changed & NAMES, (name, changed)
        if name.startswith("megatron"):
            assert not changed, (name, changed)
    assert not hasattr(core_role.ModuleLayout, "UNIFIED")
    assert set(vars(core_role.RankRole)) & {"unified", "from_grid_map"} == set()


NAMES = {"MultiModulePipelineCommunicator", "MimoModel", "RankModuleInfo", "BridgeCommunicator"}


def everything() -> dict[str, tuple[types.ModuleType, dict[str, object]]]:
    modules = {name: module for name, module in list(sys.modules.items()) if isinstance(module, types.ModuleType)}
    return {name: (module, dict(vars(module))) for name, module in modules.items()}


PROGRAM = f"""
    import megatron.core.models.mimo as mimo
    from {HOME} import MultiModulePipelineCommunicator as Communicator
    from {HOME} import RankModuleInfo, _prepare_tensor_for_comm, _restore_tensor_from_comm
    from megatron.core.models.mimo.model.base import MimoModel
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator
    """


def names_of(module: types.ModuleType) -> list[object]:
    return [
        module.Communicator,
        module.RankModuleInfo,
        module._prepare_tensor_for_comm,
        module._restore_tensor_from_comm,
        module.MimoModel,
        module.mimo.MimoModel,
        module.mimo.model.MimoModel,
        module.BridgeCommunicator,
    ]


OURS = [
    _stand_ins.MultiModulePipelineCommunicator,
    our_communicator.RankModuleInfo,
    our_communicator._prepare_tensor_for_comm,
    our_communicator._restore_tensor_from_comm,
    *[_stand_ins.MimoModel] * 3,
    our_communicator.BridgeCommunicator,
]


def test_names_are_ours_in_programs_loaded_before_and_after(program):
    before = program(PROGRAM)
    theirs = names_of(before)
    with mimo_ext.megatron.install(TESTS):
        after = program(PROGRAM, "another_program")
        assert names_of(before) == OURS
        assert names_of(after) == OURS
    assert names_of(before) == theirs
    assert names_of(after) == theirs
    assert theirs[0] is CoreCommunicator
    assert theirs[4] is CoreMimoModel


def test_nothing_of_ours_is_missing():
    with mimo_ext.megatron.install(TESTS) as done:
        lacking = [entry for entry in done.left_alone if "no such name" in entry[1]]
    assert lacking == []


def test_what_was_done_is_returned_and_logged(program, caplog):
    program(PROGRAM)
    with caplog.at_level(logging.INFO, "mimo_ext.megatron.install"), mimo_ext.megatron.install(TESTS) as done:
        text = str(done)
        assert installed() is done
        entries = {(entry.place, entry.name): entry for entry in done.replaced}
        entry = entries["a_program", "Communicator"]
        assert (entry.old, entry.new) == (CoreCommunicator, _stand_ins.MultiModulePipelineCommunicator)
        assert (HOME, "MultiModulePipelineCommunicator") in entries
        assert (HOME, "BridgeCommunicator") in entries
        assert ("megatron.core.models.mimo", "MimoModel") in entries
    line = f"a_program.MimoModel = mimo_ext.megatron._stand_ins.MimoModel (was {CoreMimoModel.__module__}.MimoModel)"
    assert line in text
    assert line in caplog.text
    assert "schedules.MultiModulePipelineCommunicator: only asked by isinstance" in text


def test_classes_answer_isinstance_as_those_they_stand_for(program):
    from megatron.core.pipeline_parallel import schedules

    made_before = object.__new__(CoreMimoModel)
    communicator_before = object.__new__(CoreCommunicator)
    module = program(PROGRAM + "class Derived(MimoModel): pass\n")
    ours_itself = object.__new__(our_communicator.MultiModulePipelineCommunicator)
    with mimo_ext.megatron.install(TESTS):
        assert module.MimoModel is not CoreMimoModel
        assert isinstance(made_before, module.MimoModel)
        assert isinstance(object.__new__(module.Derived), module.MimoModel)
        assert issubclass(module.Derived, module.MimoModel)
        assert isinstance(communicator_before, module.Communicator)
        assert isinstance(ours_itself, module.Communicator)
        assert not isinstance(made_before, module.Communicator)
        # What Megatron's schedules ask.
        assert schedules.MultiModulePipelineCommunicator is CoreCommunicator
        for made in (communicator_before, ours_itself, object.__new__(module.Communicator)):
            assert isinstance(made, schedules.MultiModulePipelineCommunicator)
        # A class that the program derives from ours is no stand-in.
        derived = type(module.MimoModel)("Derived", (module.MimoModel,), {})
        assert not isinstance(made_before, derived)
        assert isinstance(object.__new__(derived), derived)
        assert isinstance(object.__new__(derived), CoreMimoModel)


def test_roles_have_the_released_modes(as_rank, program):
    as_rank(3)
    module = program(PROGRAM)
    with mimo_ext.megatron.install(TESTS):
        spec = our_model().mimo_config
        assert module.MimoModel(spec).role.mode is core_role.ModuleLayout.COLOCATED
        grids = {"images": Grid(0, dp=3), "language": Grid(3, dp=2)}
        spec.module_to_grid_map = grids
        model = module.MimoModel(spec)
        assert model.role.mode is core_role.ModuleLayout.NON_COLOCATED
        assert type(model).__name__ == "MimoModel"
        assert isinstance(model, mimo_ext.megatron.MimoModel)


def test_rank_roles_of_both_generations(as_rank):
    layout, build = core_role.ModuleLayout, core_role.RankRole.build
    stage = core_role.ModuleStageInfo
    as_rank(4)
    grids = {"images": Grid(0, dp=3), "language": Grid(3, pp=2)}
    # A pipeline that has its ranks to itself is taken for colocated, every stage first and last.
    assert build([], {"language": grids["language"]}).modules == {"language": stage(True, True)}
    with mimo_ext.megatron.install(TESTS):
        role = core_role.RankRole.unified(["images", "language"])
        assert type(role) is core_role.RankRole
        assert role.mode is layout.UNIFIED
        assert role.modules == {"images": stage(True, True), "language": stage(True, True)}
        expected = core_role.RankRole({"language": stage(False, True)}, layout.NON_COLOCATED)
        assert core_role.RankRole.from_grid_map(grids, ["images"]) == expected
        assert core_role.RankRole.build(["images"], grids) == expected
        assert core_role.RankRole.build([], {"language": grids["language"]}) == expected
        with pytest.raises(ValueError, match=r"Missing: \['audio'\], extra: \['images'\]"):
            core_role.RankRole.from_grid_map(grids, ["audio"])
        assert issubclass(layout, Enum)
        assert [member.name for member in layout] == ["COLOCATED", "NON_COLOCATED"]
    assert core_role.RankRole.build == build


def test_paths_of_the_documents_lead_to_us_without_megatron_bridge(program):
    if importlib.util.find_spec("megatron.bridge") is not None:
        pytest.skip("Megatron-Bridge is on the path")
    text = """
        from megatron.bridge.models.mimo.mimo_provider import MimoModelProvider, MimoModelInfra
        from megatron.bridge.models.mimo.mimo_builder import build_hypercomm_grids
        from megatron.bridge.models.mimo.mimo_config import MimoParallelismConfig, ModuleParallelismConfig
        from megatron.bridge.training.megatron_mimo_parallel_utils import finalize_model_grads_multimodule
        """
    with mimo_ext.megatron.install(TESTS):
        module = program(text)
        assert module.MimoModelProvider is mimo_ext.megatron.MimoModelProvider
        assert module.build_hypercomm_grids is mimo_ext.megatron.build_hypercomm_grids
        assert module.MimoParallelismConfig is mimo_ext.megatron.MimoParallelismConfig
        finalize = mimo_ext.megatron.parallel_utils.finalize_model_grads_multimodule
        assert module.finalize_model_grads_multimodule is finalize
        assert importlib.util.find_spec("megatron.bridge") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("megatron.bridge")
    with pytest.raises(ModuleNotFoundError):
        program(text, "too_late")


def test_who_took_ours_from_us_keeps_it(program):
    text = "from mimo_ext.megatron.communicator import RankModuleInfo"
    on_purpose = program(text)
    with mimo_ext.megatron.install([*TESTS, "named"]):
        named = program(text, "named")
    assert on_purpose.RankModuleInfo is our_communicator.RankModuleInfo
    assert named.RankModuleInfo is our_communicator.RankModuleInfo


def test_excluded_modules_are_not_touched(program):
    kept, part, taken = program(PROGRAM, "kept"), program(PROGRAM, "kept.part"), program(PROGRAM, "kept_not")
    with mimo_ext.megatron.install([*TESTS, "kept"]):
        assert kept.Communicator is part.Communicator is CoreCommunicator
        assert taken.Communicator is _stand_ins.MultiModulePipelineCommunicator


def test_calls_nest(program):
    module = program(PROGRAM)
    first = mimo_ext.megatron.install(TESTS)
    with mimo_ext.megatron.install() as second:
        assert second is first
        with pytest.raises(ValueError, match=r"exclude of a nested install.*got also \['a_program'\]"):
            mimo_ext.megatron.install("a_program")
    assert module.Communicator is _stand_ins.MultiModulePipelineCommunicator
    assert mimo_ext.megatron.uninstall() == []
    assert module.Communicator is CoreCommunicator
    with pytest.raises(RuntimeError, match=r"uninstall\(\) was called without install"):
        mimo_ext.megatron.uninstall()


def test_the_schedule_posts_receives_ahead_where_that_is_asked_for(program):
    text = (
        "from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving as run"
    )
    before = program(text, "a_program")
    schedule = before.run
    with mimo_ext.megatron.install(exclude=TESTS):
        assert before.run is schedule
        with pytest.raises(ValueError, match=r"overlap of a nested install\(\): expected False, .* got True"):
            mimo_ext.megatron.install(overlap=True)
    with mimo_ext.megatron.install(exclude=TESTS, overlap=True) as done:
        assert done.overlap
        after = program(text, "another_program")
        assert before.run is after.run is not schedule
        assert before.run.__wrapped__ is schedule
        asked = []

        class Communicator:
            @contextmanager
            def overlap(self, num_microbatches, **options):
                asked.append((num_microbatches, options["forward_only"]))
                yield

        with pytest.raises(TypeError, match="required keyword-only arguments"):  # Megatron's own words: it was called
            after.run(num_microbatches=3, forward_only=True, p2p_communicator=Communicator())
        assert asked == [(3, True)]
        with mimo_ext.megatron.install(overlap=True), mimo_ext.megatron.install():
            pass
    assert before.run is after.run is schedule


def test_it_is_undone_when_the_program_fails(program):
    module = program(PROGRAM)
    with pytest.raises(ZeroDivisionError), mimo_ext.megatron.install(TESTS):
        1 / 0  # noqa: B018
    assert module.Communicator is CoreCommunicator


def test_a_failing_installation_leaves_nothing(program, monkeypatch):
    module = program(PROGRAM)
    monkeypatch.setattr(_stand_ins, "attributes", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mimo_ext.megatron.install(TESTS)
    assert module.Communicator is CoreCommunicator
    assert installed() is None


def test_later_patches_of_others_stay_and_are_reported(program, caplog):
    module = program(PROGRAM)
    with mimo_ext.megatron.install(TESTS) as done:
        module.Communicator = "another"
        del module.MimoModel
    assert module.Communicator == "another"
    assert not hasattr(module, "MimoModel")
    assert sorted(done.kept) == ["a_program.Communicator: another", "a_program.MimoModel: gone"]
    assert "a_program.Communicator: another" in caplog.text


def test_what_others_have_put_back_is_no_news(program):
    module = program(PROGRAM)
    with mimo_ext.megatron.install(TESTS) as done:
        module.Communicator = CoreCommunicator
    assert done.kept == []


def test_what_cannot_be_reached_is_named(program):
    module = program(
        PROGRAM
        + """
    import functools
    def default(kind=MimoModel): return kind
    def keyword(*, kind=Communicator): return kind
    def outer(kind):
        def closure(): return kind
        return closure
    closure = outer(Communicator)
    class Derived(MimoModel): pass
    class Recipe:
        model = MimoModel
    part = functools.partial(RankModuleInfo, 0)
    info = RankModuleInfo(0, 1, None, [], [])
    """
    )
    with mimo_ext.megatron.install(TESTS) as done:
        found = done.not_reached
    assert {line for line in found if "a_program" in line} == {
        "default argument of a_program.default",
        "default argument of a_program.keyword",
        "closure of a_program.outer.<locals>.closure",
        "base class of a_program.Derived",
        "class attribute a_program.Recipe.model",
    }
    assert f"functools.partial of {HOME}.RankModuleInfo" in found
    assert f"1 object(s) of class {HOME}.RankModuleInfo" in found
    assert isinstance(module.part, functools.partial)
    assert type(module.info) is CoreRankModuleInfo


def test_modules_that_load_themselves_are_not_loaded(tmp_path, monkeypatch):
    (tmp_path / "lazily_loaded.py").write_text("raise AssertionError('loaded')")
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.find_spec("lazily_loaded")
    loader = importlib.util.LazyLoader(spec.loader)
    spec.loader = loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lazily_loaded", module)
    loader.exec_module(module)
    with mimo_ext.megatron.install(TESTS):
        pass
    with pytest.raises(AssertionError, match="loaded"):
        module.anything  # noqa: B018


def test_entries_that_are_no_modules_are_passed_over(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    home = "megatron.bridge.models.megatron_mimo.megatron_mimo_builder"
    stand_in = types.SimpleNamespace(is_pp_first_stage="of a test")
    monkeypatch.setitem(sys.modules, home, stand_in)
    with mimo_ext.megatron.install(TESTS):
        assert sys.modules[home].is_pp_first_stage == "of a test"


def test_threads_can_install_at_the_same_time(program):
    module = program(PROGRAM)
    seen, errors = [], []
    barrier = threading.Barrier(8)

    def work() -> None:
        try:
            barrier.wait(30)
            for _ in range(5):
                with mimo_ext.megatron.install(TESTS):
                    seen.append(module.Communicator)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert seen == [_stand_ins.MultiModulePipelineCommunicator] * 40
    assert module.Communicator is CoreCommunicator


def test_without_megatron_core_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(ImportError, match=r"megatron-core cannot be imported.*pip install --no-deps --ignore"):
        mimo_ext.megatron.install()


def python(*arguments: str, cwd: Path) -> str:
    # Elsewhere than in the folder of the sources, which Python would put on its path.
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_it_imports_no_megatron(tmp_path):
    text = "import sys, mimo_ext.megatron.install; print([n for n in sys.modules if n.split('.')[0] == 'megatron'])"
    assert python("-c", text, cwd=tmp_path) == "[]\n"


def test_a_script_runs_on_ours_without_a_changed_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "import torch\n"
        "from beside import MimoModel\n"
        "if __name__ == '__main__':\n"
        "    print(MimoModel.__module__, sys.argv[1:], sys.modules['__main__'].__file__ == __file__)\n"
        "    print(torch.zeros(1, device='cuda').device)\n"
    )
    (tmp_path / "beside.py").write_text("from megatron.core.models.mimo import MimoModel\n")
    out = python("-m", "mimo_ext.megatron.install", "--cpu", str(script), "--steps", "3", "-v", cwd=tmp_path)
    assert out == "mimo_ext.megatron._stand_ins ['--steps', '3', '-v'] True\ncpu\n"
