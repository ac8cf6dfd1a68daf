"""Plans whose destination takes, on each rank, the rows of its part of the sequence only."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_reference import execute, lane_range, members

from mimo_ext import Layout, Plan, RowShards
from mimo_ext._extension import _C
from mimo_ext.layout import PATHS

PROFILE = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@dataclass(frozen=True)
class Dealt:
    """Two layouts, and the shard of every row of a global microbatch: `shards[sample][row]`."""

    src: Layout
    dst: Layout
    num_shards: int
    shards: tuple[tuple[int, ...], ...]
    hidden: int
    max_chunks: int
    path: str = "auto"

    @property
    def samples(self) -> int:
        return len(self.shards)

    @property
    def rows(self) -> list[int]:
        return [len(sample) for sample in self.shards]

    def row_shards(self, first: int = 0, last: int | None = None) -> RowShards:
        """What a process knows that has samples [first, last)."""
        known = self.shards[first:last]
        return RowShards([[(s, 1) for s in sample] for sample in known], self.num_shards, self.samples, first)

    def microbatch(self, row_shards: RowShards, rows: list[int] | None = None) -> _C.Microbatch:
        return _C.Microbatch(
            ndim=2,
            batch_dim=0,
            seq_dim=0,
            samples=self.samples,
            shape=[sum(self.rows), self.hidden],
            rows=rows or [],
            row_shards=row_shards,
        )

    def plan(self, backward: bool = False, row_shards: RowShards | None = None) -> Plan:
        shards = self.row_shards() if row_shards is None else row_shards
        boundaries = self.src.boundary(-1), self.dst.boundary(0)
        return Plan(*boundaries, self.microbatch(shards), backward, self.max_chunks, 2, self.path)

    def shard_of(self, member: int) -> int:
        return member if self.num_shards == self.dst.tp * self.dst.cp else member // self.dst.tp

    def of_source(self, whole: np.ndarray, lane: int) -> np.ndarray:
        first, last = lane_range(self.samples, lane, self.src.dp)
        return whole[sum(self.rows[:first]) : sum(self.rows[:last])]

    def of_destination(self, whole: np.ndarray, lane: int, member: int) -> np.ndarray:
        first, last = lane_range(self.samples, lane, self.dst.dp)
        mine = [
            sum(self.rows[:sample]) + row
            for sample in range(first, last)
            for row, shard in enumerate(self.shards[sample])
            if shard == self.shard_of(member)
        ]
        return whole[mine]


@st.composite
def dealt(draw):
    """The shards lie as runs (as positions of a sequence give them) or anyhow; ranks of the two sides may overlap."""
    sizes = {dim: draw(st.integers(1, high)) for dim, high in (("tp", 3), ("cp", 3), ("dp", 4))}
    src = Layout(range(sizes["tp"] * sizes["cp"] * sizes["dp"]), **sizes, name="images")
    sizes = {dim: draw(st.integers(1, high)) for dim, high in (("tp", 4), ("cp", 3), ("dp", 4), ("pp", 2))}
    first = draw(st.sampled_from([0, src.size // 2, src.size]))
    size = sizes["tp"] * sizes["cp"] * sizes["dp"] * sizes["pp"]
    dst = Layout(range(first, first + size), **sizes, name="language")
    num_shards = draw(st.sampled_from([dst.tp * dst.cp, dst.cp]))
    shard = st.integers(0, num_shards - 1)
    shards = []
    for _ in range(draw(st.integers(1, 9))):
        sample = [draw(shard) for _ in range(draw(st.integers(0, 9)))]
        shards.append(tuple(sample if draw(st.booleans()) else sorted(sample)))
    return Dealt(
        src,
        dst,
        num_shards,
        tuple(shards),
        draw(st.integers(1, 4)),
        draw(st.sampled_from([1, 2, 8])),
        draw(st.sampled_from(PATHS)),
    )


def values(shape, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, shape)


@PROFILE
@given(dealt())
def test_each_rank_receives_the_rows_of_its_shard_in_order_and_each_once(case):
    plan = case.plan()
    whole = values((sum(case.rows), case.hidden), 1)
    result, writes = execute(plan, {rank: case.of_source(whole, lane) for rank, lane, _ in members(plan.source)})
    for rank, lane, member in members(plan.destination):
        np.testing.assert_array_equal(result[rank], case.of_destination(whole, lane, member))
        assert (writes[rank] == 1).all()


@PROFILE
@given(dealt())
def test_gradients_come_back_from_the_only_shard_that_has_them(case):
    plan = case.plan(backward=True)
    whole = values((sum(case.rows), case.hidden), 2)
    held = {rank: case.of_destination(whole, lane, m) for rank, lane, m in members(plan.destination)}
    result, writes = execute(plan, held)
    for rank, lane, _ in members(plan.source):
        np.testing.assert_array_equal(result[rank], case.of_source(whole, lane))
        assert (writes[rank] == 1).all()
    for rank in held:
        assert all(message["contribution"] == 0 for message in plan.for_rank(rank, True, False)["sends"])


def outline(messages: list[dict], end: str) -> list[tuple]:
    """What the rank at that end of the messages must know of them."""
    box = "send_box" if end == "sender" else "recv_box"
    return [(m["sender"], m["receiver"], m["contribution"], m["chunk"], m[box]) for m in messages]


@PROFILE
@given(dealt())
def test_a_rank_needs_the_row_shards_of_its_own_samples_only(case):
    for backward in (False, True):
        full = case.plan(backward)
        sides = (full.source, case.src.dp), (full.destination, case.dst.dp)
        for at_destination, (boundary, lanes) in enumerate(sides):
            sends = bool(at_destination) == backward
            end = "sender" if sends else "receiver"
            for rank, lane, member in members(boundary):
                own = case.plan(backward, case.row_shards(*lane_range(case.samples, lane, lanes)))
                got, expected = (plan.for_rank(rank, sends, not sends) for plan in (own, full))
                for kind in ("sends",) if sends else ("receives", "lane_sends", "lane_receives"):
                    assert outline(got[kind], end) == outline(expected[kind], end)
                shapes = [getattr(plan, f"{end}_shape")(lane, member) for plan in (own, full)]
                assert shapes[0] == shapes[1]


@PROFILE
@given(dealt())
def test_both_ends_list_the_same_messages_in_the_same_order(case):
    for backward in (False, True):
        plan = case.plan(backward)
        sent, received = defaultdict(list), defaultdict(list)
        for rank in {rank for side in (plan.source, plan.destination) for rank, _, _ in members(side)}:
            mine = plan.for_rank(rank)
            for kind in ("sends", "lane_sends"):
                for message in mine[kind]:
                    sent[kind, rank, message["receiver"]].append(message)
            for kind in ("receives", "lane_receives"):
                for message in mine[kind]:
                    received[kind.replace("receives", "sends"), message["sender"], rank].append(message)
        assert sent == received


@PROFILE
@given(dealt())
def test_no_element_travels_twice_to_a_shard_and_replicas_share_the_work(case):
    case = replace(case, path="pipelined")
    if set(case.src.ranks) & set(case.dst.ranks):
        return  # who has a part already takes it from itself
    plan = case.plan()
    lanes = {rank: lane for rank, lane, _ in members(plan.destination)}
    arriving: dict[int, int] = defaultdict(int)  # elements by receiver, without copies inside the lane
    for rank in {rank for rank, _, _ in members(plan.source)}:
        for message in plan.for_rank(rank, True, False)["sends"]:
            arriving[message["receiver"]] += int(np.prod([size for _, size in message["send_box"]]))
    assert sum(arriving.values()) == sum(case.rows) * case.hidden
    copies = sum(len(plan.for_rank(rank)["lane_sends"]) for rank in lanes)
    if case.num_shards == case.dst.tp * case.dst.cp:
        assert copies == 0
    # Within one overlap the replicas' parts differ by one row (or, of few rows, by one column).
    if case.src.dp == 1:
        for lane, ranks in enumerate(plan.destination.lanes):
            for shard in range(case.num_shards):
                parts = [arriving[rank] for m, rank in enumerate(ranks) if case.shard_of(m) == shard]
                rows = len(case.of_destination(np.zeros((sum(case.rows), 1)), lane, case_member(case, shard)))
                assert max(parts) - min(parts) <= max(case.hidden, rows)


def case_member(case: Dealt, shard: int) -> int:
    """A member that has the shard."""
    return next(m for m in range(case.dst.tp * case.dst.cp) if case.shard_of(m) == shard)


def test_a_shards_neighbouring_rows_are_one_message_across_samples():
    """Whole samples of one shard, and seams between samples, do not cut messages."""
    case = Dealt(Layout([0]), Layout([1, 2], cp=2), 2, ((0, 0, 0), (), (0, 0, 1), (1,)), hidden=3, max_chunks=8)
    sends = case.plan().for_rank(0)["sends"]
    assert [(m["receiver"], m["send_box"], m["recv_box"]) for m in sends] == [
        (1, ((0, 5), (0, 3)), ((0, 5), (0, 3))),
        (2, ((5, 2), (0, 3)), ((0, 2), (0, 3))),
    ]


def test_replicas_of_a_shard_forward_their_parts_in_chunks():
    rows = tuple(row // 16 % 2 for row in range(64))  # 0 * 16, 1 * 16, 0 * 16, 1 * 16
    case = Dealt(Layout([0]), Layout([1, 2, 3, 4], tp=2, cp=2), 2, (rows,), 4, 4, "pipelined")
    plan = case.plan()
    copies = {rank: plan.for_rank(rank)["lane_sends"] for rank in (1, 2, 3, 4)}
    assert {m["receiver"] for m in copies[1]} == {2}
    assert {m["receiver"] for m in copies[4]} == {3}
    assert sorted({m["chunk"] for m in copies[1]}) == [0, 1, 2, 3]
    assert [m["send_box"][0] for m in copies[1]] == [(0, 4), (4, 4), (8, 4), (12, 4)]
    assert [m["send_box"][0] for m in copies[2]] == [(16, 4), (20, 4), (24, 4), (28, 4)]


# Which rows a rank takes, from the positions that they fill


def positions_of_shard(length: int, tp: int, cp: int, sequence_parallel: bool, placement: str) -> list[list[int]]:
    """By shard: the positions of the sequence that its ranks have, chunk by chunk."""
    shards = []
    for c in range(cp):
        if placement == "zigzag" and cp > 1:
            chunk = length // (2 * cp)
            mine = [*range(c * chunk, (c + 1) * chunk), *range(length - (c + 1) * chunk, length - c * chunk)]
        else:
            mine = list(range(c * length // cp, (c + 1) * length // cp))
        parts = tp if sequence_parallel else 1
        part = len(mine) // parts
        shards += [mine[i * part : (i + 1) * part] for i in range(parts)]
    return shards


@PROFILE
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
    st.sampled_from(["zigzag", "contiguous"]),
    st.integers(0, 4),
    st.integers(0, 3),
    st.integers(0, 10**6),
)
def test_row_shards_of_a_mask_are_those_of_its_positions(tp, cp, sequence_parallel, placement, b, before, seed):
    length = 24
    mask = torch.rand(b, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    shards = RowShards.from_mask(
        mask,
        tp=tp,
        cp=cp,
        sequence_parallel=sequence_parallel,
        cp_placement=placement,
        first_sample=before,
        num_samples=before + b + 1,
    )
    owner = {}
    for shard, positions in enumerate(positions_of_shard(length, tp, cp, sequence_parallel, placement)):
        owner |= dict.fromkeys(positions, shard)
    rows = [[owner[p] for p in mask[sample].nonzero().flatten().tolist()] for sample in range(b)]
    count = cp * (tp if sequence_parallel else 1)
    assert shards == RowShards([[(s, 1) for s in sample] for sample in rows], count, before + b + 1, before)
    assert shards.row_counts() == mask.sum(dim=1).tolist()
    assert shards.row_counts(0, before) == [-1] * before
    assert [shards.rows_of_shard(s) for s in range(count)] == [sum(r.count(s) for r in rows) for s in range(count)]
    assert shards.samples == (before, before + b)


def test_a_mask_that_is_not_contiguous_counts_as_it_is_indexed():
    mask = torch.zeros(8, 2, dtype=torch.bool)
    mask[5, 0] = mask[6, 1] = mask[1, 1] = True
    assert RowShards.from_mask(mask.T, cp=2) == RowShards([[(1, 1)], [(0, 1), (0, 1)]], 2)


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (torch.zeros(2, 10, dtype=torch.bool), {"cp": 2}, "into 4 chunks and, on each of 2 cp ranks, .* got 10"),
        (torch.zeros(2, 6, dtype=torch.bool), {"tp": 4, "sequence_parallel": True}, "into 4 parts, got 6"),
        (torch.zeros(2, 8), {}, r"expected a bool mask \[b, s\] on the CPU, got 2 axes of Float on cpu"),
        (torch.zeros(8, dtype=torch.bool), {}, "got 1 axes of Bool"),
        (torch.zeros(2, 8, dtype=torch.bool), {"cp": 2, "cp_placement": "replicated"}, "expected 'zigzag'"),
        (torch.zeros(2, 8, dtype=torch.bool), {"cp": 2, "cp_placement": "striped"}, "got 'striped'"),
        (torch.zeros(2, 8, dtype=torch.bool), {"num_samples": 1}, r"expected samples of \[0, 1\), got \[0, 2\)"),
        (torch.zeros(2, 8, dtype=torch.bool), {"tp": 0}, "expected positive tp and cp, got 0 and 1"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, options, message):
    with pytest.raises(ValueError, match=message):
        RowShards.from_mask(mask, **options)


# Values


def test_equal_row_shards_have_equal_hashes_whatever_else_is_known():
    whole = RowShards([[(0, 2), (1, 1)], [(1, 4)], [], [(0, 1)]], 2)
    part = RowShards([[(1, 3), (1, 1), (0, 0)], []], 2, num_samples=4, first_sample=1)
    assert whole.hash(1, 3) == part.hash() == part.hash(1, 3)
    assert whole != part
    assert whole == RowShards([[(0, 1), (0, 1), (1, 1)], [(1, 4)], [], [(0, 1)]], num_shards=2)
    assert whole.segments(0) == [(0, 2), (1, 1)]
    others = [
        RowShards([[(0, 2), (1, 1)], [(1, 3), (0, 1)], [], [(0, 1)]], 2),
        RowShards([[(0, 2), (1, 1)], [(1, 3)], [(1, 1)], [(0, 1)]], 2),
        RowShards([[(0, 2), (1, 1)], [(1, 4)], [], [(0, 1)]], 3),
    ]
    assert len({shards.hash(1, 3) for shards in [whole, *others]}) == 4


def test_row_shards_that_are_not_known_are_named():
    shards = RowShards([[(0, 1)]], 2, num_samples=4, first_sample=2)
    assert shards.row_counts(0, 4) == [-1, -1, 1, -1]
    with pytest.raises(ValueError, match=r"samples \[1, 3\) are needed, those of \[2, 3\) are known here"):
        shards.hash(1, 3)
    case = Dealt(Layout([0], name="images"), Layout([1, 2], tp=2), 2, ((), (), (0,), ()), hidden=1, max_chunks=1)
    plan = Plan(case.src.boundary(), case.dst.boundary(), case.microbatch(shards, rows=[0, 0, 1, 0]))
    with pytest.raises(ValueError, match=r"samples \[0, 4\) are needed, those of \[2, 3\) are known here"):
        plan.for_rank(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[(2, 1)]], 2), "sample 0: expected shards below 2 and rows of 0 or more, got 1 rows of shard 2"),
        (([[(0, 1)], [(0, -1)]], 2), "sample 1: .* got -1 rows of shard 0"),
        (([[(0, 1)]], 0), "expected a positive number of shards, got 0"),
        (([[(0, 1)]], 1, 3, 3), r"expected samples of \[0, 3\), got \[3, 4\)"),
    ],
)
def test_segments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RowShards(*arguments)


def test_row_shards_that_do_not_fit_the_microbatch_are_refused():
    case = Dealt(Layout([0]), Layout([1, 2, 3, 4], tp=2, cp=2, name="language"), 4, ((0,), (1, 1)), 1, 1)
    with pytest.raises(ValueError, match="sample 1 has 3 rows, and row shards of 2"):
        Plan(case.src.boundary(), case.dst.boundary(), case.microbatch(case.row_shards(), rows=[1, 3]))
    with pytest.raises(ValueError, match=r"'language' \(tp=2, cp=2\): .* cp ranks or .* tp \* cp ranks, got 3 shards"):
        case.plan(row_shards=RowShards([[(0, 1)], [(1, 2)]], 3))
    with pytest.raises(ValueError, match="expected row shards of 2 samples, got 3"):
        case.plan(row_shards=RowShards([[(0, 1)], [(1, 2)]], 4, num_samples=3))
    microbatch = _C.Microbatch(
        ndim=3, batch_dim=0, seq_dim=1, samples=2, shape=[2, 4, 4], row_shards=RowShards([[], []], 4)
    )
    with pytest.raises(ValueError, match="row shards are for 2-D tensors, got 3 axes"):
        Plan(case.src.boundary(), case.dst.boundary(), microbatch)


def test_plans_say_that_rows_are_dealt_and_differ_by_how():
    case = Dealt(Layout([0]), Layout([1, 2], tp=2), 2, ((0, 1),), hidden=1, max_chunks=1)
    plan, other = case.plan(), case.plan(row_shards=RowShards([[(1, 2)]], 2))
    assert "ragged rows dealt to 2 shards of the destination" in str(plan)
    assert plan == case.plan()
    assert plan != other
    assert len({plan.digest, other.digest, plan.reversed().digest}) == 3
    assert plan.reversed().reversed() == plan
    assert plan.microbatch.rows == [2]
    assert plan.microbatch.row_shards == case.row_shards()


# Bytes


def received(plan: Plan) -> dict[int, int]:
    """Elements that each rank takes from the network, by rank: from senders and from replicas in its lane."""
    totals: dict[int, int] = defaultdict(int)
    for rank in {rank for side in (plan.source, plan.destination) for rank, _, _ in members(side)}:
        mine = plan.for_rank(rank)
        for message in [*mine["receives"], *mine["lane_receives"]]:
            totals[rank] += int(np.prod([size for _, size in message["recv_box"]]))
    return totals


@pytest.mark.parametrize(
    ("tp", "cp", "sequence_parallel"), [(2, 1, True), (8, 1, True), (1, 4, False), (4, 2, True), (4, 2, False)]
)
def test_a_rank_receives_its_share_of_the_bytes_that_replicated_delivery_takes(tp, cp, sequence_parallel):
    """Images spread evenly over the sequence: 1 / shards of the rows, on the way there and on the way back."""
    samples, length, hidden = 4, 64, 16
    mask = (torch.arange(length) % 4 != 0).expand(samples, length).contiguous()
    shards = RowShards.from_mask(mask, tp=tp, cp=cp, sequence_parallel=sequence_parallel)
    src, dst = Layout(range(4), dp=4), Layout(range(4, 4 + tp * cp), tp=tp, cp=cp)

    def plans(row_shards: RowShards | None) -> tuple[Plan, Plan]:
        shape, rows = [mask.sum().item(), hidden], shards.row_counts()
        options = {"ndim": 2, "batch_dim": 0, "seq_dim": 0, "samples": samples, "shape": shape, "rows": rows}
        forward = Plan(src.boundary(), dst.boundary(), _C.Microbatch(**options, row_shards=row_shards))
        return forward, forward.reversed()

    whole = mask.sum().item() * hidden
    replicated, dealt = plans(None), plans(shards)
    assert {received(replicated[0])[rank] for rank in dst.ranks} == {whole}
    assert {received(dealt[0])[rank] for rank in dst.ranks} == {whole // shards.num_shards}
    # On the way back the copies of replicated delivery are partial gradients under context parallelism: all travel.
    assert sum(received(replicated[1]).values()) == whole * cp
    assert sum(received(dealt[1]).values()) == whole
