"""How much of the machine other work has used, while something was measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

BUSY_LIMIT = 0.25
ATTEMPTS = 4

T = TypeVar("T")


class MachineBusy(RuntimeError):
    """Other work kept the machine too busy to measure anything."""


@dataclass(frozen=True)
class Usage:
    """Seconds of processor time: of the whole machine (`total` with idle time), or of some processes."""

    user: float
    system: float
    stolen: float = 0.0
    total: float = 0.0

    def __sub__(self, other: Usage) -> Usage:
        return Usage(
            self.user - other.user,
            self.system - other.system,
            self.stolen - other.stolen,
            self.total - other.total,
        )


def machine_usage(text: str | None = None) -> Usage:
    """Since the machine was started; `text` in place of /proc/stat."""
    line = (Path("/proc/stat").read_text() if text is None else text).splitlines()[0].split()
    if line[0] != "cpu":
        raise ValueError(f"/proc/stat: expected a line that begins with 'cpu', got {line[0]!r}")
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, idle, waiting, interrupts, soft, stolen = (int(field) / tick for field in line[1:9])
    return Usage(user + nice, system, stolen, user + nice + system + idle + waiting + interrupts + soft + stolen)


def process_usage() -> Usage:
    """Of this process, all its threads together."""
    times = os.times()
    return Usage(times.user, times.system)


def other_share(machine: Usage, ours: Sequence[Usage]) -> float:
    """Share of the machine, 0 to 1, that others have used, between two readings.

    Time in software interrupts is left out: it is the emulated network's own, and the kernel books it to whatever runs
    at the time. (What of it is booked to our processes is taken off the system time; so this errs to the low side for
    other work inside the kernel, never for other programs' own time.)

    Args:
        machine: difference of two `machine_usage`.
        ours: differences of `process_usage` of every process of the measurement.
    """
    if machine.total <= 0:
        return 0.0
    user = max(0.0, machine.user - sum(usage.user for usage in ours))
    system = max(0.0, machine.system - sum(usage.system for usage in ours))
    return min(1.0, (user + system + machine.stolen) / machine.total)


def _nothing(_: object) -> Sequence[Usage]:
    return ()


def undisturbed(
    what: str,
    run: Callable[[], T],
    ignore_busy: bool,
    *,
    used: Callable[[T], Sequence[Usage]] = _nothing,
    pause_s: float = 0.0,
) -> tuple[T, float]:
    """What `run` has measured, and the share of the machine, 0 to 1, that other work used; again, where that was much.

    Args:
        what: is measured, for the message.
        run: measures it.
        ignore_busy: take what comes first.
        used: tells from what was measured what other processes of ours have used meanwhile.
        pause_s: before it runs again; longer every time. What disturbs may end soon.

    Raises:
        MachineBusy: other work disturbed it `ATTEMPTS` times.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(pause_s * attempt)
        machine, mine = machine_usage(), process_usage()
        measured = run()
        busy = other_share(machine_usage() - machine, [process_usage() - mine, *used(measured)])
        if ignore_busy or busy <= BUSY_LIMIT:
            return measured, busy
    raise MachineBusy(
        f"{what}: other work used {busy:.0%} of the machine, expected at most {BUSY_LIMIT:.0%} ({ATTEMPTS} attempts)"
    )
