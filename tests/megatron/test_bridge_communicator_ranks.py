"""BridgeCommunicator on real gloo ranks: every value that arrives, forward and backward, and the end of its groups."""

from __future__ import annotations

import gc
import re
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bridge_cases import EDGES, Edge
from launch import launch
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.pipeline_parallel import bridge_communicator as released
from pipeline_model import Grid, grid

import mimo_ext.megatron
from mimo_ext import BridgeError
from mimo_ext._groups import Groups
from mimo_ext.megatron.communicator import BridgeCommunicator

WORLD_SIZE = 8
TIMEOUT = timedelta(seconds=30)
MICROBATCHES = 3


def check(edge: Edge, rank: int, what: str, got: Any, expected: torch.Tensor | None) -> list[str]:
    if expected is None:
        return [] if got is None else [f"{edge.name}: rank {rank}: {what}: expected None"]
    try:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    except AssertionError as error:
        return [f"{edge.name}: rank {rank}: {what}: {error}"]
    return []


def exchange(communicator: Any, edge: Edge, rank: int, seed: int) -> list[str]:
    """One microbatch there and back by the four simple calls, as every rank of either grid makes them."""
    failures = []
    sends, receives = edge.is_boundary(edge.src, rank), edge.is_boundary(edge.dest, rank)
    if rank in edge.src:
        output = edge.output(rank, seed) if sends else None
        failures += check(edge, rank, "send", communicator.send_forward(output, **edge.options(rank)), None)
    if rank in edge.dest:
        got = communicator.recv_forward()
        failures += check(
            edge, rank, "activation", got, edge.part(edge.dest, rank, edge.whole(seed)) if receives else None
        )
        if receives and not got.requires_grad:
            failures.append(f"{edge.name}: rank {rank}: the activation does not require grad")
        communicator.send_backward(edge.gradient(rank, seed) if receives else None)
    if rank in edge.src:
        got = communicator.recv_backward()
        failures += check(edge, rank, "gradient", got, edge.expected_gradient(rank, seed) if sends else None)
    return failures


def exchange_combined(communicator: Any, edge: Edge, rank: int) -> list[str]:
    """Several microbatches by the two combined calls, as 1F1B makes them."""
    failures = []
    if rank in edge.src:
        sends = edge.is_boundary(edge.src, rank)
        outputs = [edge.output(rank, seed) if sends else None for seed in range(MICROBATCHES)]
        communicator.send_forward(outputs[0], **edge.options(rank))
        for seed in range(MICROBATCHES):
            expected = edge.expected_gradient(rank, seed) if sends else None
            if seed + 1 < MICROBATCHES:
                shape = None if expected is None else tuple(expected.shape)
                got = communicator.send_forward_recv_backward(outputs[seed + 1], shape, **edge.options(rank))
            else:
                got = communicator.recv_backward()
            failures += check(edge, rank, f"gradient {seed}", got, expected)
    if rank in edge.dest:
        receives = edge.is_boundary(edge.dest, rank)
        got = communicator.recv_forward()
        for seed in range(MICROBATCHES):
            expected = edge.part(edge.dest, rank, edge.whole(seed)) if receives else None
            failures += check(edge, rank, f"activation {seed}", got, expected)
            gradient = edge.gradient(rank, seed) if receives else None
            if seed + 1 < MICROBATCHES:
                shape = None if expected is None else list(expected.shape)
                got = communicator.send_backward_recv_forward(gradient, forward_shape=shape)
            else:
                communicator.send_backward(gradient)
    return failures


def all_edges(rank: int, world_size: int) -> list[str]:
    failures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(released.BridgeCommunicator, "__init__", None)
        for edge in EDGES:
            communicator = BridgeCommunicator(**edge.arguments(), timeout=TIMEOUT)
            for seed in range(2):
                failures += exchange(communicator, edge, rank, seed)
            failures += exchange_combined(communicator, edge, rank)
            communicator.close()
    return failures


def test_every_value_arrives_there_and_back_whatever_the_layouts() -> None:
    failures = [failure for rank in launch(all_edges, WORLD_SIZE, timeout=120) for failure in rank]
    assert not failures, "\n".join(failures)


def hyper_comm_grid(side: Grid) -> Any:
    names = ["tp", "cp", "dp", "pp"]
    return HyperCommGrid([side.extent(name) for name in names], names, side.rank_offset, backend="gloo")


class OnGloo:
    """torch.distributed, whose groups are gloo's whatever is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name in ("new_group", "new_subgroups_by_enumeration"):
            return lambda ranks, backend: getattr(dist, name)(ranks, backend="gloo")
        return getattr(dist, name)


def with_megatrons_own(rank: int, world_size: int) -> list[str]:
    """The same program on Megatron's class (switched to gloo) and on ours, on the edges that the former can do."""
    failures = []
    with mimo_ext.megatron.cpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(released, "dist", OnGloo())
        for edge in (edge for edge in EDGES if edge.like_released):
            grids = {"src_grid": hyper_comm_grid(edge.src), "dest_grid": hyper_comm_grid(edge.dest)}
            for kind in (released.BridgeCommunicator, BridgeCommunicator):
                communicator = kind(**{**edge.arguments(), **grids})
                failures += [f"{kind.__module__}: {text}" for text in exchange(communicator, edge, rank, 5)]
                if kind is BridgeCommunicator:
                    assert isinstance(communicator, released.BridgeCommunicator)
                    communicator.close()
    return failures


def test_a_program_gets_the_values_that_megatrons_own_class_gives() -> None:
    failures = [failure for rank in launch(with_megatrons_own, WORLD_SIZE, timeout=120) for failure in rank]
    assert not failures, "\n".join(failures)


def on_both_sides(rank: int, world_size: int) -> None:
    """Two source lanes and one destination lane of two copies, on the same two ranks: rank 0 leads on both sides."""
    edge = Edge("same ranks", grid(0, dp=2), grid(0, tp=2), rows=(2, 3, 0, 1))
    with_forward = BridgeCommunicator(**edge.arguments(), timeout=TIMEOUT)
    for seed in range(2):
        assert not exchange(with_forward, edge, rank, seed)
    info = with_forward.comm_map[0]
    assert info == released.RankCommInfo(released.CommRole.SENDER, [0], [0, 1])
    assert with_forward.comm_map[1] == released.RankCommInfo(released.CommRole.SENDER, [0], [])
    with_forward.close()


def test_a_rank_that_leads_on_both_sides_sends_and_receives() -> None:
    launch(on_both_sides, 2, timeout=60)


def wrong_calls(rank: int, world_size: int) -> None:
    edge = Edge("", grid(0, dp=2), grid(2, tp=2), rows=(1, 2, 3, 4), dtype=torch.float32)
    communicator = BridgeCommunicator(**{**edge.arguments(), "comm_dtype": None}, timeout=TIMEOUT)
    assert communicator.comm_dtype is torch.float32
    x = torch.zeros(3, 4)
    for name, arguments in [("send_forward", [x]), ("recv_backward", []), ("send_forward_recv_backward", [x])]:
        if rank not in edge.src:
            words = rf"bridge 'images -> language', rank {rank}: {name}: expected a rank of the source grid, \[0, 2\)"
            with pytest.raises(ValueError, match=words):
                getattr(communicator, name)(*arguments)
    for name, arguments in [("recv_forward", []), ("send_backward", [x]), ("send_backward_recv_forward", [x])]:
        if rank not in edge.dest:
            words = (
                rf"bridge 'images -> language', rank {rank}: {name}: expected a rank of the destination grid, \[2, 4\)"
            )
            with pytest.raises(ValueError, match=words):
                getattr(communicator, name)(*arguments)
    if rank == 0:
        output = edge.output(rank, 0)
        refused: list[tuple[Any, dict[str, Any], str]] = [
            (output.bfloat16(), {"row_counts": [1, 2]}, "expected dtype Float, got BFloat16"),
            (output[None], {}, "expected a tensor of 2 axes, got shape"),
            (output, {"row_counts": [2, 1]}, r"expected rows per sample \[2, 1\].*got a tensor marked \[1, 2\]"),
            (output.detach(), {"row_counts": [2, 2]}, r"row_counts of 2 samples sum to 4 rows.*tensor of 3 rows"),
        ]
        for tensor, options, words in refused:
            with pytest.raises(ValueError, match=f"rank 0.*send_forward.*{words}"):
                communicator.send_forward(tensor, **options)
    # Nothing of all that was sent: the values still arrive.
    assert not exchange(communicator, edge, rank, 3)
    # An expected shape is a promise.
    if rank in edge.src:
        match = re.escape(f"rank {rank}: expected a gradient of shape (9, 9), got ({3 if rank == 0 else 7}, 4)")
        with pytest.raises(RuntimeError, match=match):
            communicator.send_forward_recv_backward(edge.output(rank, 0), (9, 9))
    elif rank in edge.dest:
        communicator.recv_forward()
        communicator.send_backward(edge.gradient(rank, 0))
    communicator.close()
    operation = {True: "recv_backward", False: "recv_forward"}
    if rank < 4:
        with pytest.raises(BridgeError, match=f"rank {rank}: {operation[rank < 2]}: the bridge is closed"):
            getattr(communicator, operation[rank < 2])()


def test_wrong_calls_name_rank_module_expected_and_got_and_send_nothing() -> None:
    launch(wrong_calls, 5, timeout=60)


def wrong_arguments(rank: int, world_size: int) -> list[str]:
    """What differs between ranks, and what one rank alone refuses, raises on all of them."""
    texts = []
    good = {"src_grid": grid(0, dp=2), "dest_grid": grid(2, dp=1)}
    for bad in (
        {"comm_dtype": torch.bfloat16},
        {"tensor_ndim": 4},
        {"dim_mapping": {"s": 0, "b": 0, "h": 2}},
        {"src_grid": grid(0, usp=2)},
        {"comm_dtype": "float32"},
    ):
        with pytest.raises((ValueError, TypeError), match=f"rank {rank}") as caught:
            BridgeCommunicator(**{**good, **(bad if rank == 1 else {})}, timeout=TIMEOUT)
        texts.append(str(caught.value))
    BridgeCommunicator(**good).close()  # and nothing is out of step afterwards
    return texts


def test_arguments_that_one_rank_refuses_fail_on_every_rank() -> None:
    words = [
        "dtype=torch.bfloat16",
        "tensor_ndim: expected 2 or 3, got 4",
        "dim_mapping: expected 's', 'b' and 'h'",
        "unknown dim 'usp' of size 2",
        "comm_dtype: expected a torch.dtype, got 'float32'",
    ]
    for texts in launch(wrong_arguments, 3, timeout=60):
        for text, expected in zip(texts, words, strict=True):
            assert expected in text


def collectives(rank: int, world_size: int) -> dict[str, int]:
    counts: Counter[str] = Counter()
    names = ["all_gather", "all_gather_object", "all_reduce", "barrier", "broadcast", "new_group"]
    names += ["new_subgroups_by_enumeration", "send", "recv", "batch_isend_irecv", "broadcast_object_list"]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            original = getattr(dist, name)

            def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
                counts[name] += 1
                return original(*args, **kwargs)

            patch.setattr(dist, name, counted)
        BridgeCommunicator(grid(0, tp=2, dp=2), grid(4, tp=2, dp=2), tensor_ndim=2).close()
    return dict(counts)


def test_the_constructor_runs_no_collective_and_makes_no_group_of_the_world() -> None:
    assert launch(collectives, WORLD_SIZE, timeout=60) == [{}] * WORLD_SIZE


def open_groups() -> int:
    """Process groups in this process that are bridges' own, each once."""
    gc.collect()
    held = [each for each in gc.get_objects() if isinstance(each, Groups)]
    return len({id(group) for each in held for group in (each.forward, each.backward)})


def destroyed_and_made_again(rank: int, world_size: int, folder: str) -> None:
    edge = EDGES[0]
    first = BridgeCommunicator(**edge.arguments(), timeout=TIMEOUT)
    second = BridgeCommunicator(**EDGES[1].arguments(), timeout=TIMEOUT)
    assert not exchange(first, edge, rank, 0)
    assert first.bridge_pg is None
    assert open_groups() == (4 if rank < 8 else 0)
    BridgeCommunicator.destroy_broadcast_pgs()
    BridgeCommunicator.destroy_bridge_pgs()
    BridgeCommunicator.destroy_bridge_pgs()
    assert open_groups() == 0
    assert first.bridge.closed
    assert second.bridge.closed
    # A subclass' call ends its own only.
    third = BridgeCommunicator(**edge.arguments(), timeout=TIMEOUT)
    type("Other", (BridgeCommunicator,), {}).destroy_bridge_pgs()
    assert not exchange(third, edge, rank, 1)
    # The default group goes first.
    dist.destroy_process_group()
    BridgeCommunicator.destroy_bridge_pgs()
    BridgeCommunicator.destroy_broadcast_pgs()
    assert third.bridge.closed
    for attempt in range(2):
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{attempt}", rank=rank, world_size=world_size, timeout=TIMEOUT
        )
        for edge in EDGES[attempt : attempt + 2]:  # the same sets of ranks as before
            assert not exchange(BridgeCommunicator(**edge.arguments(), timeout=TIMEOUT), edge, rank, 2)
        if attempt == 0:
            dist.destroy_process_group()  # without a word to the communicators
    BridgeCommunicator.destroy_bridge_pgs()


def test_groups_end_in_any_order_and_are_made_again_after_the_default_group(tmp_path: Path) -> None:
    launch(destroyed_and_made_again, WORLD_SIZE, str(tmp_path), timeout=90)


def sends_and_forgets(rank: int, world_size: int) -> float:
    """As programs written for Megatron's class do: the communicator is a local variable, and nobody closes it."""
    edge = Edge("", grid(0, dp=1), grid(1, dp=1), rows=(3, 5))
    communicator = BridgeCommunicator(**edge.arguments(), timeout=TIMEOUT)
    dist.barrier()
    start = time.perf_counter()
    if rank == 0:
        big = torch.arange(8 * 2**18, dtype=torch.float32).reshape(8, 2**18)  # more than a socket's buffer
        communicator.send_forward(big, row_counts=[3, 5])
    else:
        time.sleep(1.0)
        received = communicator.recv_forward()
        assert received is not None
        assert torch.equal(received, torch.arange(8 * 2**18, dtype=torch.float32).reshape(8, 2**18))
    del communicator
    return time.perf_counter() - start


def test_what_was_sent_arrives_although_the_sender_is_dropped() -> None:
    durations = launch(sends_and_forgets, 2, timeout=60)
    assert all(duration < 8 for duration in durations)


def gradients_first(rank: int, world_size: int) -> list[str]:
    """Gradients that belong to no activation, alone and in the combined calls; then microbatches as usual."""
    failures = []
    edges = [edge for edge in EDGES if edge.rows is None or edge.name == "even rows"]
    for edge in edges:
        sends, receives = edge.is_boundary(edge.src, rank), edge.is_boundary(edge.dest, rank)
        expected = [edge.expected_gradient(rank, seed) if sends else None for seed in range(2)]
        alone = BridgeCommunicator(**edge.arguments(), timeout=TIMEOUT)
        for seed in range(2):
            if rank in edge.dest:
                alone.send_backward(edge.gradient(rank, seed) if receives else None)
            if rank in edge.src:
                failures += check(edge, rank, "gradient alone", alone.recv_backward(), expected[seed])
        # They were those of the first two microbatches.
        for seed in range(2):
            if rank in edge.src:
                alone.send_forward(edge.output(rank, seed) if sends else None)
            if rank in edge.dest:
                activation = edge.part(edge.dest, rank, edge.whole(seed)) if receives else None
                failures += check(edge, rank, "activation after its gradient", alone.recv_forward(), activation)
        failures += exchange(alone, edge, rank, 3)
        alone.close()
        both = BridgeCommunicator(**edge.arguments(), timeout=TIMEOUT)
        if rank in edge.src:
            got = both.send_forward_recv_backward(edge.output(rank, 0) if sends else None)
            failures += check(edge, rank, "gradient in exchange", got, expected[0])
        if rank in edge.dest:
            got = both.send_backward_recv_forward(edge.gradient(rank, 0) if receives else None)
            activation = edge.part(edge.dest, rank, edge.whole(0)) if receives else None
            failures += check(edge, rank, "activation in exchange", got, activation)
        failures += exchange(both, edge, rank, 4)
        both.close()
    return failures


def test_gradients_may_go_ahead_of_the_first_activation() -> None:
    failures = [failure for rank in launch(gradients_first, WORLD_SIZE, timeout=120) for failure in rank]
    assert not failures, "\n".join(failures)
