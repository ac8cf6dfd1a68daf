"""bench_plan.py: its records, and that docs/scale.md says what they say."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_plan  # noqa: E402
import plan_cases  # noqa: E402
import plan_check  # noqa: E402
import plan_tables  # noqa: E402
from cases import Case, Side  # noqa: E402
from records import KEYS, Record, read_json  # noqa: E402
from records import write_json as write_records  # noqa: E402

from mimo_ext.planning import Links  # noqa: E402

COMMITTED = ROOT / "benchmarks" / "results" / "plan_details.json"
MEASURED = ROOT / "benchmarks" / "results" / "bridge.json"  # bench_bridge.py's, where it is committed
PAGE = ROOT / "docs" / "scale.md"


def test_the_page_holds_what_the_committed_records_say(tmp_path: Path) -> None:
    copy = tmp_path / "scale.md"
    shutil.copy(PAGE, copy)
    measured = ["--measured", str(MEASURED)] if MEASURED.exists() else []
    assert bench_plan.main(["--from", str(COMMITTED), "--tables", str(copy), *measured]) == 0
    assert copy.read_text() == PAGE.read_text()
    found = plan_tables.tables(json.loads(COMMITTED.read_text()))
    assert list(found) == list(plan_tables.TABLES)
    assert all(text in PAGE.read_text() for text in found.values())


def test_committed_records_cover_what_the_page_promises() -> None:
    records: list[dict[str, Any]] = json.loads(COMMITTED.read_text())
    assert all(tuple(item)[: len(KEYS)] == KEYS for item in records)
    planning = [item for item in records if item["name"] == "planning"]
    assert {item["world"] for item in planning} == set(plan_cases.WORLDS)
    assert {item["family"] for item in planning} == set(plan_cases.FAMILIES)
    assert max(item["seconds_median"] for item in planning) < 0.1
    traffic = [item for item in records if item["name"] == "traffic"]
    assert {item["layout"] for item in traffic} >= {"tp8dp64-tp8cp4dp16", "tp8-tp8"}
    assert {item["method"] for item in traffic} == {"replicated-modelled", "sharded-modelled"}
    assert {item["name"] for item in records if item["name"].startswith("set-up of")} == {
        "set-up of BridgeCommunicator",
        "set-up of MultiModulePipelineCommunicator",
    }


def test_the_records_that_all_benchmarks_write_are_those_of_the_details() -> None:
    common = [Record(**{key: item[key] for key in KEYS}) for item in json.loads(COMMITTED.read_text())]
    assert read_json(COMMITTED.with_name("plan.json")) == common


def test_planning_of_a_small_world_is_measured() -> None:
    records = list(plan_cases.planning([8], repeats=1))
    assert [item["family"] for item in records] == ["equal lanes", "fan-in to CP lanes", "fan-out", "ragged rows"]
    equal = records[0]
    assert (equal["layout"], equal["ranks"], equal["bytes"]) == ("tp4-tp4", 8, 4096 * 8192 * 2)
    # A receiver: eight chunks in, eight to and from each of three replicas.
    assert equal["messages"] == 8 + 8 * 3 + 8 * 3
    assert 0 < equal["seconds_lo"] <= equal["seconds_median"] <= equal["seconds_hi"]
    assert equal["ratio_median"] is None is equal["efficiency"]


def test_a_layout_of_a_world_has_its_ranks() -> None:
    for name, make in plan_cases.FAMILIES.items():
        for world in (12, 64, 512):
            edge = make(world // 2)
            assert world * 0.75 <= edge.source.size + edge.destination.size <= world, name


def test_traffic_is_that_of_the_plan() -> None:
    by_case = {(item["layout"], item["method"]): item for item in plan_cases.traffic(Links())}
    assert len(by_case) == 2 * len(plan_cases.TRAFFIC)
    case = by_case["tp8-tp8", "sharded-modelled"]
    lane = 4096 * 8192 * 2
    assert case["forward"]["bytes"] == {"nic": lane, "host": 0, "stays": 0}
    assert case["forward"]["busiest_rank_bytes"]["nic_out"] == lane // 8
    assert case["leader_forward"]["busiest_rank_bytes"]["nic_out"] == lane + 16
    ours, leader = (
        sum(case[f"{prefix}{way}"]["seconds"] for way in ("forward", "backward")) for prefix in ("", "leader_")
    )
    assert case["ratio_median"] == leader / ours
    assert case["ratio_lo"] <= case["ratio_median"] <= case["ratio_hi"]


def test_parts_that_are_not_measured_again_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "plan.json"
    before = json.loads(COMMITTED.read_text())
    copy.write_text(json.dumps([item for item in before if item["name"] != "traffic"]))
    common = tmp_path / "common.json"
    assert bench_plan.main(["--only", "traffic", "--details", str(copy), "--json", str(common)]) == 0
    after = json.loads(copy.read_text())
    assert json.loads(common.read_text()) == [{key: item[key] for key in KEYS} for item in after]
    assert [item["name"] for item in after] == [item["name"] for item in before]
    assert [item for item in after if item["name"] != "traffic"] == [i for i in before if i["name"] != "traffic"]
    assert "leader + broadcast" in capsys.readouterr().out


def measured_record(name: str, layout: str, num_bytes: int, method: str) -> Record:
    return Record(name, layout, num_bytes, method, 4.56, 4.5, 4.75, 0.9, 5, 0.125)


def test_the_model_is_compared_with_what_was_measured(tmp_path: Path) -> None:
    file, page = tmp_path / "bridge.json", tmp_path / "scale.md"
    shutil.copy(PAGE, page)
    cases = [("transfer", "tp4-tp4", 16 << 20, "replicated"), ("steady-1f1b", "tp4-tp4", 8 << 20, "sharded")]
    write_records([measured_record(*case) for case in cases], file)
    arguments = ["--from", str(COMMITTED), "--tables", str(page), "--measured", str(file)]
    assert bench_plan.main(arguments) == 0
    row = "| transfer `tp4-tp4`, 16 MiB, replicated | 4.56x (4.50 .. 4.75) | 4.86x | 12% |"
    assert row in page.read_text()
    assert "steady-1f1b" not in page.read_text()  # both directions at once are not modelled


def test_the_model_of_the_emulated_cluster_by_hand() -> None:
    # 16 MiB at 25 MB/s and 180 MB/s: the leader's card, then two steps of a tree; ours a quarter, then an eighth of
    # the copies of three quarters.
    size = 16 << 20
    leader = size / 25e6 + 2 * size / 180e6
    sides = Side(tp=4), Side(tp=4)
    case = Case("transfer", *sides, size, ("replicated",))
    ours = size / 4 / 25e6 + 3 * size / 4 / 180e6 / 8
    shapes = (1 + 2 * 25 / 180) * 24 / 25e6
    assert plan_check.modelled_ratio(case, "replicated") == pytest.approx((leader + shapes) / ours)
    assert plan_check.modelled_ratio(case, "sharded") == pytest.approx((leader + shapes) / (size / 4 / 25e6))
    # Inside one host nothing but the in-host links counts: transfers and copies share those of the receivers.
    case = Case("one-host", *sides, size, ("replicated",))
    assert plan_check.modelled_ratio(case, "replicated") == pytest.approx((3 * size + 3 * 24) / size)
    # Modules of unequal size each have a host of their own.
    edge, links = plan_check.edge_of(Case("transfer", Side(dp=2), Side(tp=4), size, ("replicated",)), "replicated")
    assert [links.host_of(rank) for rank in (*edge.source.ranks, *edge.destination.ranks)] == [0, 0, 1, 1, 1, 1]


def test_a_page_without_a_place_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    assert bench_plan.main(["--from", str(COMMITTED), "--tables", str(page)]) == 1
    assert "page.md: there is no place '<!-- table: planning -->'" in capsys.readouterr().err
