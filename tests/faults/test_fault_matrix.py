"""A slice of the fault matrix, and that its judge notices what it is there for. All of it: `make check-faults`."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from fault_ranks import FAULTS, OPERATIONS, ROLES, Case, Report
from matrix import LIMITS, Result, all_cases, judge_connected, judge_other, judge_victim, line_of, run

# Each fault, operation, role and kind of shapes, and each fault in each role.
SLICE = [
    Case("killed", "send_forward", "destination rank", False),
    Case("killed", "recv_backward", "lane peer", True),
    Case("killed", "send_backward_recv_forward", "source rank", True),
    Case("killed", "send_backward", "bystander", False),
    Case("frozen", "recv_forward", "source rank", False),
    Case("frozen", "send_forward_recv_backward", "destination rank", True),
    Case("frozen", "send_backward", "lane peer", True),
    Case("frozen", "recv_backward", "bystander", False),
    Case("raises", "send_forward_recv_backward", "source rank", False),
    Case("raises", "recv_backward", "destination rank", False),
    Case("raises", "send_backward_recv_forward", "lane peer", False),
    Case("raises", "recv_forward", "bystander", True),
]


def test_every_fault_in_every_role_ends_in_named_errors_and_nothing_hangs() -> None:
    results = list(run(SLICE, jobs=4))
    print("\n".join(map(line_of, results)))
    failures = [f"{result.case}: {failure}" for result in results for failure in result.failures]
    assert not failures, "\n".join(failures)


def test_the_matrix_and_its_slice_are_complete() -> None:
    cases = list(all_cases())
    assert len(cases) == len(set(cases)) == 3 * 6 * 4 * 2
    assert {(case.fault, case.role) for case in SLICE} == {(fault, role) for fault in FAULTS for role in ROLES}
    assert {case.operation for case in SLICE} == set(OPERATIONS)
    assert {(case.fault, case.static) for case in SLICE} == {(fault, static) for fault in FAULTS for static in (0, 1)}


CASE = Case("killed", "recv_forward", "source rank", False)
GOOD = Report(
    error="BridgeError",
    text="bridge 'images -> language', rank 2: recv_forward of microbatch 1: header from rank 0: the connection broke",
    operation="recv_forward of microbatch 1",
    raised_at=101.0,
    closed_at=101.1,
)


def judged(report: Report | None, code: int = 1, rank: int = 2, case: Case = CASE) -> list[str]:
    ranks: Any = SimpleNamespace(reports={rank: report}, exit_code=lambda _: code, log=lambda _: "")
    result = Result(case)
    if rank == case.victim:
        judge_victim(case, ranks, result)
    elif rank in case.connected:
        judge_connected(case, rank, ranks, 100.0, result)
    else:
        judge_other(rank, ranks, result)
    return result.failures


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"error": "", "text": ""}, "expected a BridgeError, got none"),
        ({"error": "ValueError"}, "expected a BridgeError, got ValueError"),
        ({"raised_at": 100.0 + LIMITS["killed"] + 0.1}, "raised after 2.10 s, expected at most 2"),
        ({"raised_at": 103.0, "back_at": 100.9}, "raised after 2.10 s, expected at most 2"),
        ({"text": GOOD.text.replace("images -> language", "another")}, "does not name the edge"),
        ({"text": GOOD.text.replace("recv_forward", "something")}, "names no operation"),
        ({"text": GOOD.text.replace("of microbatch 1", "")}, "names no microbatch"),
        ({"text": GOOD.text.replace("from rank 0", "")}, "names no peer"),
        ({"text": GOOD.text.replace("from rank 0", "from rank 5")}, "names no peer"),
        ({"text": GOOD.text + " (the bridge is not closed)"}, "was not closed"),
        ({"closed_at": 104.0}, "close() took 3.00 s"),
        ({"threads_left": ["mimo-recv-fwd"]}, "threads that go on: ['mimo-recv-fwd']"),
        ({"descriptors_left": 2}, "2 descriptors stay open"),
        ({"storages_left": 1}, "1 storages are still held"),
    ],
)
def test_the_judge_notices(changes: dict[str, Any], complaint: str) -> None:
    assert judged(GOOD) == []
    failures = judged(replace(GOOD, **changes))
    assert any(complaint in failure for failure in failures), failures


def test_the_judge_notices_exit_codes_and_ranks_that_should_not_have_failed() -> None:
    assert "exit code 0, expected 1" in judged(GOOD, code=0)[0]
    assert "and no report" in judged(None)[0]
    assert judged(Report(), code=0, rank=5) == []
    assert "does not need the victim, and failed" in judged(GOOD, rank=5)[0]
    assert "does not need the victim, and failed" in judged(Report(), code=255, rank=5)[0]
    raises = replace(CASE, fault="raises")
    assert judged(replace(GOOD, error="UserError"), rank=0, case=raises) == []
    assert "the victim, rank 0: expected" in judged(GOOD, rank=0, case=raises)[0]
