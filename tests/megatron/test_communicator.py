"""MultiModulePipelineCommunicator on threads with bridges in memory: what it sends, in which order, and what it
refuses.
"""

from __future__ import annotations

import inspect
import logging
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pipeline_model as pm
import pytest
import torch
from communicator_fakes import install, make
from megatron.core.pipeline_parallel import bridge_communicator, multimodule_communicator, p2p_communication, schedules
from pipeline_cases import CASES, SIMPLE
from pipeline_model import Case, grid

from mimo_ext.megatron import bridge_communicator as our_edges
from mimo_ext.megatron import communicator as ours
from mimo_ext.megatron.communicator import (
    MultiModulePipelineCommunicator,
)


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`worlds(size)`: a world of threads on which the communicator runs."""
    return partial(install, monkeypatch)


def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
    raise AssertionError(f"{type(self).__name__} of Megatron was constructed")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_1f1b_gives_the_gradients_of_one_process(case: Case, worlds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_communicator.BridgeCommunicator, "__init__", refuse)
    monkeypatch.setattr(p2p_communication.P2PCommunicator, "__init__", refuse)
    monkeypatch.setattr(multimodule_communicator.MultiModulePipelineCommunicator, "__init__", refuse)
    world = worlds(case.world_size)

    def body(rank: int) -> None:
        with make(case) as communicator:
            pm.check_rank(case, rank, pm.train_rank(communicator, case, rank))

    world.run(body)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_only_expects_no_backward(case: Case, worlds: Any) -> None:
    world = worlds(case.world_size)

    def body(rank: int) -> None:
        with make(case) as communicator:
            result = pm.train_rank(communicator, case, rank, forward_only=True)
            pm.check_rank(case, rank, result, forward_only=True)
            # Training goes on afterwards as if nothing had been.
            assert all(not output.in_flight for output in communicator._io._outputs)

    world.run(body)


def test_is_what_megatrons_schedule_asks_for_and_overrides_all_of_it(worlds: Any) -> None:
    parent = multimodule_communicator.MultiModulePipelineCommunicator
    assert issubclass(MultiModulePipelineCommunicator, schedules.MultiModulePipelineCommunicator)
    members = [name for name, value in vars(parent).items() if inspect.isroutine(value) or isinstance(value, property)]
    assert len(members) > 15
    assert [name for name in members if name not in vars(MultiModulePipelineCommunicator)] == []
    for name in members:
        if inspect.isfunction(vars(parent)[name]):
            theirs = list(inspect.signature(vars(parent)[name]).parameters)
            mine = list(inspect.signature(vars(MultiModulePipelineCommunicator)[name]).parameters)
            assert mine[: len(theirs)] == theirs, name
    assert set(multimodule_communicator.RankModuleInfo.__dataclass_fields__) == set(
        ours.RankModuleInfo.__dataclass_fields__
    )


def test_bridges_are_made_by_every_rank_in_one_sorted_order(worlds: Any) -> None:
    case = CASES[2]
    world = worlds(case.world_size + 1)  # one rank is in no module

    def body(rank: int) -> None:
        # Insertion order is each rank's own.
        names = sorted(case.grids, key=lambda name: (name == "language") ^ (rank % 2))
        communicator = MultiModulePipelineCommunicator(
            {name: case.grids[name] for name in names},
            {name: case.topology[name] for name in reversed(names)},
            pm.CONFIG,
            module_output_ndim=case.output_ndim,
        )
        communicator.close()
        communicator.close()

    world.run(body)
    expected = ["audio -> language", "images -> language", "images stage 0 -> stage 1", "images stage 1 -> stage 2"]
    expected.append("language stage 0 -> stage 1")
    assert all(world.made[rank] == expected for rank in range(world.size))
    assert all(world.closed[rank] == expected[::-1] for rank in range(world.size))


def test_where_each_rank_stands(worlds: Any) -> None:
    case = CASES[2]

    def body(rank: int) -> tuple[Any, ...]:
        communicator = make(case)
        ((name, info),) = communicator.rank_module_map.items()
        return (
            name,
            communicator.total_stages,
            communicator.current_stage,
            communicator.is_pp_first_stage,
            communicator.is_pp_last_stage,
            (info.pp_rank, info.pp_size, info.is_source_stage, info.is_terminal_stage),
            [edge.src_module_name for edge in info.bridge_comms_as_dest_module or []],
            [edge.dest_module_name for edge in info.bridge_comms_as_src_module or []],
            [communicator.is_module_pp_first_stage(module) for module in ("images", "audio", "language")],
            (info.p2p_communicator.prev_rank, info.p2p_communicator.next_rank),
        )

    assert worlds(case.world_size).run(body) == [
        ("images", 5, 0, True, False, (0, 3, True, False), [], [], [True, False, False], (None, 1)),
        ("images", 5, 1, False, False, (1, 3, False, False), [], [], [False, False, False], (0, 2)),
        ("images", 5, 2, False, False, (2, 3, False, False), [], ["language"], [False, False, False], (1, None)),
        ("audio", 5, 0, True, False, (0, 1, True, False), [], ["language"], [False, True, False], (None, None)),
        (
            "language",
            5,
            3,
            False,
            False,
            (0, 2, False, False),
            ["audio", "images"],
            [],
            [False, False, True],
            (None, 5),
        ),
        ("language", 5, 4, False, True, (1, 2, False, True), [], [], [False, False, False], (4, None)),
    ]


def test_a_rank_in_several_modules_stands_at_the_last_of_them(worlds: Any) -> None:
    both = Case(
        "",
        {"images": grid(0, dp=2), "audio": grid(0, dp=2), "language": grid(2, dp=1)},
        {"images": ["language"], "audio": ["images"], "language": []},
        {"images": [[1]], "audio": [[1]]},
    )

    def body(rank: int) -> tuple[int, list[str]]:
        communicator = make(both)
        return communicator.current_stage, list(communicator.rank_module_map)

    assert worlds(3).run(body) == [(1, ["images", "audio"])] * 2 + [(2, ["language"])]


def test_gradients_of_a_module_that_feeds_two_are_summed_and_keyed_by_it(worlds: Any) -> None:
    case = CASES[3]
    case = Case(case.name, {n: grid(i, dp=1) for i, n in enumerate(case.grids)}, case.topology, {"images": [[2, 1]]})

    def body(rank: int) -> Any:
        communicator = make(case)
        if rank == 0:
            x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
            first = communicator.send_forward_recv_backward({"images": x}, [()])
            second = communicator.send_forward_recv_backward({"images": x}, [()])
            return first, second
        received = communicator.recv_forward([()])
        assert received["images"].is_leaf
        assert received["images"].requires_grad
        communicator.send_backward({"images": torch.full((3, 4), float(rank), dtype=torch.float64)})
        communicator.recv_forward([()])
        communicator.send_backward({"images": None if rank == 1 else torch.full((3, 4), 7.0, dtype=torch.float64)})
        return None

    first, second = worlds(3).run(body)[0]
    torch.testing.assert_close(first, {"images": torch.full((3, 4), 3.0, dtype=torch.float64)})
    torch.testing.assert_close(second, {"images": torch.full((3, 4), 7.0, dtype=torch.float64)})


def test_a_gradient_leaves_before_the_next_activation_is_waited_for(worlds: Any) -> None:
    """A source that sends the next activation only once it has its gradient."""
    case = Case("", {"images": grid(0, dp=1), "language": grid(1, dp=1)}, SIMPLE.topology, {"images": [[1]]})

    def body(rank: int) -> None:
        communicator = make(case)
        if rank == 0:
            for i in range(3):
                grad = communicator.send_forward_recv_backward({"images": torch.full((2, 2), float(i)).double()})
                assert torch.equal(grad["images"], torch.full((2, 2), 10.0 * i).double())
            return
        x = communicator.recv_forward([()])["images"]
        for _ in range(2):
            x = communicator.send_backward_recv_forward({"images": x.detach() * 10}, [()])["images"]
        communicator.send_backward({"images": x.detach() * 10})

    worlds(2).run(body)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_no_gradient_is_zeros_where_the_schedule_needs_one_and_none_where_not(worlds: Any, requires_grad: bool) -> None:
    def body(rank: int) -> Any:
        communicator = make(SIMPLE)
        if rank >= 2:
            communicator.recv_forward([()])
            communicator.send_backward({"images": None})
            return None
        x = torch.ones(2, 4, dtype=torch.float64, requires_grad=requires_grad) * 1.0
        shape = x.shape
        communicator.send_forward({"images": x})
        schedules.deallocate_output_tensor({"images": x}, True)
        grad = communicator.recv_backward([()])["images"]
        if requires_grad:
            assert torch.equal(grad, torch.zeros(shape, dtype=torch.float64))
        return grad

    for grad in worlds(4).run(body)[:2]:
        assert (grad is not None) == requires_grad


def test_a_text_only_microbatch_is_zero_rows_both_ways(worlds: Any) -> None:
    case = Case(SIMPLE.name, SIMPLE.grids, SIMPLE.topology, {"images": [[0, 0, 0, 0], [2, 0, 0, 1], [0, 0, 0, 0]]})

    def body(rank: int) -> None:
        pm.check_rank(case, rank, pm.train_rank(make(case), case, rank))

    worlds(4).run(body)


def test_lists_of_one_tensor_are_taken_as_the_schedule_gives_them(worlds: Any) -> None:
    def body(rank: int) -> Any:
        communicator = make(SIMPLE)
        if rank < 2:
            x = torch.full((2, 4), float(rank), dtype=torch.float64, requires_grad=True)
            return communicator.send_forward_recv_backward({"images": [x]}, [()])["images"]
        x = communicator.recv_forward([()])["images"]
        communicator.send_backward({"images": [x.detach() * 3]})
        return x.detach()

    results = worlds(4).run(body)
    assert torch.equal(results[2], torch.tensor([[0.0] * 4] * 2 + [[1.0] * 4] * 2, dtype=torch.float64))
    assert torch.equal(results[1], torch.full((2, 4), 3.0, dtype=torch.float64))


def test_a_fixed_shape_between_stages_is_checked(worlds: Any) -> None:
    case = Case("", {"language": grid(0, pp=2)}, {"language": []}, {})
    x = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4)

    def body(rank: int) -> Any:
        communicator = make(case)
        if rank == 0:
            communicator.send_forward({"language": x})
            communicator.send_forward({"language": x})
            return None
        assert torch.equal(communicator.recv_forward([(2, 3, 4)])["language"], x)
        with pytest.raises(RuntimeError, match=r"rank 1, module language: expected shape \(2, 4, 4\).*got \(2, 3, 4\)"):
            communicator.recv_forward(torch.Size([2, 4, 4]))
        return None

    worlds(2).run(body)


def test_dtype_device_axes_and_timeout_reach_the_bridges(worlds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    world = worlds(1)
    fake = ours.Bridge

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return fake(*args, **kwargs)

    monkeypatch.setattr(our_edges, "Bridge", record)
    config = SimpleNamespace(pipeline_dtype=None, params_dtype=torch.bfloat16)
    one = {"language": grid(0, dp=1), "images": grid(0, dp=1)}

    def body(rank: int) -> None:
        MultiModulePipelineCommunicator(one, {"images": ["language"], "language": []}, config)
        MultiModulePipelineCommunicator(
            one,
            {"images": ["language"], "language": []},
            config,
            {"s": 0, "b": 1, "h": 2},
            {"images": 3},
            timeout=timedelta(seconds=3),
            device="meta",
        )
        MultiModulePipelineCommunicator(
            one, {"images": ["language"], "language": []}, config, {"s": 1, "b": 0, "h": 2}, {"images": 2}
        )

    world.run(body)
    common = {
        "max_in_flight": 3,
        "unpaired_backward": True,
        "ndim": 3,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "name": "images -> language",
    }
    setups = [kwargs.pop("setup") for kwargs in seen]
    assert [[text.split(":")[0] for text in setup.description] for setup in setups] == [["images -> language"]] * 3
    assert seen[0] == {**common, "batch_dim": 0, "seq_dim": 1}  # Megatron's default
    assert seen[1].pop("timeout").seconds == 3
    assert seen[1] == {**common, "batch_dim": 1, "seq_dim": 0, "device": torch.device("meta")}
    assert seen[2] == {**common, "ndim": 2}


@pytest.mark.parametrize(
    ("case", "options", "edges"),
    [
        (CASES[4], {}, "language -> generator"),  # 3-D, from two lanes to one; images -> language is 2-D
        (CASES[4], {"module_output_ndim": {}}, "images -> language, language -> generator"),
        (CASES[4], {"dim_mapping": pm.AXES}, None),
        (CASES[3], {"module_output_ndim": {}}, "images -> language"),  # the generator has one lane as images has
        (CASES[0], {}, None),
    ],
)
def test_axes_that_are_only_assumed_are_named_once_where_they_matter(
    case: Case, options: dict[str, Any], edges: str | None, worlds: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        worlds(case.world_size).run(lambda rank: make(case, **{"dim_mapping": None, **options}).close())
    messages = [(record.name, record.getMessage()) for record in caplog.records]
    text = "batch is taken to be axis 0, as the released class does; Megatron's own modules give [s, b, h]: pass "
    assert messages == ([] if edges is None else [(ours.logger.name, f"{edges}: {text}dim_mapping")])
    assert ours.logger.name == "mimo_ext.megatron.communicator"


@pytest.mark.leaks  # the profiler keeps a thread
def test_the_operations_are_named_in_a_profile(worlds: Any) -> None:
    world = worlds(1)
    names = ["recv_forward", "send_forward", "send_forward_recv_backward", "send_backward_recv_forward"]
    names += ["recv_backward", "send_backward"]

    def body(rank: int) -> set[str]:
        communicator = MultiModulePipelineCommunicator({"language": grid(0, dp=1)}, {"language": []}, pm.CONFIG)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for name in names:
                getattr(communicator, name)(*([{}] if name.startswith("send") else [[()]]))
        return {event.key for event in profile.key_averages()}

    assert {f"mimo_ext::pipeline.{name}" for name in names} <= world.run(body)[0]
