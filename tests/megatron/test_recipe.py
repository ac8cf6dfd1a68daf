"""The recipe of examples/recipes: without Megatron-Bridge, and with those parts of it that run on a CPU."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import bridge_sources
import numpy as np
import pytest
from launch import launch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
STEPS, BATCH, MICROBATCH = 3, 16, 8
FAN_OUT = ({"data_parallel_size": 1}, {"data_parallel_size": 2, "rank_offset": 1})


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from recipes import vlm_mimo

    return vlm_mimo


def config(images: Any = None, language: Any = None) -> Any:
    """The recipe's config for a few steps, in a rank's process."""
    sys.path.insert(0, str(EXAMPLES))
    from recipes.vlm_mimo import vlm_digits_pretrain_config

    from mimo_ext.megatron.config import ModuleParallelismConfig

    def sizes(given: Any) -> Any:
        return None if given is None else ModuleParallelismConfig(**given)

    return vlm_digits_pretrain_config(
        sizes(images), sizes(language), train_iters=STEPS, global_batch_size=BATCH, micro_batch_size=MICROBATCH
    )


def losses_of_the_recipe(rank: int, world_size: int, *layout: Any) -> list[float]:
    cfg = config(*layout)
    from recipes import cpu_loop
    from recipes.vlm_mimo import build_data_iterators, forward_step

    from mimo_ext.megatron import cpu

    with cpu():
        return list(cpu_loop.pretrain(cfg, forward_step, build_data_iterators))


def losses_of_the_example(rank: int, world_size: int) -> list[float]:
    sys.path.insert(0, str(EXAMPLES))
    from vlm_digits.data import Numbers
    from vlm_digits.layout import parse_layout
    from vlm_digits.trainer import Recipe, Trainer

    from mimo_ext.megatron import cpu

    with cpu():
        settings = Recipe(seed=0, steps=STEPS, batch=BATCH, microbatches=BATCH // MICROBATCH, warmup=0)
        trainer = Trainer(parse_layout("images: dp=2; language: tp=2"), Numbers(0), settings)
        losses = []
        for step in range(STEPS):
            result = trainer.gradients(step)
            trainer.update()
            losses.append(trainer.mean_loss([result]))
        trainer.close()
        return losses


def test_the_recipe_trains_as_the_example_does() -> None:
    """Another loop, provider face and data path: the same losses on every rank, step by step."""
    expected = launch(losses_of_the_example, 4, timeout=240)
    got = launch(losses_of_the_recipe, 4, timeout=240)
    assert len(got[0]) == STEPS
    assert got[0][0] != pytest.approx(got[0][-1], rel=1e-3)  # it learns
    for rank in range(4):
        np.testing.assert_allclose(got[rank], expected[0], rtol=2e-5)


def test_the_config_without_megatron_bridge(recipe: Any) -> None:
    cfg = recipe.vlm_digits_pretrain_config(train_iters=80, seed=3)
    assert type(cfg) is recipe.RecipeConfig
    assert type(cfg.model).__name__ == "MegatronMIMOProvider"
    sizes = cfg.model.megatron_mimo_parallelism_config
    sizes.finalize(4)
    assert [(name, p.rank_offset, p.total_ranks) for name, p in sizes.module_parallelisms.items()] == [
        ("images", 0, 2),
        ("language", 2, 2),
    ]
    assert (cfg.train.train_iters, cfg.scheduler.lr_decay_iters, cfg.scheduler.lr_warmup_iters) == (80, 80, 10)
    assert (cfg.rng.seed, cfg.model.bf16, cfg.optimizer.bf16) == (3, False, False)
    text = recipe.summary(cfg)
    assert "language  ranks 2 to 3: TP 2, CP 1, DP 1, PP 1" in text
    assert "train_iters=80" in text


class Recorder:
    """Stands for Megatron-Bridge's config module: its classes keep what they are given."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda **fields: SimpleNamespace(made_of=name, **fields)


def test_the_config_with_megatron_bridge(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("megatron.bridge", "megatron.bridge.training"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["megatron.bridge.training"], "config", Recorder(), raising=False)
    monkeypatch.setitem(sys.modules, "megatron.bridge.training.config", Recorder())
    cfg = recipe.vlm_digits_pretrain_config(train_iters=80)
    assert cfg.made_of == "ConfigContainer"
    made = {name: getattr(part, "made_of", None) for name, part in vars(cfg).items()}
    assert {name: kind for name, kind in made.items() if kind} == {
        "train": "TrainingConfig",
        "optimizer": "OptimizerConfig",
        "scheduler": "SchedulerConfig",
        "ddp": "DistributedDataParallelConfig",
        "rng": "RNGConfig",
        "logger": "LoggerConfig",
        "tokenizer": "TokenizerConfig",
        "checkpoint": "CheckpointConfig",
    }
    assert type(cfg.model).__name__ == "MegatronMIMOProvider"
    assert (cfg.train.train_iters, cfg.scheduler.lr_decay_iters, cfg.rng.seed) == (80, 80, 0)
    assert (cfg.tokenizer.vocab_size, cfg.checkpoint.save, cfg.checkpoint.load) == (16, None, None)


def fields_in_source(folder: Path, file: str, name: str) -> tuple[set[str], set[str]]:
    """(fields, required fields) that a dataclass of Megatron-Bridge declares itself."""
    tree = ast.parse((folder / "megatron" / "bridge" / file).read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    lines = [node for node in found.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    every = {node.target.id for node in lines if isinstance(node.target, ast.Name)}
    return every, {n.target.id for n in lines if n.value is None and isinstance(n.target, ast.Name)}


def test_the_container_has_the_fields_that_the_recipe_sets(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bridge_sources.require()
    for name in ("megatron.bridge", "megatron.bridge.training"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["megatron.bridge.training"], "config", Recorder(), raising=False)
    given = set(vars(recipe.vlm_digits_pretrain_config())) - {"made_of"}
    fields, required = fields_in_source(folder, "training/config.py", "ConfigContainer")
    assert required <= given <= fields


def with_bridge_sources(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Megatron-Bridge's own set-up of the model, and its gradient hooks, around the recipe's provider."""
    bridge_sources.use(folder)
    cfg = config(*FAN_OUT)
    from megatron.bridge.models.megatron_mimo.build_model import build_megatron_mimo_model
    from megatron.bridge.models.model_provider import ModelProviderMixin
    from megatron.bridge.training import megatron_mimo_parallel_utils as theirs
    from recipes import cpu_loop
    from recipes.vlm_mimo import build_data_iterators, forward_step

    from mimo_ext.megatron import cpu

    def build(cfg: Any) -> tuple[Any, Any]:
        model, infra = build_megatron_mimo_model(cfg.model, ddp_config=cfg.ddp, bf16=False, seed=cfg.rng.seed)
        return infra, model

    cpu_loop.build_model = build
    taken = []
    for name in vars(theirs):
        # The check of the data asks grids by a method that they do not have (docs/defects.md, 17).
        if hasattr(cpu_loop, name) and callable(getattr(theirs, name)) and name != "validate_data_loader_contract":
            setattr(cpu_loop, name, getattr(theirs, name))
            taken.append(name)
    with cpu():
        losses = list(cpu_loop.pretrain(cfg, forward_step, build_data_iterators))
    return {
        "losses": losses,
        "mixin": isinstance(cfg.model, ModelProviderMixin),
        "taken": sorted(taken),
        "from": theirs.__file__,
    }


def test_megatron_bridges_own_functions_train_the_recipe() -> None:
    folder = bridge_sources.require()
    expected = launch(losses_of_the_recipe, 3, *FAN_OUT, timeout=240)
    ranks = launch(with_bridge_sources, 3, str(folder), timeout=240)
    for seen in ranks:
        assert seen["mixin"] is True
        assert seen["from"].startswith(str(folder))
        assert {"finalize_model_grads_multimodule", "multimodule_no_sync", "get_module_to_grid_tuple"} <= set(
            seen["taken"]
        )
        np.testing.assert_allclose(seen["losses"], expected[0], rtol=2e-5)


PROGRAM = """
import sys
sys.path.insert(0, {here!r})
import bridge_sources
bridge_sources.use({folder!r})
from megatron.bridge.models.model_provider import ModelProviderMixin
from mimo_ext.megatron.provider import MegatronMIMOProvider, MimoModelProvider
for face in (MimoModelProvider, MegatronMIMOProvider):
    assert issubclass(face, ModelProviderMixin), face.__mro__
    made = face()  # no abstract method is left
    assert made.pre_wrap_hook is None
    made.register_pre_wrap_hook(lambda models: [*models, "b"])
    made.register_pre_wrap_hook(lambda models: [*models, "a"], prepend=True)
    assert made.pre_wrap_hook([]) == ["a", "b"]
    assert made._resolve_hooks(None)([]) == ["a", "b"]
    assert made.apply_overrides_and_finalize(overrides={{"fp16": True}}).fp16 is True
print("subclass of", ModelProviderMixin.__module__)
"""


def test_the_provider_is_a_real_subclass_of_the_mixin() -> None:
    folder = bridge_sources.require()
    program = PROGRAM.format(here=str(Path(__file__).parent), folder=str(folder))
    ended = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "subclass of megatron.bridge.models.model_provider\n"


def test_the_recipe_can_be_run() -> None:
    command = [sys.executable, "-P", str(EXAMPLES / "recipes" / "vlm_mimo.py"), "--train-iters", "2"]
    command += ["--layout", "images: tp=1; language: tp=1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("RecipeConfig: model = MegatronMIMOProvider\n  images    ranks 0 to 0: TP 1")
    assert "step    2  loss " in ended.stdout


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("images: ranks=0-1,dp=2; language: ranks=0-1,tp=2", "modules on ranks of their own"),
        ("images: dp=3; language: tp=2", "dp=3 does not divide a microbatch of 16 samples"),
        ("images: dp=2", "module 'language' is missing"),
    ],
)
def test_layouts_that_cannot_work_are_refused(recipe: Any, capsys: Any, layout: str, words: str) -> None:
    assert recipe.main(["--layout", layout]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert layout in error
