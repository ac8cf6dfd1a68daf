"""The timeline of a step: what is idle and what is exposed, the picture and the trace file."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launch import launch

from mimo_ext import timeline
from mimo_ext.timeline import RankTimeline, Recorder, Span, split_waits, summary

LINK = "images -> language"
MS = 1_000_000


def span(kind: str, begin: float, end: float, microbatch: int | None = None, operation: str = "") -> Span:
    """In milliseconds."""
    link, num_bytes = (LINK, 1000) if operation else ("", None)
    return Span(kind, int(begin * MS), int(end * MS), microbatch, link, operation, num_bytes)


def rank(number: int, *spans: Span, label: str = "images", end: float = 100) -> RankTimeline:
    return RankTimeline(number, label, 0, int(end * MS), list(spans))


def test_a_wait_is_idle_until_the_last_sender_has_handed_in_and_exposed_from_then_on() -> None:
    ranks = split_waits(
        [
            rank(0, span("transfer", 10, 20, 0, "send_forward"), span("transfer", 30, 33, 1, "send_forward")),
            rank(1, span("transfer", 12, 22, 0, "send_forward"), span("transfer", 31, 34, 1, "send_forward")),
            rank(
                2,
                span("wait", 5, 25, 0, "recv_forward"),
                span("wait", 32, 36, 1, "recv_forward"),
                span("transfer", 5, 25, 0, "recv_forward"),
                span("transfer", 26, 36, 1, "recv_forward"),
            ),
        ]
    )
    assert ranks[2].spans == [
        span("idle", 5, 12, 0, "recv_forward"),
        span("exposed", 12, 25, 0, "recv_forward"),
        span("exposed", 32, 36, 1, "recv_forward"),  # it was handed in before anybody asked
        # Under way from when the first sender has handed in.
        span("transfer", 10, 25, 0, "recv_forward"),
        span("transfer", 30, 36, 1, "recv_forward"),
    ]
    assert ranks[0].spans == [
        span("transfer", 10, 20, 0, "send_forward"),
        span("transfer", 30, 33, 1, "send_forward"),
    ]


def test_a_send_ends_when_the_last_receiver_has_the_tensor() -> None:
    sender, *_ = split_waits(
        [
            rank(0, span("transfer", 10, 90, 0, "send_forward"), span("transfer", 20, 90, 1, "send_forward")),
            rank(1, span("transfer", 12, 25, 0, "recv_forward"), span("transfer", 12, 95, 1, "recv_forward")),
            rank(2, span("transfer", 12, 30, 0, "recv_forward"), span("transfer", 5, 8, 0, "recv_backward")),
        ]
    )
    assert sender.spans == [
        span("transfer", 10, 30, 0, "send_forward"),
        span("transfer", 20, 90, 1, "send_forward"),
    ]


def test_gradients_and_links_are_not_mixed_up() -> None:
    other = Span("transfer", 50 * MS, 60 * MS, 0, "audio -> language", "send_backward")
    forward = span("transfer", 70, 80, 0, "send_forward")
    backward = span("transfer", 20, 30, 0, "send_backward")
    waits = [span("wait", 10, 35, 0, "recv_backward"), Span("wait", 10 * MS, 65 * MS, 0, other.link, "recv_backward")]
    found = split_waits([rank(0, *waits), rank(1, other, forward, backward)])[0]
    assert [(s.kind, s.link, s.end_ns // MS) for s in found.spans] == [
        ("idle", LINK, 20),
        ("exposed", LINK, 35),
        ("idle", other.link, 50),
        ("exposed", other.link, 65),
    ]


def test_a_wait_in_a_send_is_exposed_and_one_without_a_known_sender_too() -> None:
    found = split_waits([rank(0, span("wait", 1, 4, 0, "send_forward"), span("wait", 6, 9, 3, "recv_backward"))])
    assert [(s.kind, s.begin_ns // MS, s.end_ns // MS) for s in found[0].spans] == [
        ("exposed", 1, 4),
        ("exposed", 6, 9),
    ]


def test_seconds_count_what_spans_share_once() -> None:
    found = rank(0, span("forward", 0, 10), span("backward", 5, 20), span("forward", 12, 14), span("other", 30, 31))
    assert found.seconds("forward", "backward") == pytest.approx(0.020)
    assert found.seconds(*timeline.COMPUTE) == pytest.approx(0.021)
    assert found.seconds("exposed") == 0


def test_summary_of_a_rank() -> None:
    (_, found) = summary(
        [
            rank(0, span("transfer", 10, 20, 0, "send_forward")),
            rank(
                1,
                span("wait", 5, 20, 0, "recv_forward"),
                span("transfer", 0, 20, 0, "recv_forward"),
                span("forward", 20, 50, 0),
                label="language",
            ),
        ]
    )
    assert found == {
        "rank": 1,
        "label": "language",
        "total_s": 0.1,
        "compute_s": pytest.approx(0.030),
        "transfer_s": pytest.approx(0.010),
        "exposed_s": pytest.approx(0.010),
        "idle_s": pytest.approx(0.005),
    }


class Bridge:
    """With the trace of a `mimo_ext.Bridge`."""

    name = LINK

    def __init__(self) -> None:
        self.capacities: list[int] = []
        self.events: list[dict[str, Any]] = []
        self.sends = 5

    def telemetry(self) -> dict[str, dict[str, int]]:
        return {"forward": {"sends": self.sends}, "backward": {"sends": 1}}

    def start_trace(self, capacity: int) -> None:
        self.capacities.append(capacity)

    def trace_events(self) -> list[dict[str, Any]]:
        """Each time one more has ended."""
        self.asked = getattr(self, "asked", 0) + 1
        return self.events[: self.asked]

    def add(self, operation: str, microbatch: int, *times: int) -> None:
        keys = ("posted_ns", "started_ns", "done_ns", "wait_begin_ns", "wait_end_ns")
        times = tuple(ms * MS for ms in times) + (0,) * (5 - len(times))
        about = {"operation": operation, "microbatch": microbatch, "bytes": 8}
        self.events.append({**about, **dict(zip(keys, times, strict=True))})


def test_a_recorder_takes_the_events_of_its_bridges_and_numbers_microbatches_anew() -> None:
    bridge = Bridge()
    recorder = Recorder("images", bridge)
    assert bridge.capacities[0] > 1000
    before = time.monotonic_ns()
    with recorder.compute("forward", microbatch=0):
        time.sleep(0.002)
    after = time.monotonic_ns()
    bridge.add("send_forward", 7, 3, 3, 4)
    bridge.add("send_forward", 6, 1, 1, 2)
    bridge.add("recv_backward", 6, 4, 5, 8, 6, 9)
    bridge.events.insert(0, bridge.events.pop())  # in the order in which they ended
    bridge.sends += 2
    found = recorder.finish()
    assert bridge.capacities[1:] == [0]
    assert (found.rank, found.label) == (0, "images")
    compute, *others = found.spans
    assert (compute.kind, compute.microbatch) == ("forward", 0)
    assert before <= compute.begin_ns <= compute.end_ns - 2 * MS <= after
    assert found.begin_ns <= compute.begin_ns
    assert compute.end_ns <= found.end_ns
    assert [(s.kind, s.operation, s.microbatch, s.begin_ns // MS, s.end_ns // MS) for s in others] == [
        ("transfer", "recv_backward", 0, 5, 8),
        ("wait", "recv_backward", 0, 6, 9),
        ("transfer", "send_forward", 0, 1, 2),
        ("transfer", "send_forward", 1, 3, 4),
    ]
    assert {(s.link, s.num_bytes) for s in others} == {(LINK, 8)}


def test_an_unknown_kind_of_compute_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind: expected one of \('forward', 'backward', 'other'\), got 'fwd'"):
        Recorder("images").compute("fwd").__enter__()


def gathered(number: int, world_size: int, host: str) -> Any:
    if number == 1 and host:
        timeline.socket.gethostname = lambda: host  # type: ignore[attr-defined]
        clock = time.monotonic_ns
        timeline.time.monotonic_ns = lambda: clock() + 3_600_000 * MS  # type: ignore[attr-defined]
    now = timeline.time.monotonic_ns()  # type: ignore[attr-defined]
    mine = RankTimeline(number, f"label {number}", now, now + MS, [Span("forward", now, now + MS, 0)])
    found = timeline.gather(mine, dst=0)
    return None if found is None else [(r.rank, r.label, r.begin_ns, r.spans[0].begin_ns, r.end_ns) for r in found]


def test_recordings_are_gathered_on_one_rank_and_other_hosts_clocks_are_set_right() -> None:
    for host in ("", "elsewhere"):
        found, nothing = launch(gathered, 2, host)
        assert nothing is None
        assert [entry[:2] for entry in found] == [(0, "label 0"), (1, "label 1")]
        assert all(begin == first == end - MS for _, _, begin, first, end in found)
        # An hour apart by their clocks.
        assert abs(found[1][2] - found[0][2]) < 10_000 * MS


RANKS = [
    rank(
        0,
        span("forward", 0, 10, 0),
        span("transfer", 10, 20, 0, "send_forward"),
        span("wait", 12, 50, 0, "recv_backward"),
        span("backward", 50, 90, 0),
    ),
    rank(
        1,
        span("wait", 0, 20, 0, "recv_forward"),
        span("transfer", 0, 20, 0, "recv_forward"),
        span("forward", 20, 30, 0),
        span("backward", 30, 40, 0),
        span("transfer", 40, 50, 0, "send_backward"),
        span("other", 50, 100),
        label="language",
    ),
]


def test_the_trace_file_has_every_span_on_its_rank(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "trace.json"
    timeline.write_trace(RANKS, file)
    events = json.loads(file.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "rank 0: images", 1: "rank 1: language"}
    spans = [(e["pid"], e["tid"], e["name"], e["ts"] / 1e3, e["dur"] / 1e3) for e in events if e["ph"] == "X"]
    assert spans == [
        (0, 0, "forward 0", 0, 10),
        (0, 1, "send_forward 0", 10, 10),
        (0, 0, f"idle {LINK} 0", 12, 28),
        (0, 0, f"exposed {LINK} 0", 40, 10),
        (0, 0, "backward 0", 50, 40),
        (1, 0, f"idle {LINK} 0", 0, 10),
        (1, 0, f"exposed {LINK} 0", 10, 10),
        (1, 1, "recv_forward 0", 10, 10),
        (1, 0, "forward 0", 20, 10),
        (1, 0, "backward 0", 30, 10),
        (1, 2, "send_backward 0", 40, 10),
        (1, 0, "other", 50, 50),
    ]
    (sent,) = [e for e in events if e["name"] == "send_forward 0"]
    assert sent["args"] == {"microbatch": 0, "link": LINK, "bytes": 1000}


def test_the_picture_shows_compute_transfers_and_waits_where_they_were(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from mimo_ext._timeline_picture import STYLES

    file = tmp_path / "new folder" / "step.png"
    timeline.draw(RANKS, file, title="a step")
    pixels = imread(file)[:, :, :3]
    colors = {
        name: [abs(pixels - list(matplotlib.colors.to_rgb(style["facecolor"]))).max(axis=2) < 0.01]
        for name, style in STYLES.items()
    }
    columns = {}
    for name in ("forward", "backward", "other", "transfer forward", "transfer backward"):
        (where,) = colors[name]
        area = where[: int(0.8 * len(where))]  # without the legend
        columns[name] = [bool(column) for column in area.any(axis=0)]
        assert any(columns[name]), name
    # In the order of the step, on both ranks together.
    first = {name: found.index(True) for name, found in columns.items()}
    assert first["forward"] < first["transfer forward"] < first["backward"] < first["transfer backward"]
    ends = {name: len(found) - found[::-1].index(True) for name, found in columns.items()}
    assert ends["transfer forward"] < ends["backward"] < ends["other"]
    # All kinds can be told apart by their brightness or their hatching: in grey, too.
    greys = sorted(sum(matplotlib.colors.to_rgb(style["facecolor"])) for style in STYLES.values())
    assert all(one < other for one, other in itertools.pairwise(greys))


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="ranks: expected one timeline or more, got none"):
        timeline.draw([], "nowhere.png")


def test_recording_imports_neither_matplotlib_nor_megatron() -> None:
    program = (
        "import sys, mimo_ext.timeline as t\n"
        "t.Recorder('images').finish()\n"
        "assert not {'matplotlib', 'megatron'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)
