"""How much of the machine other work has used, while something was measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BUSY_LIMIT = 0.25


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
