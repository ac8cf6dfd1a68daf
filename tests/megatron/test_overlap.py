"""Receives posted ahead of the schedule: which are posted when, on stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import communicator_fakes
import pipeline_model as pm
import pytest
import torch
from pipeline_cases import CASES, SIMPLE
from pipeline_model import Case, grid

from mimo_ext.megatron.overlap import Receives, overlapped, overlapping


class Link:
    """Counts what is posted; the n-th receive brings n."""

    def __init__(self, posts_ahead: bool = True) -> None:
        self.count = 0
        self.asked = 0  # posted when they were asked for
        self.arrived = 0
        self.receives = Receives(self, self._post, "rank 0: activation", posts_ahead)

    def _post(self, *, waits_soon: bool) -> Any:
        self.count += 1
        self.asked += waits_soon
        return _Posted(self, self.count)

    def take(self) -> int:
        return int(self.receives.take().wait())


class _Posted:
    def __init__(self, link: Link, number: int) -> None:
        self._link, self._number = link, number

    def wait(self) -> int:
        return self._number

    def done(self) -> bool:
        return self._number <= self._link.arrived


def test_one_more_than_asked_for_is_posted_and_none_beyond_the_last() -> None:
    link = Link()
    with overlapping([link.receives], [], 3, forward_only=False, ahead=1):
        assert link.count == 0
        assert [(link.take(), link.count, link.receives.posted) for _ in range(3)] == [(1, 2, 1), (2, 3, 1), (3, 3, 0)]
    assert link.asked == 1
    assert (link.take(), link.count) == (4, 4)  # outside: when it is asked for
    assert link.asked == 2
    with overlapping([link.receives], [], 5, forward_only=True, ahead=3):
        assert [(link.take(), link.count) for _ in range(5)] == [(5, 8), (6, 9), (7, 9), (8, 9), (9, 9)]


def test_a_gradient_is_posted_once_its_activation_has_been_sent() -> None:
    link = Link()
    receives = link.receives
    receives.expect()  # outside nothing is posted ahead
    assert link.count == 0
    with overlapping([], [receives], 3, forward_only=False, ahead=1):
        assert link.count == 0
        receives.expect()
        assert link.count == 1
        receives.expect()  # warm-up: two are due, one is posted
        assert link.count == 1
        assert (link.take(), link.count) == (1, 2)
        receives.expect()
        assert (link.take(), link.count) == (2, 3)
        assert (link.take(), link.count) == (3, 3)
    with overlapping([], [receives], 2, forward_only=True, ahead=1):
        receives.expect()
        assert link.count == 3


def test_a_link_that_cannot_post_ahead_posts_when_it_is_asked() -> None:
    link = Link(posts_ahead=False)
    with overlapping([link.receives], [], 3, forward_only=False, ahead=2):
        assert [(link.take(), link.count) for _ in range(3)] == [(1, 1), (2, 2), (3, 3)]


def test_what_has_arrived_is_counted_in_order() -> None:
    link = Link()
    with overlapping([link.receives], [], 4, forward_only=False, ahead=3):
        link.take()
        assert (link.receives.posted, link.receives.arrived) == (3, 0)
        link.arrived = 3
        assert link.receives.arrived == 2
        for _ in range(3):
            link.take()


def test_a_schedule_of_fewer_microbatches_is_an_error_at_its_end() -> None:
    link, other = Link(), Link()
    message = r"schedule of 3 microbatches, got .* still posted: rank 0: activation \(1\)"
    with (
        pytest.raises(RuntimeError, match=message),
        overlapping([link.receives, other.receives], [], 3, forward_only=False, ahead=1),
    ):
        assert [taken.take() for taken in (link, other, other, other)] == [1, 1, 2, 3]


def fail_after_one(link: Link) -> None:
    assert link.take() == 1
    raise ArithmeticError("in the middle")


def test_after_an_error_the_posted_receives_come_first_and_in_order() -> None:
    link = Link()
    with (
        pytest.raises(ArithmeticError, match="in the middle"),
        overlapping([link.receives], [], 5, forward_only=False, ahead=2),
    ):
        fail_after_one(link)
    assert link.receives.posted == 2
    assert [(link.take(), link.count) for _ in range(3)] == [(2, 3), (3, 3), (4, 4)]
    with overlapping([link.receives], [], 2, forward_only=False, ahead=1):
        assert [(link.take(), link.count) for _ in range(2)] == [(5, 6), (6, 6)]


def test_a_receive_of_a_failed_schedule_is_not_handed_out_under_another_grad_mode() -> None:
    link = Link()
    with (
        pytest.raises(ArithmeticError, match="in the middle"),
        overlapping([link.receives], [], 5, forward_only=False, ahead=1),
    ):
        fail_after_one(link)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"rank 0: activation: expected grad mode on, .* got off"):
        link.take()
    assert link.take() == 2


@pytest.mark.parametrize(
    ("num_microbatches", "ahead", "message"),
    [
        (-1, 1, "num_microbatches: expected an integer of 0 or more, got -1"),
        (2.0, 1, r"num_microbatches: expected an integer of 0 or more, got 2\.0"),
        (True, 1, "num_microbatches: .* got True"),
        (2, 0, "ahead: expected an integer of 1 or more, got 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(num_microbatches: Any, ahead: Any, message: str) -> None:
    link = Link()
    with pytest.raises(ValueError, match=message), overlapping([link.receives], [], num_microbatches, False, ahead):
        pass


def test_overlap_within_overlap_is_an_error() -> None:
    link = Link()
    with (
        pytest.raises(RuntimeError, match=r"overlap\(\) within overlap\(\)"),
        overlapping([link.receives], [], 2, forward_only=False, ahead=1),
        overlapping([link.receives], [], 2, forward_only=False, ahead=1),
    ):
        pass
    with overlapping([link.receives], [], 1, forward_only=False, ahead=1):  # the failed one has left nothing behind
        assert (link.take(), link.count) == (1, 1)


class Communicator:
    """Records how `overlap` is called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def overlap(self, num_microbatches: int, *, forward_only: bool, ahead: int, extra_warmup: int) -> Any:
        self.calls.append((num_microbatches, forward_only, ahead, extra_warmup))
        return overlapping([], [], num_microbatches, forward_only, ahead)


def test_overlapped_reads_the_call_and_returns_the_schedules_result() -> None:
    calls = []

    def schedule(*, num_microbatches: int, forward_only: bool = False, p2p_communicator: Any = None) -> list[int]:
        """The schedule's own words."""
        calls.append((num_microbatches, forward_only, p2p_communicator))
        return [num_microbatches]

    communicator = Communicator()
    ours = overlapped(schedule, ahead=2, extra_warmup=3)
    assert ours.__doc__ == "The schedule's own words."
    assert ours(num_microbatches=3, p2p_communicator=communicator) == [3]
    assert ours(num_microbatches=4, forward_only=True, p2p_communicator=communicator) == [4]
    assert communicator.calls == [(3, False, 2, 3), (4, True, 2, 3)]
    # Without a communicator of ours it is the schedule itself.
    assert ours(num_microbatches=5) == [5]
    other = object()
    assert ours(num_microbatches=6, p2p_communicator=other) == [6]
    assert calls == [(3, False, communicator), (4, True, communicator), (5, False, None), (6, False, other)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_1f1b_with_receives_ahead_gives_the_gradients_of_one_process(
    monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    world = communicator_fakes.install(monkeypatch, case.world_size)

    def body(rank: int) -> None:
        communicator = communicator_fakes.make(case)
        for extra, forward_only in ((0, True), (0, False), (1, True), (1, False), (2, False)):
            options = {"forward_only": forward_only, "extra_warmup": extra}
            with communicator.overlap(case.num_microbatches, **options):
                result = pm.train_rank(communicator, case, rank, forward_only)
            pm.check_rank(case, rank, result, forward_only)
            assert not any(link.posted for links in communicator._links for link in links)

    world.run(body)


def _log_posts(monkeypatch: pytest.MonkeyPatch, world: Any) -> list[str]:
    """Posts and sends of all ranks, in order."""
    from mimo_ext.megatron import bridge_communicator, communicator

    log: list[str] = []
    made = communicator.Bridge

    def logged(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            log.append(f"{world.rank}: {name}")
            return method(self, *args, **kwargs)

        return call

    names = ("send_forward", "irecv_forward", "send_backward", "irecv_backward")
    kind = type("Logged", (made,), {name: logged(name, getattr(made, name)) for name in names})
    for module in (communicator, bridge_communicator):
        monkeypatch.setattr(module, "Bridge", kind)
    return log


def test_what_each_rank_posts_under_1f1b(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(
        "two ranks",
        {"images": grid(0, dp=1), "language": grid(1, dp=1)},
        {"images": ["language"], "language": []},
        {"images": [[2], [1], [3]]},
    )
    world = communicator_fakes.install(monkeypatch, 2)
    log = _log_posts(monkeypatch, world)

    def body(rank: int) -> None:
        communicator = communicator_fakes.make(case)
        with communicator.overlap(3):
            pm.train_rank(communicator, case, rank)

    world.run(body)
    sends, receives, grads = "0: send_forward", "1: irecv_forward", "1: send_backward"
    assert [line for line in log if line.startswith("0")] == [
        sends,  # warm-up
        "0: irecv_backward",  # ahead: before the second microbatch is computed
        sends,
        "0: irecv_backward",  # the first has been asked for
        sends,
        "0: irecv_backward",
    ]
    # Asked for the first, the second is ahead; then each further one before the gradient of the last but one.
    assert [line for line in log if line.startswith("1")] == [receives, receives, grads, receives, grads, grads]


def test_overlap_of_a_closed_communicator_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    world = communicator_fakes.install(monkeypatch, SIMPLE.world_size)

    def body(rank: int) -> None:
        communicator = communicator_fakes.make(SIMPLE)
        communicator.close()
        with pytest.raises(RuntimeError, match=f"rank {rank}: overlap on a closed"), communicator.overlap(1):
            pass

    world.run(body)


def test_extra_warmup_lengthens_the_warmup_of_every_stage_but_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[2]  # images of three stages and audio of one, both feeding a language model of two
    world = communicator_fakes.install(monkeypatch, case.world_size)

    def warmups(communicator: Any) -> int:
        return int(communicator.total_stages - communicator.current_stage - 1)  # as the schedule counts

    def under_way(communicator: Any) -> set[int]:
        return {bridge.max_in_flight for bridge in communicator._own_bridges()}

    def body(rank: int) -> list[int]:
        communicator = communicator_fakes.make(case)
        found = [warmups(communicator)]
        for extra in (0, 1, 2):
            assert under_way(communicator) == {6}
            with communicator.overlap(1, extra_warmup=extra):
                found.append(warmups(communicator))
                assert under_way(communicator) == {4 * (1 + extra) + 2}
        with pytest.raises(ArithmeticError), communicator.overlap(1, extra_warmup=1):
            raise ArithmeticError
        assert (communicator.total_stages, communicator.current_stage) == (5, [0, 1, 2, 0, 3, 4][rank])
        with (
            pytest.raises(ValueError, match=r"extra_warmup: .* 0 or more, got -1"),
            communicator.overlap(1, extra_warmup=-1),
        ):
            pass
        return found

    found = world.run(body)
    assert found == [[w, w, 2 * w, 3 * w] for w in (4, 3, 2, 4, 1, 0)]
