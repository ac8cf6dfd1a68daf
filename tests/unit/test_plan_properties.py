"""Properties of every transfer plan: coverage, values, balance, adjointness, reversal, agreement between ranks."""

import math
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_reference import Setting, execute, lane_range, local, members

from mimo_ext import Layout, Plan
from mimo_ext._extension import _C
from mimo_ext.layout import PATHS

PROFILE = settings(
    max_examples=250,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@st.composite
def layouts(draw, first_rank: int, name: str, sharded: bool):
    tp, cp, dp, pp = (draw(st.integers(1, high)) for high in (4, 3, 5, 2))
    order = draw(st.permutations(["tp", "cp", "dp", "pp"]))
    placement = draw(st.sampled_from(["replicated", "contiguous", "zigzag"])) if sharded else "replicated"
    return Layout(
        range(first_rank, first_rank + tp * cp * dp * pp),
        tp=tp,
        cp=cp,
        dp=dp,
        pp=pp,
        order=order,
        cp_placement=placement,
        sequence_parallel=draw(st.booleans()) if sharded else False,
        name=name,
    )


@st.composite
def microbatches(draw, sharded: bool = True):
    """Two layouts and a microbatch; the ranks of the two sides may be the same, overlap, or neither."""
    src = draw(layouts(0, "images", sharded))
    dst = draw(layouts(draw(st.sampled_from([0, src.size // 2, src.size])), "language", sharded))
    ndim = draw(st.sampled_from([2, 3]))
    samples = draw(st.integers(0, 12))
    ragged = draw(st.booleans())
    counts = st.integers(0, 9)
    rows = [draw(counts) for _ in range(samples)] if ragged else [draw(counts)] * samples
    return Setting(
        src=src,
        dst=dst,
        ndim=ndim,
        batch_dim=draw(st.sampled_from([0, 1])) if ndim == 3 else 0,
        samples=samples,
        rows=tuple(rows),
        ragged=ragged and samples > 0,
        seq=draw(st.integers(0, 11)),
        hidden=draw(st.integers(1, 5)),
        max_chunks=draw(st.sampled_from([1, 2, 3, 8])),
        path=draw(st.sampled_from(PATHS)),
    )


def values(shape, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, shape)


def copies_of(boundary: _C.Boundary) -> int:
    """Number of different (partial) gradients that the destination's cp ranks hold."""
    return boundary.cp if boundary.cp_placement == "replicated" else 1


@PROFILE
@given(microbatches())
def test_forward_writes_every_element_once_with_the_right_value(setting):
    plan = setting.plan()
    whole = values(setting.shape(), 1)
    held = {r: local(setting, plan.source, whole, lane, member) for r, lane, member in members(plan.source)}
    result, writes = execute(plan, held)
    for rank, lane, member in members(plan.destination):
        assert (writes[rank] == 1).all()
        np.testing.assert_array_equal(result[rank], local(setting, plan.destination, whole, lane, member))


@PROFILE
@given(microbatches())
def test_backward_sums_cp_copies_and_takes_tp_replicas_once(setting):
    plan = setting.plan(backward=True)
    gradients = [values(setting.shape(), 10 + copy) for copy in range(copies_of(plan.destination))]
    held = {}
    for rank, lane, member in members(plan.destination):
        copy = member // plan.destination.tp if len(gradients) > 1 else 0
        held[rank] = local(setting, plan.destination, gradients[copy], lane, member)
    result, writes = execute(plan, held)
    for rank, lane, member in members(plan.source):
        assert (writes[rank] == 1).all()
        np.testing.assert_array_equal(result[rank], local(setting, plan.source, sum(gradients), lane, member))


def logical(setting: Setting, boundary: _C.Boundary, held: dict[int, np.ndarray], cp_index: int) -> np.ndarray:
    """The global array that the ranks of one cp copy hold together, each element taken from one tp replica."""
    whole = np.zeros(setting.shape(), dtype=np.int64)
    index = np.arange(whole.size).reshape(whole.shape)
    for rank, lane, member in members(boundary):
        of_copy = member // boundary.tp == cp_index or boundary.cp_placement != "replicated"
        if of_copy and held[rank].size:
            whole.reshape(-1)[local(setting, boundary, index, lane, member).reshape(-1)] = held[rank].reshape(-1)
    return whole


@PROFILE
@given(microbatches())
def test_backward_is_the_adjoint_of_forward(setting):
    forward = setting.plan()
    x = values(setting.shape(), 1)
    y = [values(setting.shape(), 10 + copy) for copy in range(copies_of(forward.destination))]
    held = {r: local(setting, forward.source, x, lane, member) for r, lane, member in members(forward.source)}
    ax, _ = execute(forward, held)
    gradient = {}
    for rank, lane, member in members(forward.destination):
        copy = member // forward.destination.tp if len(y) > 1 else 0
        gradient[rank] = local(setting, forward.destination, y[copy], lane, member)
    aty, _ = execute(forward.reversed(), gradient)
    # <Ax, y>: tp replicas count once, each cp copy counts. <x, A'y>: each source rank got the whole sum; count it once.
    left = sum(int((logical(setting, forward.destination, ax, copy) * y[copy]).sum()) for copy in range(len(y)))
    right = int((x * logical(setting, forward.source, aty, 0)).sum())
    assert left == right


@PROFILE
@given(microbatches())
def test_both_ends_agree_on_every_message(setting):
    for backward in (False, True):
        plan = setting.plan(backward)
        ranks = {rank for side in (plan.source, plan.destination) for rank, _, _ in members(side)}
        sent, received = defaultdict(list), defaultdict(list)
        for rank in ranks:
            mine = plan.for_rank(rank)
            for kind in ("sends", "lane_sends"):
                for message in mine[kind]:
                    assert message["sender"] == rank
                    sent[kind, rank, message["receiver"]].append(message)
            for kind in ("receives", "lane_receives"):
                for message in mine[kind]:
                    assert message["receiver"] == rank
                    received[kind.replace("receives", "sends"), message["sender"], rank].append(message)
        assert sent == received  # the same messages, with the same boxes, in the same order
        assert all(a in ranks and b in ranks for _, a, b in sent)


def carried(messages: list[dict], end: str) -> dict[int, list[int]]:
    """By rank at that end of the messages: the sizes of the one box that they cover together."""
    boxes = defaultdict(list)
    for message in messages:
        boxes[message[end]].append(message["send_box" if end == "sender" else "recv_box"])
    parts = {}
    for rank, pieces in boxes.items():
        parts[rank] = [max(sum(span) for span in axis) - min(axis)[0] for axis in zip(*pieces, strict=True)]
        assert math.prod(parts[rank]) == sum(math.prod(size for _, size in box) for box in pieces)
    return parts


def assert_equal_parts(parts: dict[int, list[int]], ranks: list[int]) -> None:
    """Boxes that differ by at most one unit along one axis, which may leave nothing for some ranks."""
    uneven = [axis for axis in zip(*parts.values(), strict=True) if len(set(axis)) > 1]
    assert len(uneven) <= 1, parts
    assert all(max(axis) - min(axis) == 1 for axis in uneven), parts
    if len(parts) < len(ranks):
        assert not uneven, parts
        assert 1 in next(iter(parts.values())), parts


@PROFILE
@given(microbatches(sharded=False))
def test_replicas_carry_equal_parts(setting):
    """Inside one overlap of lanes, what ranks send and receive differs by at most one unit along one axis."""
    if set(setting.src.ranks) & set(setting.dst.ranks):
        return  # who has a part already takes it from itself
    setting = replace(setting, path="pipelined")
    for backward in (False, True):
        plan = setting.plan(backward)
        sender, receiver = (plan.destination, plan.source) if backward else (plan.source, plan.destination)
        overlaps = defaultdict(list)
        volumes, taking = defaultdict(list), defaultdict(set)
        for rank, _, _ in members(sender):
            for message in plan.for_rank(rank, True, False)["sends"]:
                overlaps[message["sender_lane"], message["receiver_lane"]].append(message)
        for (sender_lane, receiver_lane), messages in overlaps.items():
            ranks = sender.lanes[sender_lane]
            # Of partial gradients, the tp ranks of each cp copy carry all of it between them.
            groups = [ranks[i : i + sender.tp] for i in range(0, len(ranks), sender.tp)] if backward else [ranks]
            for group in groups:
                assert_equal_parts(carried([m for m in messages if m["sender"] in group], "sender"), group)
            first = [m for m in messages if m["contribution"] == 0]
            # Equal overlaps of several lanes are dealt to different ranks of the receiver's lane.
            takers = sorted({m["receiver"] for m in first})
            assert_equal_parts(carried(first, "receiver"), takers)
            volumes[receiver_lane].append(sum(math.prod(size for _, size in m["recv_box"]) for m in first))
            taking[receiver_lane].update(takers)
        for lane, taken in taking.items():
            ranks = receiver.lanes[lane]
            assert taken == set(ranks) or min(volumes[lane]) < len(ranks)


@PROFILE
@given(microbatches())
def test_reversal_is_an_involution(setting):
    plan = setting.plan()
    back = plan.reversed()
    assert back != plan
    assert back.backward
    assert back.reversed() == plan
    assert hash(back.reversed()) == hash(plan)
    assert back == setting.plan(backward=True)


@PROFILE
@given(microbatches(sharded=False), st.integers(0, 9))
def test_a_source_needs_only_its_own_row_counts(setting, other):
    if setting.ndim != 2 or not setting.ragged:
        return
    full = setting.plan()
    for rank, lane, _ in members(full.source):
        first, last = lane_range(setting.samples, lane, len(full.source.lanes))
        for elsewhere in (other, -1):  # other numbers, and unknown
            rows = [count if first <= i < last else elsewhere for i, count in enumerate(setting.rows)]
            own = setting.plan_of(setting.microbatch(rows))
            got, expected = own.for_rank(rank, True, False)["sends"], full.for_rank(rank, True, False)["sends"]
            assert [(m["receiver"], m["send_box"]) for m in got] == [(m["receiver"], m["send_box"]) for m in expected]


@PROFILE
@given(microbatches(), microbatches())
def test_equal_plans_have_equal_hashes_and_others_do_not(a, b):
    assert a.plan() == a.plan()
    assert a.plan().digest == a.plan().digest
    assert (a.plan() == b.plan()) == (a.plan().digest == b.plan().digest)


def test_the_hash_is_the_same_in_another_process():
    code = (
        "from mimo_ext import Layout, Plan; from mimo_ext._extension import _C;"
        "a, b = Layout([0, 1], dp=2).boundary(), Layout([2, 3], tp=2).boundary();"
        "m = _C.Microbatch(ndim=2, batch_dim=0, seq_dim=0, samples=4, shape=[1, 8], rows=[3, 1, 4, 1]);"
        "print(Plan(a, b, m).digest)"
    )
    runs = {subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True).stdout for _ in range(2)}
    a, b = Layout([0, 1], dp=2).boundary(), Layout([2, 3], tp=2).boundary()
    microbatch = _C.Microbatch(ndim=2, batch_dim=0, seq_dim=0, samples=4, shape=[1, 8], rows=[3, 1, 4, 1])
    assert runs == {f"{Plan(a, b, microbatch).digest}\n"}


def table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.split()[0] in ("send", "local", "copy")]


@PROFILE
@given(microbatches())
def test_the_text_lists_every_message_once(setting):
    for backward in (False, True):
        plan = setting.plan(backward)
        text = str(plan)
        assert text.startswith(
            "Plan backward: language -> images\n" if backward else "Plan forward: images -> language\n"
        )
        assert max(len(line) for line in text.splitlines()) < 300
        ranks = {rank for side in (plan.source, plan.destination) for rank, _, _ in members(side)}
        number = sum(len(mine["sends"]) + len(mine["lane_sends"]) for mine in map(plan.for_rank, ranks))
        assert len(table(plan.to_string(10**6))) == number
        assert len(table(text)) == min(number, 64)
        assert ("not shown" in text) == (number > 64)


def test_the_text_of_a_plan_with_unknown_rows_lists_what_is_known():
    src = Layout([0, 1], dp=2, name="images").boundary()
    dst = Layout([2], name="language").boundary()

    def plan(rows):
        return Plan(src, dst, _C.Microbatch(ndim=2, batch_dim=0, seq_dim=0, samples=2, shape=[1, 4], rows=rows))

    first = str(plan([3, -1]))
    assert len(table(first)) == 1
    assert "[0:3, 0:4] -> [0:3, 0:4]" in first
    assert "row counts of other lanes are not known here" in first
    second = str(plan([-1, 5]))
    assert "[0:5, 0:4] -> [? +5, 0:4]" in second
    assert "not known" not in str(plan([3, 5]))


def test_ragged_rows_that_a_sharded_destination_cannot_know_are_refused():
    src = Layout([0, 1], dp=2, name="images").boundary()
    dst = Layout([2, 3], tp=2, sequence_parallel=True, name="language").boundary()
    plan = Plan(src, dst, _C.Microbatch(ndim=2, batch_dim=0, seq_dim=0, samples=2, shape=[1, 4], rows=[3, -1]))
    with pytest.raises(ValueError, match="module 'language' holds 2-D tensors sharded along their rows"):
        plan.for_rank(0, True, False)
