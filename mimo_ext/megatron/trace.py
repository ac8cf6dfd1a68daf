"""What a rank does under the pipeline schedule, told from the schedule's calls to its communicator.

Between two operations a rank computes. Which of its microbatches, and in which direction, follows from the operation
before: what was received last is computed next. So any schedule is recorded without a change to it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from mimo_ext.timeline import RankTimeline, Recorder, Span

_SHORTEST_NS = 20_000  # what lies between two operations that follow one another at once is no compute


class ScheduleRecorder(Recorder):
    """As `Recorder`, with the compute of a schedule.

    Args:
        label: what this rank is.
        bridges: this rank's bridges.
    """

    def __init__(self, label: str, *bridges: Any) -> None:
        super().__init__(label, *bridges)
        self._computes = "other"
        self._since = self._begin_ns
        self._numbers = {"forward": 0, "backward": 0}

    @contextmanager
    def operation(self, name: str, context: AbstractContextManager[Any]) -> Iterator[None]:
        """The communicator's operation of this name runs in the block, and that in `context`."""
        self._end_compute()
        try:
            with context:
                yield
        finally:
            self._since = time.monotonic_ns()
            if name.endswith("recv_forward"):
                self._computes = "forward"
            elif name.endswith("recv_backward"):
                self._computes = "backward"
            else:
                self._computes = "other"

    def finish(self) -> RankTimeline:
        """As `Recorder.finish`; what has run since the last operation is "other"."""
        self._computes = "other"  # a receive at the end of a recording brings what is computed after it
        self._end_compute()
        return super().finish()

    def _end_compute(self) -> None:
        now, kind, microbatch = time.monotonic_ns(), self._computes, None
        if kind in self._numbers:
            microbatch = self._numbers[kind]
            self._numbers[kind] += 1
        elif now - self._since < _SHORTEST_NS:
            return
        self.add(Span(kind, self._since, now, microbatch))
