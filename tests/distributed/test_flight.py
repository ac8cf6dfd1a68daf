"""The flight recorder on real ranks: what it says of operations that ended, failed or hang."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch

import mimo_ext
from mimo_ext import Layout
from mimo_ext.flight import dump_on_signal, snapshot, table
from mimo_ext.planning.command import main


def make(timeout: float = 30.0, **options: Any) -> mimo_ext.Bridge:
    images, language = Layout([0], name="images"), Layout([1, 2], tp=2, name="language")
    return mimo_ext.Bridge(images, language, ndim=2, path="direct", timeout=timedelta(seconds=timeout), **options)


X = torch.arange(64 * 8, dtype=torch.float32).reshape(64, 8)
BYTES = X.numel() * X.element_size()


def recorded(rank: int, world_size: int, static: bool) -> list[dict[str, Any]]:
    bridge = make(shape=tuple(X.shape) if static else None)
    began = time.monotonic_ns()
    for _ in range(2):
        if rank == 0:
            bridge.send_forward(X)
            bridge.recv_backward()
        else:
            bridge.send_backward(bridge.recv_forward().detach())
    bridge.close()
    ended = time.monotonic_ns()
    found = bridge.flight()
    assert found["caller"] is None
    for entry in found["entries"]:
        assert began < entry["posted_ns"] <= entry["since_ns"] < ended
    return found["entries"]


@pytest.mark.parametrize("static", [False, True])
def test_operations_that_ended_are_told_in_order(static: bool) -> None:
    source, first, second = launch(recorded, 3, static)
    told = [(entry["id"], entry["operation"], entry["microbatch"]) for entry in source]
    assert told == [(1, "send_forward", 0), (2, "recv_backward", 0), (3, "send_forward", 1), (4, "recv_backward", 1)]
    told = [(entry["id"], entry["operation"], entry["microbatch"]) for entry in second]
    assert told == [(1, "recv_forward", 0), (2, "send_backward", 0), (3, "recv_forward", 1), (4, "send_backward", 1)]
    for entry in source + first + second:
        assert (entry["state"], entry["waits_for"], entry["peer"]) == ("done", None, None)
    assert [entry["bytes"] for entry in first if entry["operation"] == "recv_forward"] == [BYTES, BYTES]
    gradients = [sum(e["bytes"] for e in side if e["operation"] == "send_backward") for side in (first, second)]
    assert sum(gradients) == 2 * BYTES  # each part of the gradient from one of the replicas


def failing(rank: int, world_size: int, folder: str | None) -> tuple[str, list[str], dict[str, Any]]:
    if folder:
        os.environ["MIMO_EXT_FLIGHT_DIR"] = folder
    else:
        os.environ.pop("MIMO_EXT_FLIGHT_DIR", None)
    bridge = make(timeout=1.0)
    if rank == 0:
        bridge.send_forward(X)
    else:
        bridge.recv_forward()
    # A timeout, or the news that a peer whose timeout was first has hung up.
    with pytest.raises(mimo_ext.BridgeError) as caught:
        bridge.recv_backward() if rank == 0 else bridge.recv_forward()
    with pytest.raises(type(caught.value)) as again:
        bridge.recv_backward() if rank == 0 else bridge.recv_forward()
    assert again.value.__notes__ == caught.value.__notes__
    bridge.close(abort=True)
    with pytest.raises(mimo_ext.BridgeError, match="the bridge is closed") as closed:
        bridge.recv_forward()
    assert not hasattr(closed.value, "__notes__")
    return str(caught.value), caught.value.__notes__, bridge.flight()


def test_an_error_carries_the_last_operations() -> None:
    for rank, (message, notes, found) in enumerate(launch(failing, 3, None)):
        assert "flight" not in message  # what it says stays short
        (note,) = notes
        lines = note.splitlines()
        assert f"flight recorder, rank {rank}: the last operations of bridge 'images -> language'" in lines[0]
        assert lines[1].split() == ["posted", "at", "operation", "microbatch", "payload", "state"]
        last = "recv_backward" if rank == 0 else "recv_forward"
        assert [line.split()[1:3] for line in lines[2:]][-1] == [last, "0" if rank == 0 else "1"]
        assert "waiting for header from rank" in lines[-1]
        entry = found["entries"][-1]
        assert (entry["operation"], entry["state"], entry["waits_for"]) == (last, "failed", "header from")
        assert 0.9e9 < entry["since_ns"] - entry["posted_ns"] < 3e9


def test_an_error_writes_a_file_where_there_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new folder"
    for rank, (message, notes, _) in enumerate(launch(failing, 3, str(folder))):
        path = folder / f"rank_{rank}.json"
        assert notes == [f"flight recorder: {path}; `python -m mimo_ext flight {folder}` merges all ranks"]
        found = json.loads(path.read_text())
        assert (found["rank"], found["world_size"], found["reason"]) == (rank, 3, message)
        (bridge,) = found["bridges"]
        assert (bridge["name"], bridge["source"], bridge["destination"]) == ("images -> language", [[0]], [[1, 2]])
        assert (bridge["timeout_s"], bridge["closed"]) == (1.0, False)
        assert bridge["entries"][-1]["state"] == "failed"
        assert any(line.endswith(" in failing") for line in found["stack"])
    assert not list(folder.glob("*.tmp"))


def stuck(rank: int, world_size: int, folder: str, wakeup_taken: bool) -> None:
    bridge = make()
    if wakeup_taken:
        unused, taken = os.pipe()
        os.set_blocking(taken, False)
        signal.set_wakeup_fd(taken)
    files = [Path(folder) / f"rank_{other}.json" for other in range(world_size)]
    with dump_on_signal(signal.SIGUSR2, folder):
        dist.barrier()
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR2))
        timer.start()
        if rank == 0:
            # Its peers wait for it: here, and in the collective of rank 2.
            deadline = time.monotonic() + 10
            while not all(file.exists() for file in (files if not wakeup_taken else files[:2])):
                assert time.monotonic() < deadline, "a rank that hangs did not dump"
                time.sleep(0.02)
            bridge.send_forward(X)
        elif rank == 1 or wakeup_taken:
            assert torch.equal(bridge.recv_forward().detach(), X)  # a signal harms nothing
        dist.barrier()
        timer.join()
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    assert wakeup_taken or signal.set_wakeup_fd(-1) == -1
    if wakeup_taken:
        signal.set_wakeup_fd(-1)
        os.close(unused)
        os.close(taken)
    assert not any(thread.name == "mimo-flight" for thread in threading.enumerate())
    bridge.close(abort=True)


def test_a_rank_that_hangs_dumps_when_a_signal_comes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch(stuck, 3, str(tmp_path), False)
    computing, receiving, collective = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(3))
    assert {computing["reason"], receiving["reason"], collective["reason"]} == {"SIGUSR2"}
    (bridge,) = receiving["bridges"]
    assert bridge["caller"]["operation"] == "recv_forward"
    assert bridge["caller"]["microbatch"] == 0
    (entry,) = bridge["entries"]
    assert (entry["state"], entry["waits_for"], entry["peer"]) == ("header", "header from", 0)
    assert "header from rank 0" in table(receiving)
    assert "the program is in recv_forward of microbatch 0, for 0." in table(receiving)
    # A program that is stuck in C++ outside of any bridge shows where.
    assert any("barrier" in line for line in collective["stack"])
    assert collective["bridges"][0]["caller"] is None
    assert collective["bridges"][0]["entries"] == []
    assert any(line.endswith("in stuck") for line in computing["stack"])
    assert main(["flight", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("rank 1 waits: rank 0 waits for no bridge; it stands at ")
    assert any(line.startswith("rank 2   waits for no bridge; it stands at ") and "barrier" in line for line in lines)


def test_a_blocked_receive_dumps_where_asyncio_has_the_signals(tmp_path: Path) -> None:
    launch(stuck, 3, str(tmp_path), True)
    (bridge,) = json.loads((tmp_path / "rank_1.json").read_text())["bridges"]
    assert bridge["caller"]["operation"] == "recv_forward"


def full(rank: int, world_size: int) -> dict[str, Any] | None:
    bridge = make(max_in_flight=2)
    found: dict[str, Any] = {}
    if rank == 0:
        # The third send waits for room: both lanes' ranks are late.
        timer = threading.Timer(0.5, lambda: found.update(snapshot("test")))
        timer.start()
        for _ in range(3):
            bridge.send_forward(X)
        timer.join()
    else:
        time.sleep(1)
        for _ in range(3):
            bridge.recv_forward()
    dist.barrier()
    bridge.close(abort=True)
    return found["bridges"][0] if rank == 0 else None


def test_a_send_that_waits_for_room_says_so() -> None:
    bridge = launch(full, 3)[0]
    assert (bridge["caller"]["operation"], bridge["caller"]["microbatch"]) == ("send_forward", None)
    first = bridge["entries"][0]
    assert (first["operation"], first["state"], first["waits_for"]) == ("send_forward", "sending", "message to")
    assert first["peer"] in (1, 2)
