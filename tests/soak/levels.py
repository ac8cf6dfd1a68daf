"""What a soak measures on each rank after each block, and what that shows."""

from __future__ import annotations

import ctypes
import functools
import os
import statistics
from array import array
from collections.abc import Sequence
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Sample:
    """One rank after one block.

    Attributes:
        third: of the run: 0, 1 (the other layouts), 2.
        seconds: of the block.
        cpu_seconds: of this process in it.
        rss: bytes, resident, after malloc has given back what is free.
        heap: bytes, live in malloc; after a garbage collection.
    """

    third: int
    microbatches: int
    seconds: float
    cpu_seconds: float
    rss: int
    heap: int
    threads: int
    descriptors: int


class Samples:
    """Of one rank so far, in 64 bytes each: what watches must not grow."""

    def __init__(self) -> None:
        self._numbers = array("d")  # holds every whole number that occurs here
        self._fields = len(Sample.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self._numbers) // self._fields

    def append(self, sample: Sample) -> None:
        self._numbers.extend(astuple(sample))

    def all(self) -> list[Sample]:
        found = []
        for index in range(0, len(self._numbers), self._fields):
            third, microbatches, seconds, cpu_seconds, *whole = self._numbers[index : index + self._fields]
            found.append(Sample(int(third), int(microbatches), seconds, cpu_seconds, *map(int, whole)))
        return found


class _Mallinfo(ctypes.Structure):
    """The first fields of glibc's struct mallinfo2, and room for the others."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        ("uordblks", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 2),
    ]


@functools.cache
def _libc() -> ctypes.CDLL:
    """One for all looks: each CDLL makes a Python type, and hundreds of them would be what grows."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo
    return libc


def heap_bytes() -> int:
    """Live in malloc, of all threads."""
    info = _libc().mallinfo2()
    return int(info.uordblks + info.hblkhd)


def resident_bytes() -> int:
    """Without what malloc keeps free for the next blocks, which depends on the sizes that have met."""
    _libc().malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# What it shows


@dataclass(frozen=True)
class Limits:
    """What a soak must keep.

    Attributes:
        memory: growth of resident memory and of the heap, as a fraction.
        rate: loss of throughput from the first to the last tenth, as a fraction; None: not looked at.
        microbatches: at least so many.
    """

    memory: float = 0.01
    rate: float | None = 0.10
    microbatches: int = 10_000


def tenth(samples: Sequence[Sample], which: int) -> Sequence[Sample]:
    """One tenth of a run. `which` 0 to 9."""
    return samples[len(samples) * which // 10 : max(1 + len(samples) * which // 10, len(samples) * (which + 1) // 10)]


def rate(samples: Sequence[Sample]) -> float:
    """Microbatches per second: of the middle block, since a stall of the machine says nothing."""
    return statistics.median(sample.microbatches / sample.seconds for sample in samples)


def growth(samples: Sequence[Sample], what: str) -> dict[str, float]:
    """Of memory, as a fraction: from when the layouts were warm to the end, for each of both layouts.

    The first layouts are there twice: at the end of the run they need what they needed in the first third.
    """

    def level(of: Sequence[Sample]) -> float:
        return statistics.median(getattr(sample, what) for sample in of)

    parts = [[sample for sample in samples if sample.third == third] for third in range(3)]
    first, second, _ = [part[len(part) // 2 :] for part in parts]
    return {
        "": level(samples[-max(1, len(samples) // 10) :]) / level(first) - 1,
        " with the second layouts": level(second[len(second) // 2 :]) / level(parts[1][: len(second)]) - 1,
    }


def faults(ranks: Sequence[Sequence[Sample]], limits: Limits) -> list[str]:
    """What is not as it must be, in words."""
    found = []
    total = sum(sample.microbatches for sample in ranks[0])
    if total < limits.microbatches:
        found.append(f"expected at least {limits.microbatches} microbatches, got {total}")
    for rank, samples in enumerate(ranks):
        for what in ("rss", "heap"):
            for when, grown in growth(samples, what).items():
                if grown > limits.memory:
                    found.append(f"rank {rank}: {what} grew by {grown:.2%}{when}, expected at most {limits.memory:.0%}")
        for what in ("threads", "descriptors"):
            # The first layouts are built again in the last third: as many as before.
            first = max(getattr(sample, what) for sample in samples if sample.third == 0)
            last = max(getattr(sample, what) for sample in samples if sample.third == 2)
            if last > first:
                found.append(f"rank {rank}: {last} {what} in the last third, {first} in the first")
    if limits.rate is not None:
        first, last = rate(tenth(ranks[0], 0)), rate(tenth(ranks[0], 9))
        if last < first * (1 - limits.rate):
            found.append(f"{last:.1f} microbatches/s in the last tenth, {first:.1f} in the first")
    return found


def table(ranks: Sequence[Sequence[Sample]]) -> str:
    """One line per tenth: of memory, threads and descriptors the most of all ranks."""
    lines = ["tenth  layouts  microbatches    per s   cpu ms  RSS MiB  heap MiB  threads  descriptors"]
    for which in range(10):
        parts = [tenth(samples, which) for samples in ranks]
        count = sum(sample.microbatches for sample in parts[0])
        cpu = sum(sample.cpu_seconds for part in parts for sample in part) / count

        def most(what: str, of: Sequence[Sequence[Sample]] = parts) -> int:
            return max(int(getattr(sample, what)) for part in of for sample in part)

        layouts = "second" if parts[0][-1].third == 1 else "first"
        lines.append(
            f"{which + 1:>5}  {layouts:>7}  {count:>12}  {rate(parts[0]):>7.1f}  {1e3 * cpu:>7.2f}  "
            f"{most('rss') / 2**20:>7.1f}  {most('heap') / 2**20:>8.3f}  {most('threads'):>7}"
            f"  {most('descriptors'):>11}"
        )
    return "\n".join(lines)
