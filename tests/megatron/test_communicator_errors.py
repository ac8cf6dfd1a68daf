"""What MultiModulePipelineCommunicator refuses, by name and before anything is sent; on threads, bridges in memory."""

from __future__ import annotations

import re
from collections import deque
from functools import partial
from types import SimpleNamespace
from typing import Any

import pipeline_model as pm
import pytest
import torch
from communicator_fakes import WouldHang, install, make
from pipeline_cases import SIMPLE
from pipeline_model import Case, grid

from mimo_ext.megatron import communicator as ours
from mimo_ext.megatron.communicator import (
    MultiModulePipelineCommunicator,
)


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`worlds(size)`: a world of threads on which the communicator runs."""
    return partial(install, monkeypatch)


def good() -> torch.Tensor:
    return torch.zeros(2, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("output_dict", "error", "match"),
    [
        (
            {"image": good()},
            ValueError,
            r"rank 0, module images: expected output_dict with keys \['images'\], got \['image'\]",
        ),
        (good(), TypeError, r"rank 0, module images: expected output_dict as a dict.*got Tensor"),
        ({"images": None}, TypeError, r"rank 0, module images: expected an output tensor, got NoneType"),
        ({"images": [good(), good()]}, ValueError, r"expected one tensor per module, got a list of 2"),
        ({"images": good()[None]}, ValueError, r"expected an output of 2 dimensions.*got shape \(1, 2, 4\)"),
        ({"images": good().float()}, TypeError, r"expected an output of torch.float64.*got torch.float32"),
        ({"images": good().to("meta")}, ValueError, r"expected an output on cpu, got one on meta"),
    ],
)
def test_bad_outputs_are_refused(output_dict: Any, error: type[Exception], match: str, worlds: Any) -> None:
    world = worlds(4)

    def body(rank: int) -> None:
        communicator = make(SIMPLE)
        if rank != 0:
            return
        with pytest.raises(error, match=match):
            communicator.send_forward(output_dict)
        with pytest.raises(error, match=match):
            communicator.send_forward_recv_backward(output_dict, [()])

    world.run(body)
    assert not [key for key in world.mail if "forward" in key]


def test_a_later_module_with_a_bad_output_keeps_the_earlier_ones_from_being_sent(worlds: Any) -> None:
    case = Case(
        "",
        {"audio": grid(0, dp=1), "images": grid(0, dp=1), "language": grid(1, dp=1)},
        {"audio": ["language"], "images": ["language"], "language": []},
        {"images": [[1]], "audio": [[1]]},
    )
    world = worlds(2)

    def body(rank: int) -> None:
        communicator = make(case)
        if rank == 0:
            with pytest.raises(TypeError, match=r"module images.*torch\.float32"):
                communicator.send_forward({"audio": good(), "images": good().float()})
        else:
            with pytest.raises(ValueError, match=r"module images: expected grad_dict with keys \['audio', 'images'\]"):
                communicator.send_backward({"audio": good()})
            with pytest.raises(TypeError, match="module images: expected a gradient or None, got float"):
                communicator.send_backward({"audio": good(), "images": 1.0})

    world.run(body)
    assert not [key for key in world.mail if {"forward", "backward"} & set(key)]


def test_a_last_dimension_of_one_between_stages_is_refused_by_name(worlds: Any) -> None:
    case = Case("", {"language": grid(0, pp=2)}, {"language": []}, {})

    def body(rank: int) -> None:
        communicator = make(case)
        if rank == 0:
            with pytest.raises(ValueError, match=r"rank 0, module language: .*c != 1, got shape \(2, 3, 1\)"):
                communicator.send_forward({"language": torch.zeros(2, 3, 1, dtype=torch.float64)})

    worlds(2).run(body)


def test_row_counts_that_contradict_the_output_are_refused(worlds: Any) -> None:
    def body(rank: int) -> None:
        communicator = make(SIMPLE)
        if rank != 0:
            return
        x = good()
        x._mimo_bridge_split_sizes = [2, 1]
        with pytest.raises(ValueError, match=r"rank 0, module images: expected 3 rows.*\[2, 1\].*got.*\(2, 4\)"):
            communicator.send_forward({"images": x})
        communicator.bind(SimpleNamespace(row_counts={"images": deque([[1, 1]])}))
        x._mimo_bridge_split_sizes = [2, 0]
        with pytest.raises(RuntimeError, match=r"expected rows per sample \[1, 1\].*marked \[2, 0\]"):
            communicator.send_forward({"images": x})

    worlds(4).run(body)


def test_bind_looks_through_wrappers_and_refuses_a_model_without_row_counts(worlds: Any) -> None:
    def body(rank: int) -> None:
        queues = {"images": deque([[2, 0]])}
        model = SimpleNamespace(module=SimpleNamespace(module=SimpleNamespace(row_counts=queues)))
        communicator = make(SIMPLE, model=model)
        if rank < 2:
            communicator.send_forward({"images": good() + rank})
            assert not queues["images"]
        with pytest.raises(TypeError, match=r"expected a model with row_counts.*Linear"):
            communicator.bind(torch.nn.Linear(1, 1))

    worlds(4).run(body)


def test_a_receive_that_would_wait_for_its_own_rank_is_refused(worlds: Any) -> None:
    case = Case(
        "",
        {"images": grid(0, dp=2), "language": grid(0, tp=2)},
        {"images": ["language"], "language": []},
        {"images": [[1, 1]]},
    )

    def body(rank: int) -> None:
        communicator = make(case)
        with pytest.raises(RuntimeError, match=f"rank {rank}, module images: .*wait for itself"):
            communicator.recv_forward([()])
        communicator.send_forward({"images": good()[:1] + rank})
        x = communicator.recv_forward([()])["images"]
        assert torch.equal(x[:, 0], torch.tensor([0.0, 1.0], dtype=torch.float64))
        with pytest.raises(RuntimeError, match=f"rank {rank}, module images: .*wait for itself"):
            communicator.recv_backward([()])
        communicator.send_backward({"images": x.detach()})
        assert communicator.recv_backward([()])["images"][0, 0] == rank

    worlds(2).run(body)


def test_use_after_close(worlds: Any) -> None:
    def body(rank: int) -> None:
        communicator = make(SIMPLE)
        communicator.close()
        for name in ("recv_forward", "recv_backward"):
            with pytest.raises(RuntimeError, match=f"rank {rank}: {name} on a closed"):
                getattr(communicator, name)([()])
        for name in ("send_forward", "send_backward", "send_forward_recv_backward", "send_backward_recv_forward"):
            with pytest.raises(RuntimeError, match=f"rank {rank}: {name} on a closed"):
                getattr(communicator, name)({})

    worlds(4).run(body)


def test_an_error_in_the_body_is_what_the_context_manager_shows(worlds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worlds(4)

    def fail(self: Any, abort: bool) -> None:
        raise WouldHang("cannot drain")

    def body(rank: int) -> None:
        with pytest.raises(KeyError, match="first"), make(SIMPLE):
            raise KeyError("first")
        with pytest.raises(WouldHang), make(SIMPLE):
            pass

    world = worlds(4)
    monkeypatch.setattr(ours.Bridge, "close", fail)
    world.run(body)


def odd(**changes: Any) -> SimpleNamespace:
    """A grid of two ranks that contradicts itself."""
    return SimpleNamespace(**{"rank_offset": 2, "size": 2, "shape": [2], "dim_names": ["dp"], **changes})


def two(language: Any = None, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "module_to_grid_map": {"images": grid(0, dp=2), "language": language or grid(2, dp=2)},
        "topology": {"images": ["language"], "language": []},
        "config": pm.CONFIG,
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (
            two(topology={"images": ["language", "language"], "language": []}),
            ValueError,
            r"topology: module images lists language twice",
        ),
        (two(topology={"images": ["language"]}), ValueError, r"topology and grids differ: .*, got \['images'\]"),
        (
            two(topology={"images": ["text"], "language": []}),
            ValueError,
            r"topology: expected modules among.*got 'text'",
        ),
        (
            two(topology={"images": ["language"], "language": ["images"]}),
            ValueError,
            r"cycle: (images -> )?language -> images",
        ),
        (
            two(grid(1, dp=2, pp=2)),
            ValueError,
            r"images \(ranks \[0, 2\)\) and language \(ranks \[1, 5\)\) overlap: .*got 1 and 2",
        ),
        (two(grid(2, dp=8)), ValueError, r"module language: expected ranks below the world size 6, got \[2, 10\)"),
        (
            two(SimpleNamespace(rank_offset=2, size=2)),
            TypeError,
            r"module language: expected a grid, got SimpleNamespace without shape, dim_names",
        ),
        (two(grid(2, dp=1, usp=2)), ValueError, r"module 'language': unknown dim 'usp' of size 2"),
        (two(odd(size=3)), ValueError, r"module language: expected a size of 2.*got 3"),
        (two(odd(rank_offset=-1)), ValueError, r"module language: expected a rank_offset of 0 or more, got -1"),
        (
            two(odd(shape=[2, 1], dim_names=["dp", "dp"])),
            ValueError,
            r"module language: expected one positive size per distinct dim",
        ),
        (two(module_to_grid_map={}, topology={}), ValueError, r"expected at least one module"),
        (two(module_output_ndim={"images": 4}), ValueError, r"expected 2 or 3 for module images, got 4"),
        (two(module_output_ndim={"image": 2}), ValueError, r"expected modules among.*got 'image'"),
        (two(dim_mapping={"s": 0, "b": 0, "h": 2}), ValueError, r"dim_mapping: expected 's', 'b' and 'h'.*'b': 0"),
        (two(dim_mapping={"s": 0, "h": 1}), ValueError, r"dim_mapping"),
        (
            two(config=SimpleNamespace(pipeline_dtype=None)),
            TypeError,
            r"config.pipeline_dtype: expected a torch.dtype, got None",
        ),
        (two(model=SimpleNamespace()), TypeError, r"expected a model with row_counts"),
        (
            two(
                module_to_grid_map={"images": grid(0, dp=2), "language": grid(2, dp=2), "judge": grid(3, dp=2)},
                topology={"images": ["language", "judge"], "language": [], "judge": []},
            ),
            ValueError,
            r"judge \(ranks \[3, 5\)\) and language .* both receive from images",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_bridge_is_made(
    arguments: dict[str, Any], error: type[Exception], match: str, worlds: Any
) -> None:
    world = worlds(6)

    def body(rank: int) -> None:
        with pytest.raises(error, match=f"rank {rank}: .*{match}"):
            MultiModulePipelineCommunicator(**arguments)

    world.run(body)
    assert not world.made


def test_a_rank_that_refuses_alone_takes_the_others_with_it(worlds: Any) -> None:
    world = worlds(4)

    def body(rank: int) -> None:
        arguments = two(dim_mapping={"s": 5}) if rank == 2 else two()
        match = (
            "rank 2: dim_mapping" if rank == 2 else rf"rank {rank}: rank 2 refused its arguments \(1 rank.*dim_mapping"
        )
        with pytest.raises(ValueError, match=match):
            MultiModulePipelineCommunicator(**arguments)

    world.run(body)
    assert not world.made


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (
            {"module_to_grid_map": {"images": grid(0, tp=2), "language": grid(2, dp=2)}},
            [r"grids.images.dim_names: expected \['dp'\], got \['tp'\]"],
        ),
        ({"module_output_ndim": {"images": 2}}, [r"module_output_ndim.images: expected 3, got 2"]),
        (
            {"dim_mapping": {"s": 0, "b": 1, "h": 2}},
            [r"dim_mapping.b: expected 0, got 1", r"dim_mapping.s: expected 1, got 0"],
        ),
        (
            {"config": SimpleNamespace(pipeline_dtype=torch.bfloat16)},
            [r"pipeline_dtype: expected torch.float64, got torch.bfloat16"],
        ),
        ({"topology": {"images": [], "language": []}}, [r"topology.images: expected \['language'\], got \[\]"]),
        ({"device": "meta"}, [r"device: expected cpu, got meta"]),
    ],
)
def test_arguments_that_differ_between_ranks_are_named_on_every_rank(
    change: dict[str, Any], lines: list[str], worlds: Any
) -> None:
    world = worlds(4)

    def body(rank: int) -> None:
        with pytest.raises(RuntimeError, match=rf"rank {rank}: the ranks were given different") as caught:
            MultiModulePipelineCommunicator(**two(**(change if rank in (1, 3) else {})))
        text = str(caught.value)
        for line in lines:
            assert re.search(rf"rank\(s\) 1, 3: {line}", text), text

    world.run(body)
    assert not world.made
