"""Known defects of the released classes (docs/defects.md) that no other test names: each works here, or is refused.

On real gloo ranks unless said otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pipeline_model as pm
import pytest
import torch
import torch.distributed as dist
from communicator_fakes import install, make
from launch import launch
from pipeline_cases import SIMPLE
from pipeline_model import Case, grid
from torch.utils._python_dispatch import TorchDispatchMode

from mimo_ext.megatron.communicator import MultiModulePipelineCommunicator
from mimo_ext.megatron.parallel_utils import validate_data_loader_contract

TIMEOUT = timedelta(seconds=20)
EDGE = {"images": ["language"], "language": []}


def communicator(images: Any, language: Any, ndim: int = 2, **options: Any) -> MultiModulePipelineCommunicator:
    return MultiModulePipelineCommunicator(
        {"images": images, "language": language},
        EDGE,
        pm.CONFIG,
        module_output_ndim={"images": ndim},
        timeout=TIMEOUT,
        **options,
    )


def value(*shape: int, start: int = 0) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel(), dtype=pm.DTYPE) + start).reshape(shape)


# --- 6: rows per sample ride on an attribute of a tensor


def test_rows_per_sample_survive_operations_on_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts come from the model's queue: the product below has no attribute. In memory."""
    fan_out = Case("", {"images": grid(0, dp=1), "language": grid(1, dp=2)}, EDGE, {"images": [[1, 3]]})

    def body(rank: int) -> Any:
        made = make(fan_out)
        if rank > 0:
            return made.recv_forward([()])["images"].detach()
        made.bind(SimpleNamespace(row_counts={"images": deque([[1, 3]])}))
        output = value(4, 2)
        output._mimo_bridge_split_sizes = [1, 3]
        product = output * 2
        assert not hasattr(product, "_mimo_bridge_split_sizes")
        made.send_forward({"images": product})
        return None

    _, first, second = install(monkeypatch, 3).run(body)
    torch.testing.assert_close(first, value(4, 2)[:1] * 2)
    torch.testing.assert_close(second, value(4, 2)[1:] * 2)


# --- 7: [a, b, 1] is taken for an expanded [a, b]


def hidden_size_of_one(rank: int, world_size: int) -> None:
    x = value(2, 3, 1)
    with communicator(grid(0, dp=1), grid(1, tp=2), ndim=3) as made:
        if rank == 0:
            assert torch.equal(made.send_forward_recv_backward({"images": x}, [()])["images"], x * 5)
        else:
            received = made.recv_forward([()])["images"]
            assert received.shape == (2, 3, 1)
            assert torch.equal(received, x)
            made.send_backward({"images": received.detach() * 5})


def test_a_last_dimension_of_one_arrives_as_it_was_sent() -> None:
    launch(hidden_size_of_one, 3)


# --- 9: a rank that leads on both sides skips its send


def leads_on_both_sides(rank: int, world_size: int) -> None:
    """Lane i of the encoder feeds lane i of the language model; rank 1 is lane 1 there and lane 0 here."""
    with communicator(grid(0, dp=2), grid(1, dp=2)) as made:
        if rank < 2:
            made.send_forward({"images": value(3, 2, start=100 * rank)})
        if rank > 0:
            received = made.recv_forward([()])["images"]
            assert torch.equal(received, value(3, 2, start=100 * (rank - 1)))
            made.send_backward({"images": received.detach() * 2})
        if rank < 2:
            assert torch.equal(made.recv_backward([()])["images"], value(3, 2, start=100 * rank) * 2)


def test_a_rank_that_leads_on_both_sides_sends_and_receives() -> None:
    launch(leads_on_both_sides, 3)


# --- 10: leaders outside their broadcast group


def further_dim(rank: int, world_size: int) -> None:
    """Two samples' lanes by `gtp_remat`, each with two TP copies, on ranks 0-3."""
    with communicator(grid(0, tp=2, gtp_remat=2, dp=1), grid(4, tp=2)) as made:
        if rank < 4:
            mine = value(3, 2, start=100 * (rank // 2))
            assert torch.equal(made.send_forward_recv_backward({"images": mine}, [()])["images"], mine * 3)
        else:
            received = made.recv_forward([()])["images"]
            assert torch.equal(received, torch.cat([value(3, 2), value(3, 2, start=100)]))
            made.send_backward({"images": received.detach() * 3})


def test_a_grid_with_a_further_dim_has_lanes_of_its_own() -> None:
    launch(further_dim, 6)


# --- 11: process-group caches outlive their world


def three_worlds(rank: int, world_size: int, folder: str) -> None:
    for world in range(3):
        made = communicator(grid(0, dp=2), grid(2, tp=2))
        if rank < 2:
            made.send_forward({"images": value(2, 2, start=10 * rank + world)})
        else:
            expected = torch.cat([value(2, 2, start=world), value(2, 2, start=10 + world)])
            assert torch.equal(made.recv_forward([()])["images"], expected)
        if world == 1:
            made.close()  # the other times the world ends under an open communicator
        dist.barrier()
        dist.destroy_process_group()
        rendezvous = f"file://{folder}/{world}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=TIMEOUT)


def test_a_new_world_gets_new_groups(tmp_path: Path) -> None:
    launch(three_worlds, 4, str(tmp_path))


# --- 12: a world barrier per edge


def without_barrier(rank: int, world_size: int) -> None:
    """Two encoders feed a language model, which feeds a generator: three edges; rank 4 is in no module."""
    grids = {name: grid(first, dp=1) for first, name in enumerate(["images", "audio", "language", "generator"])}
    topology = {"images": ["language"], "audio": ["language"], "language": ["generator"], "generator": []}
    with patch("torch.distributed.barrier", partial(refuse, "barrier")):
        made = MultiModulePipelineCommunicator(grids, topology, pm.CONFIG, timeout=TIMEOUT)
    x = value(1, 2, 3, start=10 * rank)
    if rank < 2:
        made.send_forward({["images", "audio"][rank]: x})
    elif rank == 2:
        inputs = made.recv_forward([()])
        made.send_forward({"language": inputs["images"] + inputs["audio"]})
    elif rank == 3:
        assert torch.equal(made.recv_forward([()])["language"], value(1, 2, 3) + value(1, 2, 3, start=10))
    made.close()


def test_no_barrier_is_needed_to_join_modules() -> None:
    launch(without_barrier, 5)


# --- 13: host syncs


class NoHostSync(TorchDispatchMode):
    """Refuses every read of a tensor's value by the host, from Python or from C++."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise AssertionError(f"{func} reads a tensor's value")
        return func(*args, **(kwargs or {}))


def refuse(name: str, *args: Any, **kwargs: Any) -> None:
    raise AssertionError(f"{name} was called")


@contextmanager
def no_waiting() -> Iterator[None]:
    names = ["torch.cuda.synchronize", "torch.distributed.barrier", "torch.Tensor.item", "torch.Tensor.tolist"]
    names += ["torch.Tensor.cpu", "torch.Tensor.numpy", "torch.cuda.Stream.synchronize", "torch.cuda.Event.synchronize"]
    patches = [patch(name, partial(refuse, name)) for name in names]
    for one in patches:
        one.start()
    try:
        with NoHostSync():
            yield
    finally:
        for one in patches:
            one.stop()


def without_waiting(rank: int, world_size: int) -> None:
    """All six operations, over a bridge with ragged rows and between stages, while whatever waits is refused."""
    with pytest.raises(AssertionError, match="item was called"), no_waiting():
        torch.ones(()).item()
    with pytest.raises(AssertionError, match="reads a tensor's value"), no_waiting():
        bool(torch.ones(()))
    counts = [[1, 2], [3, 0]]
    made = communicator(grid(0, dp=2), grid(2, dp=1, pp=2))
    received = torch.empty(0)
    for step in range(2):
        if rank < 2:
            x = value(3, 2, start=50 * rank + step).requires_grad_()
            output = x * 1.0
            output._mimo_bridge_split_sizes = counts[rank]
            with no_waiting():
                if step == 0:
                    grads = made.send_forward_recv_backward({"images": output}, [()])
                else:
                    made.send_forward({"images": output})
                    grads = made.recv_backward([()])
            assert torch.equal(grads["images"], output.detach() * 7)
        else:
            name = "images" if rank == 2 else "language"
            with no_waiting():
                gradient = {name: received.detach() * 7}
                inputs = made.send_backward_recv_forward(gradient, [()]) if step else made.recv_forward([()])
            received = inputs[name]
            assert torch.equal(received, torch.cat([value(3, 2, start=50 * lane + step) for lane in (0, 1)]))
            if rank == 2:
                with no_waiting():
                    grads = made.send_forward_recv_backward({"language": received}, [()])
                assert torch.equal(grads["language"], received.detach() * 7)
            if step == 1:
                with no_waiting():
                    made.send_backward({name: received.detach() * 7})
    made.close()


def test_no_operation_reads_a_tensor_on_the_host_or_waits_for_a_device() -> None:
    launch(without_waiting, 4)


# --- 14: where a rank stands


def test_a_rank_without_a_module_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory; five ranks, four of them in modules."""

    def body(rank: int) -> Any:
        made = make(SIMPLE)
        assert made.total_stages == 2
        if rank < 4:
            return made.current_stage
        assert (made.is_pp_first_stage, made.is_pp_last_stage, made.rank_module_map) == (False, False, {})
        with pytest.raises(ValueError, match="rank 4 is in no module: expected it in one of"):
            _ = made.current_stage
        return None

    assert install(monkeypatch, 5).run(body) == [0, 0, 1, 1, None]


# --- 17: the data loader contract on a real grid


def test_the_data_loader_contract_holds_for_real_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank, no process group: HyperCommGrid itself."""
    from megatron.core.hyper_comm_grid import HyperCommGrid

    monkeypatch.setenv("WORLD_SIZE", "5")
    names = ["tp", "cp", "dp", "pp"]
    grids = {
        "images": HyperCommGrid([1, 1, 3, 1], names, rank_offset=0, backend="gloo"),
        "language": HyperCommGrid([1, 1, 2, 1], names, rank_offset=3, backend="gloo"),
    }
    assert not hasattr(grids["images"], "get_pg_size")
    infra = SimpleNamespace(module_to_grid_map=grids)
    validate_data_loader_contract(infra, global_batch_size=12, micro_batch_size=6, num_microbatches=2)
    with pytest.raises(ValueError, match="Micro batch size 4 not divisible by images DP size 3"):
        validate_data_loader_contract(infra, global_batch_size=8, micro_batch_size=4, num_microbatches=2)


# --- 20: rows that do not divide


def uneven_rows(rank: int, world_size: int) -> None:
    with communicator(grid(0, dp=1), grid(1, dp=2)) as made:
        if rank > 0:
            expected = value(3, 4)[:1] if rank == 1 else value(3, 4)[1:]
            assert torch.equal(made.recv_forward([()])["images"], expected)
            return
        words = r"rank 0, module images: .*split evenly into 2 parts.*got .*shape \(3, 4\).*pass row_counts"
        with pytest.raises(ValueError, match=words):
            made.send_forward({"images": value(3, 4)})
        # Nothing of it was sent. What belongs to each sample can be said:
        output = value(3, 4)
        output._mimo_bridge_split_sizes = [1, 2]
        made.send_forward({"images": output})


def test_rows_that_do_not_divide_are_refused_unless_their_samples_are_known() -> None:
    launch(uneven_rows, 3)


def uneven_batch(rank: int, world_size: int) -> None:
    """Three samples on one lane, then on two: lane i of k has the samples from i * 3 // k to (i + 1) * 3 // k."""
    x = value(2, 3, 4)
    mine = [x, x[:, :1], x[:, 1:], x][rank]
    grids = {"images": grid(0, dp=1), "language": grid(1, dp=2), "generator": grid(3, dp=1)}
    topology = {"images": ["language"], "language": ["generator"], "generator": []}
    axes = {"s": 0, "b": 1, "h": 2}
    made = MultiModulePipelineCommunicator(grids, topology, pm.CONFIG, axes, timeout=TIMEOUT)
    if rank == 0:
        assert torch.equal(made.send_forward_recv_backward({"images": x}, [()])["images"], x * 3)
    elif rank < 3:
        assert torch.equal(made.recv_forward([()])["images"], mine)
        made.send_backward({"images": mine * 3})
        # A lane does not know how many samples the others have: equal numbers are assumed, and compared.
        made.send_forward({"language": mine})
    else:
        with pytest.raises(
            RuntimeError, match=r"'language' sent different microbatches: expected 2 samples of .*got 4 samples of "
        ):
            made.recv_forward([()])
    dist.barrier()
    made.close(abort=True)


def test_a_batch_that_does_not_divide_is_cut_by_one_rule_and_refused_where_lanes_cannot_know() -> None:
    launch(uneven_batch, 4)
