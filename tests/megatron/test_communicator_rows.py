"""Rows of each sample, as they are given to MultiModulePipelineCommunicator: what it takes and what it refuses; on
threads, bridges in memory. That the rows arrive is shown on real ranks in test_communicator_ranks.py.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from communicator_fakes import install, make
from pipeline_cases import SIMPLE
from pipeline_model import Case, grid


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`worlds(size)`: a world of threads on which the communicator runs."""
    return partial(install, monkeypatch)


def good() -> torch.Tensor:
    return torch.zeros(2, 4, dtype=torch.float64)


def marked(output: torch.Tensor, rows: list[int]) -> torch.Tensor:
    output._mimo_bridge_split_sizes = rows
    return output


@pytest.mark.parametrize(
    ("output", "row_counts", "error", "match"),
    [
        (good(), {"image": [1, 1]}, ValueError, r"rank 0: expected row_counts .*\['images'\], got \['image'\]"),
        (good(), {"images": [3, -1]}, ValueError, r"rank 0, module images: expected .* 0 or more, got \[3, -1\]"),
        (good(), [1, 1], TypeError, r"rank 0: expected row_counts as a dict, got list"),
        (good(), {"images": [2, 1]}, ValueError, r"rank 0, module images: expected 3 rows \(.*\[2, 1\].*\(2, 4\)"),
        (marked(good(), [2, 0]), {"images": [1, 1]}, ValueError, r"module images: expected .*\[1, 1\].*marked \[2, 0"),
    ],
)
def test_row_counts_of_a_send_are_checked_before_anything_is_sent(
    output: torch.Tensor, row_counts: Any, error: type[Exception], match: str, worlds: Any
) -> None:
    world = worlds(4)

    def body(rank: int) -> None:
        communicator = make(SIMPLE)
        if rank == 0:
            for name in ("send_forward", "send_forward_recv_backward"):
                with pytest.raises(error, match=match):
                    getattr(communicator, name)({"images": output}, row_counts=row_counts)

    world.run(body)
    assert not [key for key in world.mail if "forward" in key]


def test_row_counts_of_a_send_that_differ_from_the_models_are_refused(worlds: Any) -> None:
    def body(rank: int) -> None:
        communicator = make(SIMPLE, model=SimpleNamespace(row_counts={"images": deque([[1, 1]])}))
        if rank == 0:
            with pytest.raises(RuntimeError, match=r"expected .*\[1, 1\] \(model.row_counts\), got row_counts \[2, 0"):
                communicator.send_forward({"images": good()}, row_counts={"images": [2, 0]})

    worlds(4).run(body)


def test_row_counts_of_a_three_dimensional_output_are_refused(worlds: Any) -> None:
    def body(rank: int) -> None:
        communicator = make(SIMPLE, module_output_ndim={})
        if rank == 0:
            with pytest.raises(ValueError, match=r"rank 0, module images: expected a 2-D output.*shape \(1, 2, 4\)"):
                communicator.send_forward({"images": good()[None]}, row_counts={"images": [1, 1]})

    worlds(4).run(body)


@pytest.mark.parametrize(
    ("images", "language", "rows", "parts"),
    [
        (grid(0, dp=1), grid(1, dp=3), 4, 3),
        (grid(0, dp=2), grid(2, dp=3), 7, 3),
        (grid(0, dp=3), grid(3, dp=2), 5, 2),
        (grid(0, dp=4), grid(4, tp=2), 5, None),  # fan-in: each lane passes on what it has
        (grid(0, dp=2), grid(2, dp=2), 5, None),
        (grid(0, dp=2), grid(2, dp=3), 6, None),
    ],
)
def test_rows_without_counts_that_cannot_be_cut_evenly_are_refused(
    images: Any, language: Any, rows: int, parts: int | None, worlds: Any
) -> None:
    case = Case("", {"images": images, "language": language}, SIMPLE.topology, {"images": []})
    world = worlds(case.world_size)

    def body(rank: int) -> None:
        communicator = make(case)
        if rank != 0:
            return
        output = torch.zeros(rows, 4, dtype=torch.float64)
        if parts is None:
            communicator.send_forward({"images": output})
            return
        match = rf"rank 0, module images: expected rows .* evenly into {parts} .*shape \({rows}, 4\).*row_counts"
        with pytest.raises(ValueError, match=match):
            communicator.send_forward({"images": output})

    world.run(body)
    assert bool([key for key in world.mail if "forward" in key]) == (parts is None)
