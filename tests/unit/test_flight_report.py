"""`python -m mimo_ext flight`: which rank waits for which, from what the ranks wrote."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mimo_ext._flight_report import Flight, report
from mimo_ext.flight import table
from mimo_ext.planning.command import main

SECOND = 10**9
NOW = 1000 * SECOND


def entry(number: int, operation: str, microbatch: int, state: str = "done", waits: str | None = None, **more: Any):
    """`waits`: such as "header from 3"."""
    words, _, peer = (waits or "").rpartition(" ")
    return {
        "id": number,
        "operation": operation,
        "microbatch": microbatch,
        "bytes": 2048,
        "state": state,
        "waits_for": words or None,
        "peer": int(peer) if waits else None,
        "posted_ns": NOW - 20 * SECOND,
        "since_ns": NOW - 12 * SECOND,
        **more,
    }


def bridge(name: str, entries: list[dict[str, Any]], caller: tuple[str, int | None] | None = None, **more: Any):
    blocked = caller and {"operation": caller[0], "microbatch": caller[1], "since_ns": NOW - 12 * SECOND}
    return {
        "name": name,
        "digest": "00ff",
        "serial": 0,
        "source": [[0]],
        "destination": [[1, 2]],
        "timeout_s": 60.0,
        "closed": False,
        "entries": entries,
        "caller": blocked,
        **more,
    }


def dumped(rank: int, *bridges: dict[str, Any], at: str = "train.py:7 in forward_step", ahead_s: float = 0.0):
    """A dump of a rank whose monotonic clock began `ahead_s` before the others'."""
    return {
        "version": 1,
        "rank": rank,
        "world_size": 3,
        "host": "node",
        "pid": 100 + rank,
        "reason": "SIGUSR1",
        "monotonic_ns": NOW,
        "time_ns": 1_700_000_000 * SECOND + int(ahead_s * SECOND),
        "stack": ["train.py:1 in <module>", at],
        "bridges": list(bridges),
    }


AB = "images -> language"


def waits_header(rank: int, microbatch: int = 1) -> dict[str, Any]:
    done = [entry(1, "recv_forward", 0)] if microbatch else []
    return dumped(
        rank,
        bridge(
            AB,
            [*done, entry(2, "recv_forward", microbatch, "header", "header from 0")],
            ("recv_forward", microbatch),
        ),
    )


def verdicts(*dumps: dict[str, Any]) -> dict[int, str]:
    return {rank: chain.verdict for rank, chain in Flight(dumps).waiting().items()}


def test_the_rank_that_computes_is_found() -> None:
    source = dumped(0, bridge(AB, [entry(1, "send_forward", 0)]))
    flight = Flight([waits_header(1), source, waits_header(2)])
    chains = flight.waiting()
    assert sorted(chains) == [1, 2]
    assert (chains[1].root, chains[1].verdict) == (
        0,
        "rank 0 waits for no bridge; it stands at train.py:7 in forward_step",
    )
    assert [(step.rank, step.text) for step in chains[1].steps] == [
        (1, f"in recv_forward of microbatch 1, for 12.0 s, bridge '{AB}', waiting for header from rank 0"),
        (0, f"has not called send_forward of microbatch 1, bridge '{AB}'; its last is of microbatch 0"),
    ]
    assert report(flight).splitlines()[-1] == f"ranks 1, 2 wait: {chains[1].verdict}"


def test_a_lane_copy_is_followed_through_the_peers_own_receive() -> None:
    waits_lane = dumped(
        2,
        bridge(AB, [entry(1, "recv_forward", 0, "receiving", "lane copy from 1")], ("recv_forward", 0)),
    )
    chain = Flight([dumped(0, bridge(AB, [])), waits_header(1, 0), waits_lane]).waiting()[2]
    assert [step.rank for step in chain.steps] == [2, 1, 0]
    assert chain.steps[1].text == f"in recv_forward of microbatch 0, bridge '{AB}', waiting for header from rank 0"
    assert chain.steps[2].text.endswith("it has called none")
    assert chain.root == 0


def test_a_cycle_is_told_once() -> None:
    """Rank 0 wants a gradient before it sends the next activation; rank 1 wants that activation first."""
    source = dumped(
        0,
        bridge(
            AB,
            [entry(1, "send_forward", 0), entry(2, "recv_backward", 0, "header", "header from 1")],
            ("recv_backward", 0),
        ),
    )
    flight = Flight([source, waits_header(1)])
    chains = flight.waiting()
    assert (chains[0].cycle, chains[1].cycle) == ([0, 1, 0], [1, 0, 1])
    assert chains[0].root is None
    assert report(flight).splitlines()[-1] == "ranks 0, 1 wait: ranks 0, 1 wait for each other, in a cycle"


def test_a_rank_that_waits_for_a_cycle_is_no_part_of_it() -> None:
    source = dumped(
        0,
        bridge(AB, [entry(2, "recv_backward", 0, "header", "header from 1")], ("recv_backward", 0)),
    )
    chains = Flight([source, waits_header(1), waits_header(2)]).waiting()
    assert chains[2].cycle == [0, 1, 0]


def test_a_rank_without_a_file_is_named() -> None:
    flight = Flight([waits_header(1), waits_header(2)])
    assert flight.missing == [0]
    assert verdicts(waits_header(1)) == {1: "no dump of rank 0: it is dead, or was not asked"}
    assert "no dump of rank 0" in report(flight).splitlines()[0]


def test_a_message_that_both_sides_work_on_is_the_links_fault() -> None:
    source = dumped(0, bridge(AB, [entry(1, "send_forward", 1, "sending", "message to 2")]))
    expected = "ranks 0 and 1 both did their part: the message is on its way, or the link between them is down"
    assert verdicts(source, waits_header(1)) == {1: expected}


def test_a_send_without_room_waits_for_its_oldest_receiver() -> None:
    source = dumped(
        0,
        bridge(
            AB,
            [
                entry(1, "send_forward", 0),
                entry(2, "send_forward", 1, "sending", "message to 2"),
                entry(3, "send_forward", 2, "posted"),
            ],
            ("send_forward", None),
        ),
    )
    receiver = dumped(2, bridge(AB, [entry(1, "recv_forward", 0)]))
    chain = Flight([source, receiver]).waiting()[0]
    assert chain.root == 2
    assert "as many microbatches as may be in flight are" in chain.steps[0].text
    assert "waiting for message to rank 2" in chain.steps[0].text
    assert chain.steps[1].text.startswith("has not called recv_forward of microbatch 1")


def test_close_waits_for_what_has_not_ended() -> None:
    source = dumped(0, bridge(AB, [entry(1, "send_forward", 0, "sending", "message to 1")], ("close", None)))
    assert verdicts(source, dumped(1, bridge(AB, []))) == {
        0: "rank 1 waits for no bridge; it stands at train.py:7 in forward_step"
    }


def test_a_receive_posted_ahead_waits_for_the_one_before_it() -> None:
    receiver = dumped(
        1,
        bridge(
            AB,
            [entry(1, "recv_forward", 0, "header", "header from 0"), entry(2, "recv_forward", 1, "posted")],
            ("recv_forward", 1),
        ),
    )
    chain = Flight([dumped(0, bridge(AB, [])), receiver]).waiting()[1]
    assert [step.rank for step in chain.steps] == [1, 1, 0]
    assert chain.steps[1].text == "first recv_forward of microbatch 0, waiting for header from rank 0"
    assert chain.root == 0


def test_ranks_that_gave_up_lead_to_the_one_that_never_came() -> None:
    gave_up = dumped(1, bridge(AB, [entry(1, "recv_forward", 0, "failed", "header from 0")]))
    heard = dumped(2, bridge(AB, [entry(1, "recv_forward", 0, "failed", "lane copy from 1")]))
    chains = Flight([gave_up, heard]).waiting()
    assert chains[1].steps[0].text == (
        f"gave up recv_forward of microbatch 0 after 8.000 s, bridge '{AB}', waiting for header from rank 0"
    )
    assert [step.rank for step in chains[2].steps] == [2, 1]
    assert {chains[1].verdict, chains[2].verdict} == {"no dump of rank 0: it is dead, or was not asked"}


def test_a_rank_that_came_too_late_is_told_across_clocks() -> None:
    gave_up = dumped(1, bridge(AB, [entry(1, "recv_forward", 0, "failed", "header from 0")]))
    # On its own clock it called 20 s before its dump; that dump was made 10.5 s after the other.
    late = dumped(0, bridge(AB, [entry(1, "send_forward", 0)]), ahead_s=10.5)
    assert verdicts(gave_up, late) == {
        1: "rank 0 called send_forward of microbatch 0 2.500 s after rank 1 had given up"
    }
    in_time = dumped(0, bridge(AB, [entry(1, "send_forward", 0)]), ahead_s=7.5)
    assert "both did their part" in verdicts(gave_up, in_time)[1]


def test_a_rank_on_both_sides_may_wait_for_itself() -> None:
    alone = dumped(
        0, bridge(AB, [entry(1, "recv_forward", 0, "receiving", "a send of this rank itself 0")], ("recv_forward", 0))
    )
    assert verdicts(alone) == {0: "rank 0 is on both sides and has not called send_forward"}


def test_bridges_of_one_name_are_told_apart() -> None:
    other = bridge(AB, [entry(1, "send_forward", 1)], serial=1)
    chains = Flight([dumped(0, bridge(AB, []), other), waits_header(1)]).waiting()
    assert chains[1].steps[1].text.startswith("has not called send_forward of microbatch 1")


def test_a_table_shows_wall_clock_states_and_waits() -> None:
    lines = table(waits_header(1), last=1).splitlines()
    assert lines[0] == "rank 1 of 3, node, pid 101: SIGUSR1"
    assert lines[1] == f"bridge '{AB}': [0] -> [1, 2]"
    assert lines[2] == "  the program is in recv_forward of microbatch 1, for 12.0 s"
    (line,) = [line for line in lines if ":" in line and "recv_forward" in line]  # the last operation alone
    assert re.sub(" +", " ", line[14:]).strip() == "recv_forward 1 2.0 KiB header header from rank 0, 12.0 s so far"
    assert lines[-1] == "  train.py:7 in forward_step"


def write(folder: Path, *dumps: dict[str, Any]) -> None:
    for found in dumps:
        (folder / f"rank_{found['rank']}.json").write_text(json.dumps(found))


def test_the_command_reads_folders_and_tells_by_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    idle = [dumped(rank, bridge(AB, [entry(1, "send_forward" if rank == 0 else "recv_forward", 0)])) for rank in (0, 1)]
    write(tmp_path, *idle)
    assert main(["flight", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("No rank waits for another.\n")
    write(tmp_path, waits_header(1))
    assert main(["flight", str(tmp_path / "rank_1.json"), str(tmp_path), "--tables"]) == 1
    text = capsys.readouterr().out
    assert text.count("the program is in recv_forward") == 1
    assert text.splitlines()[-1].startswith("rank 1 waits: rank 0 waits for no bridge")
    assert main(["flight", str(tmp_path), "--json"]) == 1
    (waiting,) = json.loads(capsys.readouterr().out)["waiting"]
    assert (waiting["rank"], waiting["root"], waiting["cycle"]) == (1, 0, [])


def test_the_command_refuses_what_is_no_dump(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "empty folder": "expected files rank_*.json in the folder",
        "torn.json": "expected JSON",
        "other.json": "expected a dump of the flight recorder",
        "old.json": "expected version 1 of the flight recorder, got 0",
        "absent.json": "No such file",
    }
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "torn.json").write_text('{"rank": 1')
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "old.json").write_text(json.dumps({**waits_header(1), "version": 0}))
    for name, message in cases.items():
        assert main(["flight", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    write(tmp_path, waits_header(1))
    copy = tmp_path / "copy.json"
    copy.write_text((tmp_path / "rank_1.json").read_text())
    assert main(["flight", str(tmp_path / "rank_1.json"), str(copy)]) == 2
    assert "expected one file per rank, got two of rank 1" in capsys.readouterr().err


def test_the_command_stands_in_the_help_of_the_package() -> None:
    run = subprocess.run([sys.executable, "-P", "-m", "mimo_ext", "--help"], capture_output=True, text=True, check=True)
    assert "which rank waits for which" in run.stdout
