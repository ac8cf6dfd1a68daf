"""The benchmarks' comparisons over plain loopback: both communicators, every value checked before anything is timed."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import RankFailure, launch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


class Meet:
    """In place of the barrier of the benchmark's own processes."""

    def wait(self) -> None:
        dist.barrier()


def measure(rank: int, world_size: int, spoiled: str | None) -> dict[str, list[tuple[float, float]]]:
    sys.path.insert(0, str(BENCHMARKS))
    import transfers
    from cases import KIB, METHODS, Case, parse_layout

    if spoiled:
        name = {"ours": "ours", "released": "theirs"}[spoiled]
        made = getattr(transfers, name)

        def one_number_is_wrong(*args: Any, **options: Any) -> Any:
            context = made(*args, **options)
            ops = context.__enter__()
            receive = ops.recv_backward

            def recv_backward() -> torch.Tensor:
                gradient = receive().clone()
                gradient[-1, -1, -1] += 1
                return gradient

            ops.recv_backward = recv_backward
            return _Entered(ops, context)

        setattr(transfers, name, one_number_is_wrong)
    runs = {}
    for family, layout, microbatches in (("small", "tp2-dp2", 2), ("steady-1f1b", "dp2-tp2", 3)):
        case = Case(family, *parse_layout(layout), 16 * KIB, METHODS, microbatches)
        runs = transfers.run_case(rank, Meet(), case, 2).runs
    return runs


class _Entered:
    def __init__(self, value: Any, context: Any) -> None:
        self.value, self.context = value, context

    def __enter__(self) -> Any:
        return self.value

    def __exit__(self, *error: Any) -> Any:
        return self.context.__exit__(*error)


def test_both_communicators_deliver_the_same_values_and_are_timed_in_turns() -> None:
    for runs in launch(measure, 4, None):
        assert set(runs) == {"released", "replicated", "sharded", "replicated-static", "sharded-static"}
        spans = sorted(span for method in runs.values() for span in method)
        assert len(spans) == 10
        # In turns: no two overlap, and each method's second run is after every method's first.
        assert all(begin < end for begin, end in spans)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
        assert max(method[0][1] for method in runs.values()) <= min(method[1][0] for method in runs.values())


@pytest.mark.parametrize("spoiled", ["ours", "released"])
def test_a_transfer_with_one_wrong_number_is_never_timed(spoiled: str) -> None:
    with pytest.raises(RankFailure, match=r"WrongValues: tp2-dp2, 16384 bytes, .*rank 0: the gradient is not what"):
        launch(measure, 4, spoiled)


def host_times(rank: int, world_size: int) -> dict[int, dict[str, dict[str, list[float]]]]:
    sys.path.insert(0, str(BENCHMARKS))
    import bench_host

    dist.destroy_process_group()  # the benchmark makes one of its own
    (case,) = bench_host.parse_arguments(["--quick", "--layouts", "tp2dp2-tp4"]).cases
    assert bench_host.leaders(case) == [1, 3, 4]
    return {role: bench_host.rank_times(case, role, 2, 3) for role in (0, 1, 4, 5)}


def test_host_time_is_measured_for_leaders_and_members_of_both_sides() -> None:
    (by_rank,) = launch(host_times, 1)
    for clocks in by_rank.values():
        assert set(clocks) == {"", "-caller", "-threads"}
        for times in clocks.values():
            assert set(times) == {"released", "replicated-static", "sharded-static"}
            assert all(len(values) == 2 and min(values) > 0 for values in times.values())
