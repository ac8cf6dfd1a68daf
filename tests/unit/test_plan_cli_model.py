"""The model behind `python -m mimo_ext plan`: times by hand, and traffic that agrees with what every rank must hold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mimo_ext.layout import PATHS
from mimo_ext.planning import Edge, EdgeError, Links, Phase, Transfer, leader_broadcast, parse_layout, planned, time_of
from mimo_ext.planning import traffic as traffic_module
from mimo_ext.planning.links import Load, loads_of

# Round numbers: a byte takes 1 s over the card and 1/8 s inside a host.
SLOW = Links(nic=1.0, host=8.0, latency=100.0, overhead=0.0, ranks_per_host=4)


def edge(source: str, destination: str, **values: Any) -> Edge:
    src = parse_layout(source, "source")
    dst = parse_layout(destination, "destination", max(src.ranks) + 1)
    samples = values.pop("samples", math.lcm(len(src.lanes()), len(dst.lanes(0))))
    return Edge(src, dst, samples, **{"rows": 64, "hidden": 8, **values})


def seconds(*phases: Phase, links: Links = SLOW) -> float:
    return time_of(phases, links)


def test_one_message_takes_its_bytes_and_the_latency() -> None:
    assert seconds(Phase("a", (Transfer(0, 4, 10),))) == 10 / 1.0 + 100
    assert seconds(Phase("a", (Transfer(0, 3, 10),))) == 10 / 8.0 + 100
    assert seconds(Phase("a", (Transfer(0, 0, 10),))) == 0.0


def test_the_busiest_link_decides() -> None:
    apart = Phase("a", (Transfer(0, 4, 10), Transfer(1, 5, 7)))
    same_sender = Phase("a", (Transfer(0, 4, 10), Transfer(0, 5, 7)))
    same_receiver = Phase("a", (Transfer(0, 4, 10), Transfer(1, 4, 7)))
    both_ways = Phase("a", (Transfer(0, 4, 10), Transfer(4, 0, 7)))
    both_paths = Phase("a", (Transfer(0, 4, 10), Transfer(0, 1, 160)))
    assert [seconds(phase) - 100 for phase in (apart, same_sender, same_receiver, both_ways, both_paths)] == [
        10,
        17,
        17,
        10,
        20,
    ]


def test_each_message_costs_its_overhead_on_both_ends() -> None:
    links = Links(nic=1.0, host=8.0, latency=0.0, overhead=3.0, ranks_per_host=4)
    assert seconds(Phase("a", (Transfer(0, 4, 10, messages=2), Transfer(1, 4, 10))), links=links) == 20 + 3 * 3


def test_phases_and_rounds_add_up() -> None:
    one, other = Phase("a", (Transfer(0, 4, 10),)), Phase("b", (Transfer(4, 0, 5),), rounds=3)
    assert seconds(one, other) == 10 + 100 + 5 + 300


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [(1, 40 + 30), (2, 40 + 15), (10, 40 + 3)],
)
def test_lane_copies_overlap_with_the_transfers_but_for_one_chunk(chunks: int, expected: float) -> None:
    # 40 s over the cards, 240 / 8 = 30 s inside the host.
    phase = Phase("a", (Transfer(0, 4, 40),), (Transfer(4, 5, 240),), chunks, rounds=0)
    assert seconds(phase) == pytest.approx(expected)


def test_copies_that_share_the_card_with_the_transfers_do_not_hide() -> None:
    # Rank 4 receives 40 from rank 0 and 40 from rank 8, all over its card.
    phase = Phase("a", (Transfer(0, 4, 40),), (Transfer(8, 4, 40),), 100, rounds=0)
    assert seconds(phase) == 80


def test_one_host_has_no_card() -> None:
    links = Links(nic=1.0, host=8.0, latency=0.0, overhead=0.0, ranks_per_host=0)
    assert seconds(Phase("a", (Transfer(0, 4000, 80),)), links=links) == 10


@pytest.mark.parametrize("values", [{"nic": 0.0}, {"host": -1.0}, {"latency": -1e-9}, {"ranks_per_host": -1}])
def test_links_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"links: .*{next(iter(values))} must .*{next(iter(values.values()))}"):
        Links(**values)


# The released way, by hand: bfloat16 [64 * samples, 8] is 1024 bytes per sample.


def test_leader_and_ring_of_a_fan_in() -> None:
    traffic = leader_broadcast(edge("tp=2,dp=2", "tp=4"), SLOW)
    assert {phase.name: (phase.transfers, phase.rounds) for phase in traffic.phases} == {
        "shape": ((Transfer(1, 4, 16), Transfer(3, 4, 16)), 1),
        "payload": ((Transfer(1, 4, 1024), Transfer(3, 4, 1024)), 1),
        "shape in the lane": ((Transfer(4, 5, 16), Transfer(5, 6, 16), Transfer(6, 7, 16)), 3),
        "payload in the lane": ((Transfer(4, 5, 2048), Transfer(5, 6, 2048), Transfer(6, 7, 2048)), 3),
    }
    assert (traffic.rounds, traffic.messages) == (8, 10)
    assert traffic.seconds == 32 + 2048 + 16 / 8 + 2048 / 8 + 8 * 100


def test_leader_and_tree_of_a_fan_out_of_gradients() -> None:
    traffic = leader_broadcast(edge("tp=4", "tp=1,dp=2"), SLOW, backward=True, broadcast="tree")
    assert [phase.transfers for phase in traffic.phases if phase.name.startswith("payload")] == [
        (Transfer(4, 3, 1024), Transfer(5, 3, 1024)),
        (Transfer(3, 0, 2048),),
        (Transfer(3, 1, 2048), Transfer(0, 2, 2048)),
    ]
    assert traffic.rounds == 1 + 2 + 1 + 2


def test_a_tree_reaches_every_rank_of_an_odd_lane_once() -> None:
    traffic = leader_broadcast(edge("tp=1", "tp=7"), SLOW, broadcast="tree")
    reached = [t.receiver for phase in traffic.phases if phase.name == "payload in the lane" for t in phase.transfers]
    assert sorted(reached) == [2, 3, 4, 5, 6, 7]
    assert len([phase for phase in traffic.phases if phase.name == "payload in the lane"]) == 3


def test_one_rank_on_both_sides_sends_nothing() -> None:
    traffic = leader_broadcast(edge("tp=1", "ranks=0-0,tp=1"), SLOW)
    ours = planned(edge("tp=1", "ranks=0-0,tp=1"), SLOW)
    assert (
        (traffic.messages, traffic.rounds, traffic.seconds) == (0, 0, 0.0) == (ours.messages, ours.rounds, ours.seconds)
    )
    assert ours.total("stays") == 1024


def test_ours_by_hand() -> None:
    traffic = planned(edge("tp=4", "tp=4", path="pipelined"), SLOW)
    loads = traffic.loads()
    for rank in range(4):
        assert loads[rank, "nic", "out"].size == 256 == loads[4 + rank, "nic", "in"].size
        assert loads[4 + rank, "host", "out"].size == 3 * 256 == loads[4 + rank, "host", "in"].size
    assert traffic.total("nic") == 1024
    assert traffic.total("host") == 4 * 3 * 256
    # The copies need 768 / 8 = 96 s, less than the transfers: they hide but for one chunk.
    chunks = traffic.phases[0].chunks
    assert traffic.seconds == pytest.approx(256 + 96 / chunks + 2 * 100)
    assert traffic.efficiency == pytest.approx(256 / traffic.seconds)


def test_large_parts_are_handed_on_in_chunks() -> None:
    links = Links(overhead=1e-9, ranks_per_host=4)
    small, large = (planned(edge("tp=4", "tp=4", hidden=hidden, path="pipelined"), links) for hidden in (8, 1 << 16))
    assert (small.chunks, large.chunks) == (1, 8)
    assert (small.rounds, large.rounds) == (2, 2)
    assert large.messages == 8 * small.messages
    sending, copying = large.total("nic") / 4 / 50e9, large.total("host") / 4 / 450e9
    overheads = 1e-9 * 8, 1e-9 * 8 * 3
    expected = sending + overheads[0] + (copying + overheads[1]) / 8 + 2 * 5e-6
    assert large.seconds == pytest.approx(expected)
    # Where messages cost more than the wire hides, fewer chunks are faster.
    costly = replace(links, overhead=2e-6)
    assert planned(edge("tp=4", "tp=4", hidden=1 << 16, path="pipelined"), costly).chunks == 2


@pytest.mark.parametrize("layout", ["tp=4 tp=4", "tp=8,dp=2 tp=8,cp=2", "dp=4 tp=4", "tp=4 tp=2,dp=2", "tp=2 tp=8"])
def test_the_chosen_path_is_about_the_fastest_by_the_model_of_messages(layout: str) -> None:
    """The choice is made by arithmetic alone; here every message of every path is put on its links."""
    source, destination = layout.split()
    links = Links(nic=1e9, host=8e9, latency=20e-6, overhead=10e-6, ranks_per_host=8)
    taken = set()
    for hidden in (8, 64, 512, 4096, 32768, 1 << 18):
        case = edge(source, f"ranks=16-{15 + parse_layout(destination, 'd').size},{destination}", hidden=hidden)
        for backward in (False, True):
            chosen = planned(case, links, backward)
            fastest = min(planned(replace(case, path=path), links, backward).seconds for path in PATHS[1:])
            assert chosen.seconds <= 1.6 * fastest
            taken.update(chosen.paths)
    assert "direct" in taken


# Any edge


@st.composite
def edges(draw: Any) -> Edge:
    def layout(name: str, first: int) -> Any:
        sizes = ",".join(
            f"{dim}={draw(st.integers(1, high))}" for dim, high in (("tp", 4), ("cp", 3), ("dp", 4), ("pp", 2))
        )
        held = draw(st.sampled_from(["replicated", "contiguous", "zigzag"]))
        parallel = draw(st.sampled_from(["yes", "no"]))
        return parse_layout(f"{sizes},cp_placement={held},sequence_parallel={parallel}", name, first)

    source = layout("source", 0)
    destination = layout("destination", draw(st.sampled_from([0, source.size // 2, source.size])))
    ndim = draw(st.sampled_from([2, 3]))
    samples = draw(st.integers(1, 8))
    rows: int | tuple[int, ...] = draw(st.integers(1, 9))
    if ndim == 2 and draw(st.booleans()):
        rows = tuple(draw(st.lists(st.integers(0, 9), min_size=samples, max_size=samples)))
    return Edge(
        source, destination, samples, rows, draw(st.integers(1, 5)), ndim=ndim, batch_dim=draw(st.integers(0, 1))
    )


PROFILE = settings(max_examples=120, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@PROFILE
@given(edges(), st.booleans())
def test_every_rank_receives_what_it_must_hold(edge: Edge, backward: bool) -> None:
    plan = edge.plan(backward)
    loads = planned(edge, SLOW, backward).loads()
    receiver = plan.source if backward else plan.destination
    # Gradients of cp copies are partial: each copy's is sent.
    sender = plan.destination if backward else plan.source
    copies = sender.cp if backward and sender.cp_placement == "replicated" else 1
    if copies > 1:
        assume(max(receiver.tp, receiver.cp) == 1)  # else parts arrive by others, already summed
    for lane, ranks in enumerate(receiver.lanes):
        for member, rank in enumerate(ranks):
            held = edge.dtype.itemsize * math.prod(plan.receiver_shape(lane, member))
            arrived = sum(loads.get((rank, path, "in"), Load()).size for path in ("nic", "host", "stays"))
            assert arrived == copies * held


@PROFILE
@given(edges(), st.booleans(), st.sampled_from(["ring", "tree"]))
def test_the_released_way_brings_every_rank_its_lane(edge: Edge, backward: bool, broadcast: str) -> None:
    traffic = leader_broadcast(edge, SLOW, backward, broadcast)
    plan = edge.plan(backward)
    receiver = plan.source if backward else plan.destination
    payload = [t for phase in traffic.phases if phase.name.startswith("payload") for t in phase.transfers]
    loads = loads_of(payload, SLOW)
    first = lambda lane, lanes: lane * edge.samples // lanes  # noqa: E731
    for lane, ranks in enumerate(receiver.lanes):
        rows = edge.rows_of_samples[first(lane, len(receiver.lanes)) : first(lane + 1, len(receiver.lanes))]
        whole = sum(rows) * edge.hidden * edge.dtype.itemsize
        for rank in ranks:
            assert sum(loads.get((rank, path, "in"), Load()).size for path in ("nic", "host", "stays")) == whole


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ("tp=4,dp=8", "tp=4,dp=8"),
        ("tp=2,dp=16", "tp=4,cp=2,dp=4"),
        ("tp=4,dp=4", "tp=2,dp=16"),
        ("tp=4,dp=8", "ranks=0-31,tp=2,dp=16"),
        ("tp=4,dp=12", "tp=4,dp=8"),
    ],
)
def test_the_first_of_equal_groups_stands_for_all(
    monkeypatch: pytest.MonkeyPatch, source: str, destination: str, backward: bool
) -> None:
    def figures() -> list[Any]:
        both = [planned(case, SLOW, backward), leader_broadcast(case, SLOW, backward)]
        keys = [(path, way) for path in ("nic", "host") for way in ("out", "in")]
        return [
            (
                t.messages,
                t.rounds,
                t.seconds,
                t.total("nic"),
                t.total("host"),
                t.total("stays"),
                *(t.most(*k) for k in keys),
            )
            for t in both
        ]

    case = edge(source, destination)
    assert planned(case, SLOW, backward).part.groups > 1
    quick = figures()
    monkeypatch.setattr(traffic_module, "_groups_are_alike", lambda *_: False)
    assert planned(case, SLOW, backward).part.groups == 1
    assert quick == figures()


@pytest.mark.parametrize(
    ("case", "links"),
    [
        (edge("tp=8,dp=4", "tp=8,dp=4", rows=(3, 4, 5, 6)), SLOW),
        (edge("tp=8,dp=4", "tp=8,dp=4", samples=6), SLOW),
        # Hosts of three ranks: each lane lies differently on them.
        (edge("tp=8,dp=4", "tp=8,dp=4"), Links(ranks_per_host=3)),
        # The destination moves on by other steps than the source, and shares its first host with the source's last.
        (edge("tp=16,dp=2", "ranks=16-31,tp=8,dp=2"), SLOW),
        # Few enough to look at all.
        (edge("tp=4,dp=4", "tp=4,dp=4"), SLOW),
    ],
)
def test_groups_that_differ_are_all_looked_at(case: Edge, links: Links) -> None:
    assert planned(case, links).part.groups == 1


def test_a_world_too_large_to_list_is_refused_in_words() -> None:
    case = edge("tp=8,dp=2048", "tp=8,dp=2048", samples=2049)
    with pytest.raises(EdgeError, match=r"32768 ranks .* can be listed here .*multiple of 2048"):
        planned(case, Links())


def test_a_hundred_thousand_ranks_in_equal_groups_are_quick() -> None:
    traffic = planned(edge("tp=8,dp=8192", "tp=8,cp=4,dp=2048"), Links())
    assert traffic.part.groups == 2048
    assert len(traffic.part.ranks) == 32 + 32
    assert traffic.total("nic") + traffic.total("host") == 2048 * sum(t.size for t in traffic.transfers)


@pytest.mark.parametrize(
    ("source", "destination", "reason"),
    [
        ("tp=2,dp=2", "tp=4", None),
        ("tp=2,dp=2", "tp=2,cp=2", "context parallelism"),
        ("dp=3", "dp=2", "2 and 3 lanes, of which neither divides the other"),
    ],
)
def test_what_the_released_class_refuses(source: str, destination: str, reason: str | None) -> None:
    assert edge(source, destination).refused_by_released() == reason
