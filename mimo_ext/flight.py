"""The flight recorder: the last operations of every bridge of this process, for whoever asks why nothing happens.

It is always on. With the folder of `MIMO_EXT_FLIGHT_DIR` an error of a bridge writes `rank_N.json` there, with all
bridges of the rank; without one the error carries a note, a short table. `dump_on_signal()` does the same for a rank
that hangs. `python -m mimo_ext flight FOLDER` merges the files and says which rank waits for which.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from ._extension import _C
    from .bridge import Bridge

__all__ = ["dump", "dump_on_signal", "snapshot", "table"]

VERSION = 1
FOLDER = "MIMO_EXT_FLIGHT_DIR"
IN_NOTES = 5  # operations in the note of an error
STACK_DEPTH = 30

_logger = logging.getLogger(__name__)
_bridges: weakref.WeakSet[Bridge] = weakref.WeakSet()


def watch(bridge: Bridge, digest: int) -> None:
    """A bridge that dumps will tell of. `digest` is equal on all ranks."""
    # Bridges of one name are told apart by the order in which they were made, which all ranks share.
    same = [other._flight["serial"] for other in list(_bridges) if other.name == bridge.name and not other.closed]
    bridge._flight = {"digest": f"{digest:016x}", "serial": max(same, default=-1) + 1}
    _bridges.add(bridge)


def snapshot(reason: str = "") -> dict[str, Any]:
    """What this process's bridges did last: what `dump` writes.

    A dict of `rank`, `world_size`, `host`, `pid`, `reason`, `stack` (where the main thread stands, outermost first),
    `monotonic_ns` and `time_ns` (the same moment on the clock of all other times and on the wall clock) and `bridges`,
    each a dict of `name`, `digest` and `serial` (the same on all ranks), `source` and `destination` (ranks of their
    lanes), `timeout_s`, `closed`, and `entries` and `caller` as of `Bridge.flight`.
    """
    bridges = sorted(_bridges, key=lambda bridge: (bridge.name, bridge._flight["serial"]))
    rank = dist.get_rank() if dist.is_initialized() else bridges[0].rank if bridges else int(os.environ.get("RANK", 0))
    return {
        "version": VERSION,
        "rank": rank,
        "world_size": dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 0)),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "reason": reason,
        "monotonic_ns": time.monotonic_ns(),
        "time_ns": time.time_ns(),
        "stack": _main_stack(),
        "bridges": [_bridge_dict(bridge) for bridge in bridges],
    }


def _bridge_dict(bridge: Bridge) -> dict[str, Any]:
    return {
        "name": bridge.name,
        **bridge._flight,
        "source": [list(lane) for lane in bridge._source.lanes],
        "destination": [list(lane) for lane in bridge._destination.lanes],
        "timeout_s": bridge._options["timeout"].total_seconds(),
        "closed": bridge.closed,
        **bridge.flight(),
    }


def _main_stack() -> list[str]:
    """Where the main thread stands, outermost first, without what is asking."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines = [
        f"{line.filename}:{line.lineno} in {line.name}"
        for line in traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)
        if line.filename not in (__file__, contextlib.__file__)
    ]
    return lines[:STACK_DEPTH][::-1]


def dump(folder: str | os.PathLike[str] | None = None, reason: str = "") -> Path | None:
    """Write `rank_N.json` to `folder` (default: that of `MIMO_EXT_FLIGHT_DIR`), replacing an earlier one.

    Returns the file. Without a folder the tables go to stderr, and None is returned.

    Raises:
        OSError: the folder cannot be made or written.
    """
    found = snapshot(reason)
    folder = folder or os.environ.get(FOLDER)
    if not folder:
        print(table(found), file=sys.stderr, flush=True)
        return None
    path = Path(folder) / f"rank_{found['rank']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # In one step: a reader may come at any time, and the process may be killed.
    partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    partial.write_text(json.dumps(found, indent=1))
    partial.replace(path)
    return path


def explain(communicator: _C.Communicator, error: BaseException) -> None:
    """Called with each error of a failed transfer before it is raised: adds the note, writes the file. Never raises."""
    try:
        bridge = next((bridge for bridge in list(_bridges) if bridge._communicator is communicator), None)
        if bridge is None:  # only a handle has outlived it
            return
        if bridge._flight_note is None:
            bridge._flight_note = _note(bridge, str(error))
        error.add_note(bridge._flight_note)
    except Exception:
        _logger.warning("the flight recorder could not be read", exc_info=True)


def _note(bridge: Bridge, error: str) -> str:
    if os.environ.get(FOLDER):
        try:
            path = dump(reason=error)
        except OSError as reason:
            return f"flight recorder: {FOLDER} cannot be written: {reason}\n{_short_table(bridge)}"
        return f"flight recorder: {path}; `python -m mimo_ext flight {path.parent}` merges all ranks" if path else ""
    return _short_table(bridge)


def _short_table(bridge: Bridge) -> str:
    now = time.monotonic_ns()
    lines = entry_lines(bridge.flight()["entries"][-IN_NOTES:], now, time.time_ns() - now)
    head = f"flight recorder, rank {bridge.rank}: the last operations of bridge '{bridge.name}' ({FOLDER}: more)"
    return "\n".join([head, *(f"  {line}" for line in lines)])


class _Watcher:
    """Dumps when a signal comes, from a thread of its own: the main thread may stand in a collective, in C++."""

    def __init__(self, number: int, folder: str | os.PathLike[str] | None) -> None:
        self._folder = folder
        self._number = number
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._run, name="mimo-flight", daemon=True)
        self._thread.start()

    def start(self) -> bool:
        """False where the process has another use for its wakeup descriptor (asyncio): the handler must do it."""
        before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if before == -1:
            return True
        signal.set_wakeup_fd(before)
        return False

    def _run(self) -> None:
        while numbers := os.read(self._read, 64):
            if 0 in numbers:
                return
            if self._number in numbers:
                _dump_for(self._number, self._folder)

    def stop(self, started: bool) -> None:
        if started:
            signal.set_wakeup_fd(-1)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)


def _dump_for(number: int, folder: str | os.PathLike[str] | None) -> None:
    try:
        path = dump(folder, reason=signal.Signals(number).name)
    except OSError as error:
        print(f"mimo_ext: the flight recorder could not be written: {error}", file=sys.stderr, flush=True)
        return
    if path is not None:
        print(f"mimo_ext: flight recorder: {path}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def dump_on_signal(number: int = signal.SIGUSR1, folder: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """While the block runs, `kill -USR1 PID` makes this process `dump` what its bridges are doing.

    It comes also from a rank that is stuck: in a bridge, in a collective, or anywhere else that lets Python's other
    threads run. Where the program has set a wakeup descriptor for signals (asyncio does), the handler itself dumps, as
    soon as the main thread is in Python or waits for a bridge.

    Args:
        number: the signal.
        folder: as of `dump`.

    Raises:
        ValueError: not called from the main thread.
    """
    watcher: _Watcher | None = None
    started = False

    def handler(_: int, __: FrameType | None) -> None:
        if not started:
            _dump_for(number, folder)

    before = signal.signal(number, handler)
    try:
        watcher = _Watcher(number, folder)
        started = watcher.start()
        yield
    finally:
        if watcher is not None:
            watcher.stop(started)
        signal.signal(number, before)


# Tables


def table(found: dict[str, Any], last: int | None = None) -> str:
    """A snapshot as text: one table per bridge, with its `last` operations (default: all that are kept)."""
    offset = found["time_ns"] - found["monotonic_ns"]
    reason = f": {found['reason']}" if found["reason"] else ""
    lines = [f"rank {found['rank']} of {found['world_size']}, {found['host']}, pid {found['pid']}{reason}"]
    for bridge in found["bridges"]:
        number = f" (number {bridge['serial'] + 1} of this name)" if bridge["serial"] else ""
        closed = ", closed" if bridge["closed"] else ""
        lines.append(f"bridge '{bridge['name']}'{number}{closed}: {lanes_text(bridge)}")
        if bridge["caller"]:
            lines.append(f"  the program is in {caller_text(bridge['caller'], found['monotonic_ns'])}")
        entries = bridge["entries"] if last is None else bridge["entries"][-last:] if last else []
        lines += [f"  {line}" for line in entry_lines(entries, found["monotonic_ns"], offset)]
    if not found["bridges"]:
        lines.append("no bridges")
    lines += ["main thread, innermost last:", *(f"  {line}" for line in found["stack"][-8:])]
    return "\n".join(lines)


def lanes_text(bridge: dict[str, Any]) -> str:
    return " -> ".join(" ".join(str(lane) for lane in bridge[side]) for side in ("source", "destination"))


def caller_text(caller: dict[str, Any], now: int) -> str:
    one = "" if caller["microbatch"] is None else f" of microbatch {caller['microbatch']}"
    room = " (as many microbatches as may be in flight are)" if one == "" and caller["operation"] != "close" else ""
    return f"{caller['operation']}{one}{room}, for {seconds(now - caller['since_ns'])}"


def entry_lines(entries: list[dict[str, Any]], now: int, offset: int) -> list[str]:
    """One line per operation. `now` of the monotonic clock; `offset` to the wall clock."""
    from .planning.report import bytes_text  # what a program does not need until something goes wrong

    rows = [("posted at", "operation", "microbatch", "payload", "state", "")]
    for entry in entries:
        waits = f"{entry['waits_for']} rank {entry['peer']}" if entry["waits_for"] else ""
        took = seconds((now if entry["state"] not in ("done", "failed") else entry["since_ns"]) - entry["posted_ns"])
        what = {"done": f"in {took}", "failed": f"after {took}{waits and ', waiting for '}{waits}"}.get(entry["state"])
        if what is None:
            what = f"{waits or 'nobody waits yet'}, {seconds(now - entry['since_ns'])} so far"
        rows.append(
            (
                wall_text(entry["posted_ns"] + offset),
                entry["operation"],
                str(entry["microbatch"]),
                bytes_text(entry["bytes"]) if entry["bytes"] else "-",
                entry["state"],
                what,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(w) if column in (2, 3) else cell.ljust(w) for column, (cell, w) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def wall_text(time_ns: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time_ns // 10**9)) + f".{time_ns // 10**6 % 1000:03d}"


def seconds(duration_ns: int) -> str:
    value = duration_ns / 1e9
    return f"{value:.1f} s" if value >= 10 else f"{value:.3f} s" if value >= 0.1 else f"{value * 1e3:.3f} ms"
