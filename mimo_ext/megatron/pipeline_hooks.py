"""What a pipeline communicator offers around a schedule: overlap with compute, telemetry, a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from torch.profiler import record_function

from mimo_ext.megatron.overlap import Receives, check_count, overlapping
from mimo_ext.megatron.trace import ScheduleRecorder
from mimo_ext.timeline import RankTimeline

if TYPE_CHECKING:
    from mimo_ext import Bridge
    from mimo_ext.megatron.bridge_communicator import BridgeCommunicator
    from mimo_ext.megatron.communicator import RankModuleInfo


class PipelineHooks:
    """The part of `MultiModulePipelineCommunicator` that schedules do not call."""

    current_rank: int
    rank_module_map: dict[str, RankModuleInfo]
    _bridges: list[BridgeCommunicator | Bridge]
    _closed: bool
    _links: tuple[Sequence[Receives], Sequence[Receives]] = ((), ())  # of activations, of gradients
    _recorder: ScheduleRecorder | None = None
    _lead: int = 1  # microbatches that a stage has computed more than the next one under 1F1B

    @property
    def total_stages(self) -> int:
        """Pipeline stages along the longest path through the modules."""
        raise NotImplementedError

    # -- transfers while the ranks compute -------------------------------------------------------------------------

    @contextmanager
    def overlap(
        self, num_microbatches: int, *, forward_only: bool = False, ahead: int = 1, extra_warmup: int = 0
    ) -> Iterator[None]:
        """Post receives before the schedule asks for them: `with communicator.overlap(num_microbatches): schedule()`.

        Inside of the block the next microbatch's activation is under way while this one is computed, and the gradient
        of a microbatch as soon as its activation has been sent. Values are the same, and so is the order in which each
        link's tensors travel. All receives that were posted have been asked for when the schedule ends: nothing is
        left for the next one. `mimo_ext.megatron.overlap.overlapped` reads the arguments off the schedule's call.

        Each link holds up to `ahead` received tensors more than without. The timeout of a receive begins when it is
        posted, so it must be longer than what a peer computes between two microbatches. Use this communicator's
        operations in the block, not those of its `bridge_comms` and `p2p_communicator`.

        1F1B itself leaves no time for a transfer: a stage has computed just one microbatch more than the next one when
        it needs that one's gradient. `extra_warmup` lets it compute so many more, as `total_stages` and
        `current_stage`, of which the schedule takes the length of its warm-up, are counted accordingly in the block.
        Every stage then keeps up to `extra_warmup` times the number of stages behind it more microbatches.

        Args:
            num_microbatches: of the one schedule that runs in the block.
            forward_only: no gradients are received.
            ahead: receives per link that are posted at most before they are asked for.
            extra_warmup: microbatches that a stage is further ahead of the next one.

        Raises:
            ValueError: numbers that are too small or no integers.
            RuntimeError: within another `overlap`; at the end of the block: fewer microbatches were received.
        """
        self._require_open("overlap")
        check_count("extra_warmup", extra_warmup, 0)
        with overlapping(*self._links, num_microbatches, forward_only, ahead):
            bridges = self._own_bridges()
            before = self._lead, [bridge.max_in_flight for bridge in bridges]
            self._lead = 1 + extra_warmup
            # A stage that is further ahead has more under way. Where it had to wait before its warm-up ends, the stages
            # behind it would wait for microbatches, and it for them.
            for bridge in bridges:
                bridge.max_in_flight = max(bridge.max_in_flight, self.total_stages + 1)
            try:
                yield
            finally:
                self._lead = before[0]
                for bridge, microbatches in zip(bridges, before[1], strict=True):
                    if not bridge.closed:
                        bridge.max_in_flight = microbatches

    # -- what it took ----------------------------------------------------------------------------------------------

    def telemetry(self) -> dict[str, dict[str, dict[str, float]]]:
        """`Bridge.telemetry()` of each link of this rank since its construction, by the link's name.

        Links are the edges of the topology ("images -> language") and the hops between the stages of a module
        ("language stage 0 -> stage 1").
        """
        self._require_open("telemetry")
        return {bridge.name: bridge.telemetry() for bridge in self._own_bridges()}

    def start_trace(self) -> None:
        """Record what this rank computes, transfers and waits for, until `finish_trace`.

        To be called between two schedules, on all ranks. Every call of an operation costs some microseconds meanwhile.
        """
        self._require_open("start_trace")
        self._recorder = ScheduleRecorder(self._label(), *self._own_bridges())

    def finish_trace(self) -> RankTimeline:
        """The recording of this rank: see `mimo_ext.timeline`, whose `gather` and `draw` take it.

        Raises:
            RuntimeError: `start_trace` has not been called.
        """
        self._require_open("finish_trace")
        if self._recorder is None:
            raise RuntimeError(f"rank {self.current_rank}: finish_trace without start_trace")
        recorder, self._recorder = self._recorder, None
        return recorder.finish()

    def _own_bridges(self) -> list[Bridge]:
        bridges = (getattr(made, "bridge", made) for made in self._bridges)
        return [bridge for bridge in bridges if bridge.is_source or bridge.is_destination]

    def _label(self) -> str:
        """ "images", or "language, stage 1" where the module has several."""
        names = [
            name if info.pp_size == 1 else f"{name}, stage {info.pp_rank}"
            for name, info in self.rank_module_map.items()
        ]
        return " + ".join(names) or "in no module"

    def _operation(self, name: str) -> AbstractContextManager[Any]:
        self._require_open(name)
        profiled = record_function(f"mimo_ext::pipeline.{name}")
        return profiled if self._recorder is None else self._recorder.operation(name, profiled)

    def _require_open(self, operation: str) -> None:
        if self._closed:
            raise RuntimeError(f"rank {self.current_rank}: {operation} on a closed MultiModulePipelineCommunicator")
