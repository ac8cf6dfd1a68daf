from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from launch import launch
from megatron.core import hyper_comm_grid, parallel_state
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import transformer_block

import mimo_ext.megatron
from mimo_ext.megatron import cpu

OWNERS = (
    torch,
    torch.Tensor,
    torch.cuda,
    megatron_random,
    parallel_state,
    hyper_comm_grid.HyperCommGrid,
    transformer_block,
)


def state() -> list[dict[str, int]]:
    """Identity of every attribute of everything that the switch touches."""
    # An object of its own per access would be no identity: look into the namespaces, not through them.
    return [{name: id(value) for name, value in vars(owner).items()} for owner in OWNERS]


@pytest.fixture(autouse=True)
def unchanged():
    before = state()
    yield
    assert not cpu.is_enabled()
    for owner, old, new in zip(OWNERS, before, state(), strict=True):
        changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
        assert not changed, f"{owner} was left changed: {changed}"


def test_the_switch_changes_and_restores():
    before = state()
    with mimo_ext.megatron.cpu():
        assert cpu.is_enabled()
        changed = [
            {n for n in old.keys() | new.keys() if old.get(n) != new.get(n)}
            for old, new in zip(before, state(), strict=True)
        ]
        assert all(changed), changed
        assert {"zeros", "tensor", "arange"} <= changed[0]
        assert changed[1] == {"cuda", "type"}
    assert state() == before


def test_undone_when_the_body_raises():
    with pytest.raises(ZeroDivisionError), cpu():
        _ = 1 / 0
    assert not cpu.is_enabled()


def test_undone_when_switching_on_fails(monkeypatch):
    monkeypatch.delattr(megatron_random, "CudaRNGStatesTracker")
    before = state()
    with pytest.raises(AttributeError, match="CudaRNGStatesTracker"):
        cpu.enable()
    assert state() == before
    with pytest.raises(RuntimeError, match="without enable"):
        cpu.disable()


def test_nested_use_and_enable_disable():
    cpu.enable()
    zeros = torch.zeros
    with cpu():
        assert torch.zeros is zeros
        with cpu():
            pass
        assert cpu.is_enabled()
    assert cpu.is_enabled()
    cpu.disable()
    assert not cpu.is_enabled()
    with pytest.raises(RuntimeError, match="without enable"):
        cpu.disable()


def test_nothing_changes_where_cuda_is_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = state()
    with cpu():
        assert state() == before
        assert not cpu.is_enabled()


def test_importing_imports_no_megatron():
    program = (
        "import sys, mimo_ext.megatron, mimo_ext.megatron.cpu;"
        "assert callable(mimo_ext.megatron.cpu);"
        "assert not [m for m in sys.modules if m.startswith('megatron')]"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=60)


def test_tensors_are_made_on_the_cpu():
    with cpu():
        for made in (
            torch.zeros(2, device="cuda"),
            torch.ones(2, dtype=torch.int, device="cuda:3"),
            torch.tensor([1.0], device=torch.device("cuda", 1)),
            torch.full((2,), 7.0, device=torch.cuda.current_device()),
            torch.arange(3, device=0),
            torch.empty_like(torch.zeros(2), device="cuda"),
            torch.zeros(2, requires_grad=True).cuda(non_blocking=True),
            torch.nn.Linear(2, 2).cuda(torch.cuda.current_device()).weight,
        ):
            assert made.device.type == "cpu"
        assert torch.full((2,), 7.0, device="cuda").tolist() == [7.0, 7.0]
        assert torch.zeros(2, device="meta").device.type == "meta"
        assert torch.tensor([1, 2], device="cpu", pin_memory=True).tolist() == [1, 2]
        leaf = torch.zeros(2, requires_grad=True)
        assert leaf.cuda() is leaf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_types_are_named_as_on_cuda(dtype):
    tensor = torch.ones(2).to(dtype)
    plain = tensor.type()
    with cpu():
        assert tensor.type() == plain.replace("torch.", "torch.cuda.")
        assert tensor.type(torch.float64).dtype is torch.float64
        assert tensor.type("torch.cuda.FloatTensor").dtype is torch.float32
        assert torch.zeros(1, device="meta").type() == torch.zeros(1, device="meta").type()
    assert tensor.type() == plain


def test_streams_do_nothing():
    with cpu():
        stream = torch.cuda.current_stream()
        stream.wait_stream(stream)
        stream.wait_event(None)
        stream.synchronize()
        assert stream.record_event("event") == "event"
        torch.cuda.synchronize()


def test_compiled_functions_run_eagerly():
    calls = []

    @torch.compile
    def double(x):
        calls.append(torch.compiler.is_compiling())
        return 2 * x

    with cpu():
        assert double(torch.ones(1)).item() == 2.0
    assert calls == [False]


class TestRandomStates:
    def draw(self, name: str | None = None) -> list[float]:
        tracker = megatron_random.get_cuda_rng_tracker()
        with tracker.fork(name) if name else tracker.fork():
            return torch.rand(3).tolist()

    def test_named_states_go_on_and_leave_the_default_alone(self, caplog):
        with cpu(), caplog.at_level(logging.WARNING):
            cpu.manual_seed(5)
            default = torch.get_rng_state()
            first, second, other = self.draw(), self.draw(), self.draw("data-parallel-rng")
            assert torch.equal(torch.get_rng_state(), default)
            assert first != second
            assert first != other
            cpu.manual_seed(5)
            assert [self.draw(), self.draw()] == [first, second]
        assert not caplog.records

    def test_nested_forks_of_one_state_draw_one_sequence(self):
        with cpu():
            cpu.manual_seed(5)
            sequence = self.draw() + self.draw() + self.draw()
            cpu.manual_seed(5)
            tracker = megatron_random.get_cuda_rng_tracker()
            with tracker.fork():
                drawn = torch.rand(3).tolist() + self.draw() + torch.rand(3).tolist()
            assert drawn == sequence
            with tracker.fork("data-parallel-rng"):
                before = torch.get_rng_state()
                self.draw()
                assert torch.equal(torch.get_rng_state(), before)

    def test_tensor_parallel_ranks_differ_and_pipeline_stages_too(self):
        class Group:
            def __init__(self, rank: int) -> None:
                self._rank = rank

            def rank(self) -> int:
                return self._rank

        class Groups:
            def __init__(self, **ranks: int) -> None:
                for name in ("tp", "pp", "ep", "expt_tp"):
                    setattr(self, name, Group(ranks.get(name, 0)))

        with cpu():
            drawn = {}
            for key, groups in {"a": Groups(), "b": Groups(tp=1), "c": Groups(pp=1), "none": None}.items():
                cpu.manual_seed(5, groups)
                drawn[key] = (tuple(self.draw()), tuple(torch.rand(2).tolist()))
            assert drawn["a"] == drawn["none"]
            assert drawn["a"][0] != drawn["b"][0]
            assert drawn["a"][1] == drawn["b"][1]  # the default state is the same over tensor-parallel ranks
            assert len({drawn[key][0] for key in "abc"}) == 3
            cpu.manual_seed(5, Groups(ep=1))
            expert = self.draw("expert-parallel-rng")
            cpu.manual_seed(5, Groups())
            assert self.draw("expert-parallel-rng") != expert

    def test_unseeded_state_works_with_a_warning(self, caplog):
        with cpu():
            self.draw()
        assert "'model-parallel-rng' was never seeded" in caplog.text

    def test_recomputed_activations_see_the_same_dropout(self):
        from megatron.core.tensor_parallel.random import CheckpointFunction

        with cpu():
            cpu.manual_seed(5)
            x = torch.ones(64, requires_grad=True)

            def dropout(value):
                with megatron_random.get_cuda_rng_tracker().fork():
                    return torch.nn.functional.dropout(value, 0.5)

            y = CheckpointFunction.apply(dropout, False, x)
            y.sum().backward()
            assert torch.equal(x.grad, y.detach())
            assert 0 < int((y == 0).sum()) < 64


def test_memory_buffer_before_and_after_model_parallel_initialization():
    assert parallel_state._GLOBAL_MEMORY_BUFFER is None
    with cpu():
        ours = parallel_state.get_global_memory_buffer()
        assert ours.get_tensor((2, 3), torch.float32, "scratch").shape == (2, 3)
        parallel_state._set_global_memory_buffer()
        theirs = parallel_state.get_global_memory_buffer()
        assert theirs is not ours
        with pytest.raises(AssertionError, match="already initialized"):
            parallel_state._set_global_memory_buffer()
    # What the program set itself stays its own.
    assert parallel_state.get_global_memory_buffer() is theirs
    with cpu():
        assert parallel_state.get_global_memory_buffer() is theirs
    parallel_state.destroy_global_memory_buffer()


def grid_backends(rank: int, world_size: int) -> list[str | None]:
    with cpu():
        made = [
            hyper_comm_grid.HyperCommGrid([2], ["tp"], 0, "nccl"),
            hyper_comm_grid.HyperCommGrid(shape=[2], dim_names=["tp"], backend="nccl"),
            hyper_comm_grid.HyperCommGrid([2], ["tp"]),
        ]
        group = made[0].create_pg("tp")
        total = torch.tensor([float(rank)], device="cuda")
        torch.distributed.all_reduce(total, group=group)
        assert total.item() == 1.0
    return [grid.backend for grid in made]


def test_grids_use_the_default_groups_backend():
    assert launch(grid_backends, 2) == [["gloo", "gloo", None]] * 2
