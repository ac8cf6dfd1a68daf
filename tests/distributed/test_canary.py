"""`MIMO_EXT_CHECK=1`: right rows pass, on every kind of layout; the first wrong one is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch
from test_bridge_values import CASES, WORLD, run_case

import mimo_ext
from mimo_ext import Bridge, Layout, RowShards
from mimo_ext._canary import CheckedBridge, RowCheckError, bits_of, enabled, sums_of

ROWS, HIDDEN = [2, 0, 3, 1], 8
CHECKED = (
    "fan-in",
    "non-dividing dp",
    "uneven",
    "ragged fan-in",
    "no rows",
    "even, no counts",
    "cp copies",
    "source cp copies",
    "3-D sbh",
    "3-D zigzag and sequence parallel",
    "3-D shards on both sides",
    "2-D shards on both sides",
    "2-D ragged sharded source",
    "static 2-D",
    "static 3-D",
    "overlapping ranks",
    "bf16",
    "chunks cp",
    "even lanes that differ",
    "row counts beyond the header",
)


def checked_cases(rank: int, world_size: int) -> None:
    os.environ["MIMO_EXT_CHECK"] = "1"
    for case in CASES:
        if case.name in CHECKED:
            run_case(rank, case)


def test_right_rows_pass_on_every_kind_of_layout() -> None:
    assert len(set(CHECKED) & {case.name for case in CASES}) == len(CHECKED)
    launch(checked_cases, WORLD, timeout=120)


class Tampering:
    """A communicator whose payload is changed on its way."""

    def __init__(self, communicator: Any, operation: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._communicator, self._operation, self._change = communicator, operation, change

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._communicator, name)
        if name != self._operation:
            return method
        return lambda x, *rest: method(self._change(x.detach()), *rest)


def swapped(x: torch.Tensor) -> torch.Tensor:
    """Rows 1 and 2."""
    return x[[0, 2, 1, *range(3, len(x))]]


def flipped(x: torch.Tensor) -> torch.Tensor:
    """One bit of row 2."""
    changed = x.clone()
    changed[2].view(torch.int32)[3] ^= 1
    return changed


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Every row where the one before it should be."""
    return x.roll(1, dims=0)


def error_of_tampered(
    rank: int, world_size: int, dst: dict[str, Any], operation: str, who: int, change: Any, dealt: bool = False
) -> str:
    """What each rank is told when `who` sends something else than it was given, in the second microbatch."""
    os.environ["MIMO_EXT_CHECK"] = "1"
    src = Layout(range(2), dp=2, name="images")
    timeout = timedelta(seconds=20)
    bridge = Bridge(src, Layout(range(2, world_size), **dst, name="language"), timeout=timeout)
    shards = RowShards([[(0, 1), (1, 1)], [], [(1, 2), (0, 1)], [(1, 1)]], 2) if dealt else None
    told: Any = {"row_shards": shards} if dealt else {}
    assert type(bridge) is CheckedBridge
    generator = torch.Generator().manual_seed(rank)
    message = ""
    for microbatch in range(2):
        if microbatch == 1 and rank == who:
            bridge._open = Tampering(bridge._open, operation, change)
        if bridge.is_source:
            counts = ROWS[2 * rank : 2 * rank + 2]
            x = torch.randn(sum(counts), HIDDEN, generator=generator)
            bridge.send_forward(x, **(told or {"row_counts": counts}))
        try:
            if bridge.is_destination:
                y = bridge.recv_forward(**told)
                bridge.send_backward(torch.randn(y.shape, generator=generator))
            elif not (microbatch == 1 and operation == "send_forward"):
                assert bridge.recv_backward() is not None
        except RowCheckError as error:
            message = str(error)
    dist.barrier()
    bridge.close(abort=True)
    return message


def test_the_first_row_that_is_another_one_is_named_with_both_places() -> None:
    # Rank 1 holds samples 2 and 3: three rows, then one. Rows 1 and 2 of sample 2 come as rows 3 and 4 of the lane.
    found = launch(error_of_tampered, 4, {"tp": 2}, "send_forward", 1, swapped)
    assert found[:2] == ["", ""]
    for rank in (2, 3):
        assert found[rank] == (
            f"bridge 'images -> language', rank {rank}: recv_forward of microbatch 1 (MIMO_EXT_CHECK): row 3 of this "
            "rank's tensor: expected row 1 of sample 2, got row 2 of sample 2"
        )


def test_a_single_bit_of_a_row_is_found() -> None:
    found = launch(error_of_tampered, 4, {"dp": 2}, "send_forward", 1, flipped)
    assert found[:3] == ["", "", ""]
    expected = "row 2 of this rank's tensor: expected row 2 of sample 2, got a row of other bits than were sent"
    assert found[3].endswith(expected)


def test_a_row_of_a_shard_is_named_by_its_place_in_the_sample() -> None:
    found = launch(error_of_tampered, 4, {"tp": 2}, "send_forward", 1, shifted, True)
    # Of sample 2 rank 3 uses rows 0 and 1, which are rows 1 and 2 of its tensor; row 0 comes as row 3 of the lane.
    assert "rank 3: recv_forward of microbatch 1" in found[3]
    assert "row 1 of this rank's tensor: expected row 0 of sample 2, got" in found[3]


def test_a_wrong_gradient_is_named() -> None:
    found = launch(error_of_tampered, 4, {"tp": 2}, "send_backward", 2, shifted)
    wrong = [text for text in found[:2] if text]
    assert wrong
    assert all("recv_backward of microbatch 1" in text for text in wrong)
    assert "row 0 of this rank's tensor: expected row 0 of sample " in wrong[0]


def test_a_wrong_part_of_a_summed_gradient_is_named() -> None:
    found = launch(error_of_tampered, 4, {"cp": 2}, "send_backward", 3, shifted)
    assert "got one that is not the sum of the contributions to it" in found[0]
    assert "rank 0: recv_backward of microbatch 1" in found[0]
    assert "row 0 of this rank's tensor: expected row 0 of sample 0" in found[0]
    assert "rank 1: recv_backward of microbatch 1" in found[1]


def no_gradients(rank: int, world_size: int) -> None:
    """None, zeros and gradients that come before their microbatch are no errors."""
    os.environ["MIMO_EXT_CHECK"] = "1"
    src, dst = Layout(range(1)), Layout(range(1, 3), dp=2)
    with Bridge(src, dst, unpaired_backward=True, timeout=timedelta(seconds=20)) as bridge:
        if rank == 0:
            bridge.send_forward(torch.ones(4, HIDDEN), row_counts=[1, 3])
            dx = bridge.recv_backward()
            assert dx is not None
            assert dx.sum(dim=1).tolist() == [HIDDEN, 0, 0, 0]
            bridge.send_forward(torch.ones(4, HIDDEN), row_counts=[1, 3])
            assert bridge.recv_backward() is None
            ahead = bridge.recv_backward()
            assert ahead is not None
            assert ahead.shape == (4, HIDDEN)
            bridge.send_forward(torch.ones(4, HIDDEN), row_counts=[2, 2])
        else:
            y = bridge.recv_forward()
            bridge.send_backward(torch.ones_like(y) if rank == 1 else None)
            bridge.recv_forward()
            bridge.send_backward(None)
            bridge.send_backward(torch.ones(2, HIDDEN))
            assert bridge.recv_forward().shape == (2, HIDDEN)


def test_absent_gradients_and_gradients_ahead_of_their_microbatch_pass() -> None:
    launch(no_gradients, 3)


def unchecked(rank: int, world_size: int) -> None:
    os.environ.pop("MIMO_EXT_CHECK", None)
    with Bridge(Layout(range(1)), Layout(range(1, 2))) as bridge:
        assert type(bridge) is Bridge
        os.environ["MIMO_EXT_CHECK"] = "1"  # too late for this one
        if rank == 0:
            bridge.send_forward(torch.ones(2, HIDDEN))
            bridge.recv_backward()
        else:
            bridge.send_backward(bridge.recv_forward().detach())
    with Bridge(Layout(range(1)), Layout(range(1, 2))) as bridge:
        assert type(bridge) is CheckedBridge
        bridge.max_in_flight = 3
        assert bridge._beside.max_in_flight == 3


def test_bridges_are_checked_from_their_construction_on_or_never() -> None:
    launch(unchecked, 2)


def differ(rank: int, world_size: int) -> str:
    os.environ["MIMO_EXT_CHECK"] = "1" if rank == 0 else "0"
    with pytest.raises((ValueError, RuntimeError)) as error:
        Bridge(Layout(range(1)), Layout(range(1, 2)), timeout=timedelta(seconds=5))
    return str(error.value)


def test_ranks_that_differ_on_whether_to_check_are_told() -> None:
    assert all("MIMO_EXT_CHECK" in text for text in launch(differ, 2))


def test_the_variable_is_read_as_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, on in (("1", True), ("yes", True), ("0", False), ("", False), ("off", False), ("False", False)):
        monkeypatch.setenv("MIMO_EXT_CHECK", value)
        assert enabled() is on
    monkeypatch.delenv("MIMO_EXT_CHECK")
    assert enabled() is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.complex64])
def test_marks_tell_rows_apart_and_sums_have_sums(dtype: torch.dtype) -> None:
    rows = torch.randn(5000, 6, generator=torch.Generator().manual_seed(0)).mul(1000).to(dtype)
    marks = bits_of(rows)
    assert len(set(marks.tolist())) == len({row.numpy().tobytes() for row in rows.view(torch.uint8)})
    assert torch.equal(bits_of(rows[2000:]), marks[2000:])
    other = rows.flip(0)
    total, magnitude = sums_of(rows + other)
    expected = sums_of(rows)[0] + sums_of(other)[0]
    unit = torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0
    assert ((total - expected).abs() <= (unit + 1e-12) * 2 * (sums_of(rows)[1] + sums_of(other)[1])).all()
    assert (magnitude >= total.abs()).all()


def test_the_package_exports_the_error_by_its_base() -> None:
    assert issubclass(RowCheckError, mimo_ext.BridgeError)
