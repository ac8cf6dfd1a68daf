"""A world of threads: each thread is a rank, and bridges are queues in memory. It knows no plans and no process
groups.

A receive that stays without its sends raises `WouldHang`, so that a deadlock is a failure within a second. Sends keep
a copy, as tensors on a wire do.
"""

from __future__ import annotations

import threading
import traceback
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pipeline_model import AXES, CONFIG, Case

from mimo_ext.megatron import bridge_communicator, communicator, topology

WAIT_S = 5.0


class WouldHang(Exception):
    """A receive that nothing would ever answer."""


class FakeWorld:
    def __init__(self, size: int, wait_s: float = WAIT_S) -> None:
        self.size = size
        self.wait_s = wait_s
        self.changed = threading.Condition()
        self.mail: dict[Any, dict[Any, Any]] = defaultdict(dict)
        self.made: dict[int, list[str]] = defaultdict(list)  # rank -> names of its bridges, in order
        self.closed: dict[int, list[str]] = defaultdict(list)
        self.collectives: dict[int, int] = defaultdict(int)
        self._local = threading.local()

    @property
    def rank(self) -> int:
        return self._local.rank

    def put(self, key: Any, sender: Any, value: Any) -> None:
        with self.changed:
            assert sender not in self.mail[key], f"{sender} sent {key} twice"
            self.mail[key][sender] = value
            self.changed.notify_all()

    def take(self, key: Any, senders: list[Any]) -> list[Any]:
        with self.changed:
            if not self.changed.wait_for(lambda: all(s in self.mail[key] for s in senders), self.wait_s):
                missing = [s for s in senders if s not in self.mail[key]]
                raise WouldHang(f"rank {self.rank} waits for {key} of {missing}")
            return [self.mail[key][s] for s in senders]

    def run(self, fn: Callable[[int], Any]) -> list[Any]:
        """`fn(rank)` on every rank at once; the first failure is raised with its traceback."""
        results, errors = self.run_all(fn)
        for rank, error in sorted(errors.items()):
            text = "".join(traceback.format_exception(error))
            raise AssertionError(f"rank {rank} failed ({len(errors)} of {self.size}):\n{text}") from error
        return results

    def run_all(self, fn: Callable[[int], Any]) -> tuple[list[Any], dict[int, BaseException]]:
        """As `run`, but errors are returned by rank."""
        results: list[Any] = [None] * self.size
        errors: dict[int, BaseException] = {}

        def body(rank: int) -> None:
            self._local.rank = rank
            try:
                results[rank] = fn(rank)
            except BaseException as error:
                errors[rank] = error

        threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a rank hangs"
        return results, errors


class FakeDist:
    """The functions of torch.distributed that the communicator may use."""

    def __init__(self, world: FakeWorld, backend: str = "gloo") -> None:
        self._world = world
        self._backend = backend

    def is_initialized(self) -> bool:
        return True

    def get_rank(self) -> int:
        return self._world.rank

    def get_world_size(self) -> int:
        return self._world.size

    def get_backend(self) -> str:
        return self._backend


def fake_setup_class(world: FakeWorld) -> type:
    """A stand-in for `mimo_ext._setup.Setup` in `world`."""

    class FakeSetup:
        def __init__(self, name: str) -> None:
            self.description: list[str] = []
            self._bridges: list[Any] = []

        def add(self, bridge: Any, text: str) -> None:
            self._bridges.append(bridge)
            self.description.append(text)

        def compare(self, text: str) -> list[tuple[list[int], str]] | None:
            call = world.collectives[world.rank]
            world.collectives[world.rank] += 1
            world.put(("meeting", call), world.rank, text)
            texts = world.take(("meeting", call), list(range(world.size)))
            by_text = {one: [rank for rank in range(world.size) if texts[rank] == one] for one in texts}
            return None if len(by_text) == 1 else [(ranks, one) for one, ranks in by_text.items()]

        def connect(self) -> None:
            for bridge in self._bridges:
                world.made[world.rank].append(bridge.name)

    return FakeSetup


class _Handle:
    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait = wait


def fake_bridge_class(world: FakeWorld) -> type:
    """A stand-in for `mimo_ext.Bridge` in `world`."""

    class FakeBridge:
        def __init__(
            self,
            src: Any,
            dst: Any,
            *,
            ndim: int,
            batch_dim: int = 0,
            seq_dim: int | None = None,
            dtype: torch.dtype,
            device: Any,
            name: str,
            timeout: Any = None,
            max_in_flight: int = 32,
            unpaired_backward: bool = False,
            setup: Any = None,
        ) -> None:
            self.name, self.ndim, self.dtype, self.timeout = name, ndim, dtype, timeout
            self.max_in_flight = max_in_flight
            self.batch_dim = batch_dim if ndim == 3 else 0
            self.rank = world.rank
            self.source_lanes, self.destination_lanes = src.lanes(-1), dst.lanes(0)
            self.counts: dict[str, int] = defaultdict(int)
            if setup is None:
                world.made[self.rank].append(name)
            else:
                setup.add(self, f"{name}: {src.lanes(-1)} {dst.lanes(0)}")

        def _next(self, what: str) -> int:
            self.counts[what] += 1
            return self.counts[what] - 1

        def _lane(self, lanes: Any) -> int:
            lane = next((i for i, ranks in enumerate(lanes) if self.rank in ranks), None)
            assert lane is not None, f"rank {self.rank} is not on this side of {self.name}"
            return lane

        @property
        def is_source(self) -> bool:
            return any(self.rank in lane for lane in self.source_lanes)

        @property
        def is_destination(self) -> bool:
            return any(self.rank in lane for lane in self.destination_lanes)

        def send_forward(self, x: torch.Tensor, row_counts: list[int] | None = None, num_samples: Any = None) -> None:
            assert x.ndim == self.ndim
            assert x.dtype == self.dtype
            assert row_counts is None or self.ndim == 2
            self._lane(self.source_lanes)
            counts = row_counts if row_counts is not None else [1] * x.shape[self.batch_dim]
            assert sum(counts) == x.shape[self.batch_dim]
            world.put((self.name, "forward", self._next("send_forward")), self.rank, (x.detach().clone(), counts))

        def irecv_forward(self, *, waits_soon: bool = False) -> _Handle:
            lane, microbatch = self._lane(self.destination_lanes), self._next("recv_forward")

            def wait() -> torch.Tensor:
                senders = [members[0] for members in self.source_lanes]
                parts = world.take((self.name, "forward", microbatch), senders)
                samples = [p for x, counts in parts for p in x.split(counts, self.batch_dim)]
                lanes = len(self.destination_lanes)
                mine = samples[lane * len(samples) // lanes : (lane + 1) * len(samples) // lanes]
                empty = parts[0][0].narrow(self.batch_dim, 0, 0)
                # One shape for all lanes of a hop is not asked for: each holds what its own peer sent.
                if lanes == len(self.source_lanes):
                    return parts[lane][0].clone().requires_grad_()
                return torch.cat([empty, *mine], self.batch_dim).requires_grad_()

            return _Handle(wait)

        def send_backward(self, dy: torch.Tensor | None) -> None:
            lane = self._lane(self.destination_lanes)
            value = None if dy is None else dy.detach().clone()
            world.put((self.name, "backward", self._next("send_backward")), self.rank, value)
            assert dy is None or dy.ndim == self.ndim, lane

        def irecv_backward(self, *, waits_soon: bool = False) -> _Handle:
            lane, microbatch = self._lane(self.source_lanes), self._next("recv_backward")
            assert microbatch < self.counts["send_forward"], "a gradient is asked for before its activation was sent"

            def wait() -> torch.Tensor | None:
                # Copies over tp are identical, those over cp are partial: each cp coordinate's first rank counts once.
                sums = []
                for members in self.destination_lanes:
                    grads = world.take((self.name, "backward", microbatch), list(members))
                    # The lanes of these tests are either all tp or all cp; equal gradients are tp copies.
                    if grads[0] is None:
                        assert all(g is None for g in grads)
                        sums.append(None)
                    elif all(torch.equal(g, grads[0]) for g in grads):
                        sums.append(grads[0])
                    else:
                        sums.append(torch.stack(grads).sum(0))
                if len(self.destination_lanes) == len(self.source_lanes):
                    return None if sums[lane] is None else sums[lane].clone()
                if all(s is None for s in sums):
                    return None
                sent = world.take((self.name, "forward", microbatch), [m[0] for m in self.source_lanes])
                sizes = [x.shape[self.batch_dim] for x, _ in sent]
                return torch.cat(sums, self.batch_dim).split(sizes, self.batch_dim)[lane].clone()

            return _Handle(wait)

        def recv_forward(self) -> torch.Tensor:
            return self.irecv_forward().wait()

        def recv_backward(self) -> torch.Tensor | None:
            return self.irecv_backward().wait()

        closed = False
        _group = None

        def close(self, abort: bool = False) -> None:
            world.closed[self.rank].append(self.name)

    return FakeBridge


def install(monkeypatch: pytest.MonkeyPatch, size: int, backend: str = "gloo") -> FakeWorld:
    """A world of threads, with the communicator's torch.distributed and Bridge replaced by its fakes."""
    world = FakeWorld(size)
    fake = FakeDist(world, backend)
    monkeypatch.setattr(communicator, "dist", fake)
    monkeypatch.setattr(topology, "dist", fake)
    monkeypatch.setattr(communicator, "Setup", fake_setup_class(world))
    bridge_class = fake_bridge_class(world)
    for module in (communicator, bridge_communicator):
        monkeypatch.setattr(module, "Bridge", bridge_class)
    monkeypatch.setattr(bridge_communicator, "dist", fake)
    return world


def make(case: Case, **options: Any) -> communicator.MultiModulePipelineCommunicator:
    options = {"dim_mapping": AXES, "module_output_ndim": case.output_ndim, **options}
    return communicator.MultiModulePipelineCommunicator(case.grids, case.topology, CONFIG, **options)
