"""The benchmarks without measuring: their records, cases, bounds, arguments, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_bridge
import bench_host
import busy
import command_line
import emulation
import picture
import released
from cases import FAMILIES, MIB, Case, Side, by_cluster, parse_layout, select
from records import KEYS, Measurement, Record, measurement, read_json, size_text, slower, table, write_json


def sample(**changes: object) -> Record:
    values = {
        "name": "transfer",
        "layout": "tp4-tp4",
        "bytes": 4 * MIB,
        "method": "sharded",
        "ratio_median": 5.2,
        "ratio_lo": 5.0,
        "ratio_hi": 5.5,
        "efficiency": 0.98,
        "repeats": 5,
        "busy": 0.03,
    }
    return Record(**{**values, **changes})


# Records


def test_records_survive_a_file_unchanged_and_keep_the_agreed_keys(tmp_path: Path) -> None:
    records = [sample(), sample(name="small", efficiency=None), sample(layout=None, bytes=None, busy=None)]
    write_json(records, tmp_path / "new" / "records.json")
    assert read_json(tmp_path / "new" / "records.json") == records
    assert list(json.loads((tmp_path / "new" / "records.json").read_text())[0]) == list(KEYS)
    assert " ".join(KEYS) == "name layout bytes method ratio_median ratio_lo ratio_hi efficiency repeats busy"
    write_json([], tmp_path / "none.json")
    assert read_json(tmp_path / "none.json") == []


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": 1.5},
        {"bytes": -1},
        {"repeats": True},
        {"ratio_lo": "5"},
        {"efficiency": float("nan")},
        {"method": None},
        {"layout": 4},
        {"seconds": 1.0},
    ],
)
def test_a_file_with_other_values_or_keys_is_refused_by_name(tmp_path: Path, change: dict[str, object]) -> None:
    file = tmp_path / "records.json"
    file.write_text(json.dumps([dataclasses.asdict(sample()), {**dataclasses.asdict(sample()), **change}]))
    with pytest.raises(ValueError, match=f"records.json, record 1.*{next(iter(change))}"):
        read_json(file)


def test_ratios_are_those_of_neighbouring_times() -> None:
    item = measurement(
        "transfer",
        "tp4-tp4",
        MIB,
        "replicated",
        released_s=[4.0, 9.0, 2.0],  # the machine was slow in the second pair: of both alike
        method_s=[1.0, 3.0, 1.0],
        bound_s=0.9,
        busy=0.12345,
    )
    assert (item.record.ratio_median, item.record.ratio_lo, item.record.ratio_hi) == (3.0, 2.0, 4.0)
    assert (item.record.efficiency, item.record.repeats, item.record.busy) == (0.9, 3, 0.123)
    assert (item.released_s, item.method_s) == (4.0, 1.0)


@pytest.mark.parametrize(("released_s", "method_s"), [([], []), ([1.0, 2.0], [1.0]), ([1.0], [0.0])])
def test_times_that_are_no_pairs_are_refused(released_s: list[float], method_s: list[float]) -> None:
    with pytest.raises(ValueError, match="transfer tp4-tp4: expected"):
        measurement(
            "transfer", "tp4-tp4", MIB, "sharded", released_s=released_s, method_s=method_s, bound_s=1.0, busy=0.0
        )


def test_the_table_shows_every_number_beside_its_ratio() -> None:
    text = table([Measurement(sample(), 0.5, 0.096), Measurement(sample(efficiency=None), 2e-5, 5e-6)]).splitlines()
    assert text[2].split() == [
        "transfer",
        "tp4-tp4",
        "4",
        "MiB",
        "sharded",
        "500.0",
        "ms",
        "96.0",
        "ms",
        "5.20x",
        "5.00",
        "..",
        "5.50",
        "0.98",
        "0.03",
    ]
    assert text[3].split() == [
        "transfer",
        "tp4-tp4",
        "4",
        "MiB",
        "sharded",
        "20.0",
        "us",
        "5.0",
        "us",
        "5.20x",
        "5.00",
        "..",
        "5.50",
        "-",
        "0.03",
    ]
    assert [size_text(size) for size in (None, 512, 16384, 1536 * 1024)] == ["-", "512 B", "16 KiB", "1.5 MiB"]


def test_what_loses_to_the_released_class_is_named() -> None:
    records = [sample(), sample(ratio_lo=0.969, method="replicated"), sample(ratio_lo=0.97), sample(ratio_lo=None)]
    assert slower(records) == ["transfer tp4-tp4 4 MiB replicated"]


def test_the_picture_is_drawn_from_records_alone(tmp_path: Path) -> None:
    picture.draw([sample(), sample(method="replicated", ratio_median=None), sample(bytes=MIB)], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


# Cases and bounds


def test_layouts_are_read_as_they_are_written() -> None:
    assert parse_layout("tp2dp2-tp4") == (Side(2, 2), Side(4, 1))
    assert parse_layout("dp4-tp1") == (Side(1, 4), Side(1, 1))
    for text in ("tp4", "tp4-tp4-tp4", "tp4-pp2", "tp2tp2-tp4", "tp-tp4", "tp0-tp4", "", "tp4 -tp4"):
        with pytest.raises(ValueError, match="layout: expected"):
            parse_layout(text)


@pytest.mark.parametrize("quick", [True, False])
def test_every_layout_and_size_that_has_a_target_is_measured(quick: bool) -> None:
    cases = select(quick=quick)
    measured = {(case.family, case.layout, case.num_bytes // MIB, method) for case in cases for method in case.methods}
    for method in ("replicated", "sharded"):
        for layout in ("tp4-tp4", "tp2dp2-tp4", "dp4-tp4", "tp4-tp2dp2"):
            for size in (1, 4, 16) if layout == "tp4-tp4" or not quick else (16,):
                assert ("transfer", layout, size, method) in measured
        for size in (4, 12):
            assert ("transfer", "tp8-tp8", size, method) in measured
        assert ("steady-1f1b", "tp4-tp4", 8, method) in measured
        assert ("one-host", "tp4-tp4", 4, method) in measured
    assert ("small", "tp1-tp1", 0, "replicated") in measured
    for size in (4, 16):
        assert any(case.family == "loopback" and case.num_bytes == size << 10 for case in cases)
    assert {case.family for case in cases} == set(FAMILIES)
    # A cluster is made once.
    clusters = [{(case.emulated, case.hosts) for case in same} for same in by_cluster(cases)]
    assert all(len(of) == 1 for of in clusters)
    assert len(clusters) == len(set.union(*clusters))


def test_shapes_hold_the_payload_and_split_over_all_ranks() -> None:
    for case in select(quick=False):
        sequence, batch, hidden = case.shape
        assert sequence * batch * hidden * 2 == case.num_bytes
        for side in (case.source, case.destination):
            assert sequence % side.tp == 0
            assert batch % side.dp == 0


def bound_ms(layout: str, size: int, method: str, family: str = "transfer", microbatches: int = 1) -> float:
    return Case(family, *parse_layout(layout), size, (method,), microbatches).bound_s(method) * 1e3


def test_the_bound_is_the_busiest_link_s_time() -> None:
    # 200 Mbit/s = 25 MB/s per card, 1440 Mbit/s = 180 MB/s inside a host.
    assert bound_ms("tp4-tp4", 16 * MIB, "sharded") == pytest.approx(2 * 16 * 1.048576 / 4 / 25 * 1e3)
    # What is completed inside the host takes less than what comes from outside.
    assert bound_ms("tp4-tp4", 16 * MIB, "replicated") == bound_ms("tp4-tp4", 16 * MIB, "sharded")
    # The module with fewer cards decides.
    assert bound_ms("tp2-tp4", 4 * MIB, "sharded") == pytest.approx(2 * 4 * 1.048576 / 2 / 25 * 1e3)
    # With many ranks the host's own path does: 15/16 of everything into each of 16 ranks, at 90 MB/s.
    assert bound_ms("tp16-tp16", 4 * MIB, "replicated") == pytest.approx(2 * 4 * 1.048576 * 15 / 16 / 90 * 1e3)
    # One host: every rank of the lane takes all of it in over one link; shards are a quarter of that.
    assert bound_ms("tp4-tp4", 4 * MIB, "replicated", "one-host") == pytest.approx(2 * 4 * 1.048576 / 180 * 1e3)
    assert bound_ms("tp4-tp4", 4 * MIB, "sharded", "one-host") == pytest.approx(2 * 1.048576 / 180 * 1e3)
    # Two microbatches of 1F1B: there, both ways at once, back; one after the other: twice there and back.
    assert bound_ms("tp4-tp4", 8 * MIB, "sharded", "steady-1f1b", 2) == pytest.approx(3 * 8 * 1.048576 / 4 / 25 * 1e3)
    assert bound_ms("tp4-tp4", 8 * MIB, "sharded", "transfer", 2) == pytest.approx(4 * 8 * 1.048576 / 4 / 25 * 1e3)


# Arguments


def test_arguments_choose_the_cases() -> None:
    options = bench_bridge.parse_arguments(
        ["--layouts", "dp4-tp4,tp4-tp4", "--sizes", "2,64k", "--families", "transfer", "--methods", "sharded-static"]
    )
    assert [(case.layout, case.num_bytes, case.methods) for case in options.cases] == [
        (layout, size, ("sharded-static",)) for layout in ("dp4-tp4", "tp4-tp4") for size in (2 * MIB, 65536)
    ]
    assert options.repeats == 9
    assert bench_bridge.parse_arguments(["--quick"]).repeats == 5
    assert not bench_bridge.parse_arguments(["--quick"]).ignore_busy


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layouts", "tp4"], "layout: expected"),
        (["--layouts", "dp3-tp4"], "expected dp sizes that divide the batch of 4"),
        (["--families", "slow"], "families: expected"),
        (["--methods", "direct"], "methods: expected"),
        (["--sizes", "5k"], "expected a multiple of"),
        (["--sizes", "big"], "invalid list value: 'big'"),
        (["--repeats", "-1"], "expected a positive number"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_words(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        bench_bridge.parse_arguments(arguments)
    assert exit_status.value.code == 2
    assert words in capsys.readouterr().err


def test_arguments_of_the_host_benchmark() -> None:
    options = bench_host.parse_arguments(["--quick", "--layouts", "tp4-tp4,dp4-tp2dp2"])
    assert [case.layout for case in options.cases] == ["tp4-tp4", "dp4-tp2dp2"]
    assert {case.methods for case in options.cases} == {("replicated-static", "sharded-static")}
    assert bench_host.leaders(options.cases[1]) == [0, 1, 2, 3, 4, 6]  # each source rank is a lane of its own
    assert bench_host.parse_arguments([]).repeats > options.repeats > 4
    for arguments in (["--layouts", "tp4"], ["--repeats", "-2"]):
        with pytest.raises(SystemExit):
            bench_host.parse_arguments(arguments)


@pytest.mark.parametrize("ignore", [True, False])
def test_host_times_become_records_unless_the_machine_is_busy(monkeypatch: pytest.MonkeyPatch, ignore: bool) -> None:
    times = {"released": [9.0, 12.0], "replicated-static": [3.0, 3.0], "sharded-static": [1.0, 2.0]}
    measured = []

    def rank_times(case: Case, rank: int, repeats: int, steps: int) -> dict[str, dict[str, list[float]]]:
        measured.append(rank)
        return dict.fromkeys(bench_host.CLOCKS, times)

    monkeypatch.setattr(bench_host, "rank_times", rank_times)
    monkeypatch.setattr(busy, "other_share", lambda machine, ours: 0.5)
    (case,) = bench_host.parse_arguments([]).cases
    if not ignore:
        with pytest.raises(busy.MachineBusy, match="tp4-tp4: other work used 50%"):
            bench_host.measure(case, 2, 1, ignore)
        return
    records = [item.record for item in bench_host.measure(case, 2, 1, ignore)]
    assert measured == [3, 0, 4, 5]  # leader and member, source and destination
    assert [record.name for record in records[::6]] == [
        f"host-{side}-{role}" for side in ("source", "destination") for role in ("leader", "member")
    ]
    assert [(record.method, record.ratio_median, record.busy) for record in records[:3]] == [
        ("replicated-static", 3.5, 0.5),
        ("sharded-static", 7.5, 0.5),
        ("replicated-static-caller", 3.5, 0.5),
    ]


def test_without_root_the_benchmark_is_skipped_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(emulation.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(bench_bridge, "require_released", lambda: None)
    monkeypatch.setattr(bench_bridge.signal, "signal", lambda *given: None)
    file = tmp_path / "records.json"
    assert bench_bridge.main(["--quick", "--json", str(file)]) == command_line.SKIPPED
    assert "skipped: network namespaces need root, this is user 1000" in capsys.readouterr().err
    assert not file.exists()


def test_without_the_tools_the_benchmark_is_skipped_and_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation.os, "geteuid", lambda: 0)
    monkeypatch.setattr(emulation.shutil, "which", lambda tool: "/sbin/ip" if tool == "ip" else None)
    with pytest.raises(emulation.EmulationUnavailable, match=r"^tc not found: install iproute2"):
        emulation.require_tools()


def test_without_megatron_the_benchmark_is_skipped_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(released.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_bridge.signal, "signal", lambda *given: None)
    assert bench_bridge.main(["--quick"]) == command_line.SKIPPED
    assert "skipped: megatron-core is not installed" in capsys.readouterr().err


# A busy machine


class Pool:
    """Ranks that always take the same time, while the machine is used by others."""

    def __init__(self) -> None:
        self.calls = 0

    def call(self, fn: object, case: Case, repeats: int, *, timeout: float) -> list[object]:
        import transfers

        self.calls += 1
        runs = {
            transfers.RELEASED: [(0.0, 4.0)] * repeats,
            **{method: [(0.5, 1.5)] * repeats for method in case.methods},
        }
        late = {method: [(begin + 1, end + 1) for begin, end in pairs] for method, pairs in runs.items()}
        return [transfers.Times(times, busy.Usage(1.0, 1.0)) for times in (runs, late)]


@pytest.mark.parametrize(("shares", "ignore", "attempts"), [([0.3, 0.1], False, 2), ([0.9], True, 1)])
def test_a_disturbed_case_is_measured_again_or_marked(
    monkeypatch: pytest.MonkeyPatch, shares: list[float], ignore: bool, attempts: int
) -> None:
    left = list(shares)
    paused: list[float] = []
    monkeypatch.setattr(busy.time, "sleep", paused.append)
    monkeypatch.setattr(busy, "other_share", lambda machine, ours: left.pop(0))
    pool = Pool()
    case = Case("transfer", Side(1), Side(1), MIB, ("replicated",))
    (found,) = bench_bridge.measure(pool, case, 3, ignore)
    assert (pool.calls, len(paused)) == (attempts, attempts - 1)
    assert found.record.busy == shares[-1]
    # From the first rank's begin to the last rank's end: 0 .. 5 and 0.5 .. 2.5.
    assert (found.released_s, found.method_s, found.record.ratio_median) == (5.0, 2.0, 2.5)


def test_a_machine_that_stays_busy_is_not_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(busy, "other_share", lambda machine, ours: 0.4)
    monkeypatch.setattr(busy.time, "sleep", lambda seconds: None)
    pool = Pool()

    def run(cases: list[Case], repeats: int, ignore_busy: bool) -> list[Measurement]:
        return bench_bridge.measure(pool, cases[0], repeats, ignore_busy)

    monkeypatch.setattr(bench_bridge, "run", run)
    monkeypatch.setattr(bench_bridge.signal, "signal", lambda *given: None)
    file = tmp_path / "records.json"
    assert bench_bridge.main(["--quick", "--json", str(file)]) == command_line.BUSY
    assert pool.calls == busy.ATTEMPTS
    said = capsys.readouterr()
    assert "not reported: transfer tp4-tp4: other work used 40% of the machine, expected at most 25%" in said.err
    assert "x" not in said.out
    assert not file.exists()


def test_the_share_of_others_leaves_out_our_own_processes_and_the_network_s_interrupts() -> None:
    tick = busy.os.sysconf("SC_CLK_TCK")

    def reading(user: int, nice: int, system: int, idle: int, soft: int, stolen: int) -> busy.Usage:
        fields = [user, nice, system, idle, 0, 0, soft, stolen, 0, 0]
        return busy.machine_usage("cpu  " + " ".join(str(field * tick) for field in fields) + "\ncpu0 0 0\n")

    spent = reading(14, 1, 12, 60, 20, 3) - reading(10, 0, 10, 50, 10, 2)
    assert spent == busy.Usage(5.0, 2.0, 1.0, 28.0)
    assert busy.other_share(spent, [busy.Usage(1.0, 0.5), busy.Usage(2.0, 0.5)]) == pytest.approx((2 + 1 + 1) / 28)
    assert busy.other_share(spent, [busy.Usage(50.0, 50.0)]) == pytest.approx(1 / 28)
    with pytest.raises(ValueError, match="/proc/stat: expected"):
        busy.machine_usage("cpu0 1 2 3 4 5 6 7 8")


# Namespaces


def test_only_what_dead_processes_left_behind_is_removed() -> None:
    names = [
        "mimo-ext-10-500-hub",  # running
        "mimo-ext-10-499-r0",  # an earlier process of the same number
        "mimo-ext-11-7-r12",  # gone
        "mimo-ext-11-7-other",
        "mimo-ext-11-hub",
        "somebody-11-7-hub",
    ]
    assert emulation.leftovers(names, {10: 500}.get) == ["mimo-ext-10-499-r0", "mimo-ext-11-7-r12"]


def test_namespaces_are_removed_when_making_them_fails_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    present: set[str] = set()

    def run(*command: str, lines: list[str] | None = None, may_fail: bool = False) -> None:
        for words in [line.split() for line in lines or ()] or [list(command[1:])]:
            if words[:2] == ["netns", "add"]:
                present.add(words[2])
            if words[:2] == ["netns", "delete"]:
                present.discard(words[2])
        if command[0] == "tc":
            raise emulation.EmulationUnavailable("unknown qdisc")

    monkeypatch.setattr(emulation, "require_tools", lambda: None)
    monkeypatch.setattr(emulation, "_run", run)
    monkeypatch.setattr(emulation, "_namespaces", lambda: sorted(present))
    cluster = emulation.EmulatedCluster([(0, 1), (2,)], emulation.Rates(100, 720))
    with pytest.raises(emulation.EmulationUnavailable, match="unknown qdisc"), cluster:
        raise AssertionError("not reached")
    assert present == set()


def test_peers_of_the_same_host_are_reached_by_the_fast_path() -> None:
    cluster = emulation.EmulatedCluster([(0, 2), (1, 3)], emulation.Rates(100, 720))
    routes = [line for line in cluster._rank_lines(0) if line.startswith("route")]
    assert [line.split()[2:5:2] for line in routes] == [
        ["10.213.0.2/32", "nic0"],
        ["10.213.0.3/32", "nvl0"],
        ["10.213.0.4/32", "nic0"],
    ]
    with pytest.raises(ValueError, match="each once"):
        emulation.EmulatedCluster([(0, 1), (1, 2)], emulation.Rates(100, 720))


def test_the_benchmark_runs_as_a_file_without_the_source_folder_on_the_path() -> None:
    done = subprocess.run(
        [sys.executable, "-P", bench_bridge.__file__, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--ignore-busy" in done.stdout
