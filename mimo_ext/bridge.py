"""The torch-only face of the communicator: one edge between two modules."""

from __future__ import annotations

import inspect
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, cast

import torch
import torch.distributed as dist

from ._arguments import (
    INT64_MAX,
    axes_of,
    boundary_of,
    check_group,
    check_ranks,
    checked_int,
    checked_ints,
    checked_timeout,
    checked_type,
    digest_of,
    links_of,
    static_microbatch,
)
from ._extension import _C
from ._groups import Groups
from ._leftovers import finish_leftovers_at_exit
from ._observed import Observed
from ._setup import Setup, ranks_of, refuse_bridge
from ._transports import CARRIERS, check_transport, checked_device
from ._version import library_text
from .flight import watch
from .layout import PATHS, Layout, Plan
from .row_shards import RowShards

if TYPE_CHECKING:
    from .planning.links import Links

BridgeError = _C.BridgeError
BridgeTimeoutError = _C.BridgeTimeoutError

__all__ = ["Bridge", "BridgeError", "BridgeTimeoutError", "Handle", "refuse_bridge"]


def _nothing(_: Any) -> None:
    return None


def _unchanged(value: Any) -> Any:
    return value


class Handle:
    """An operation that is under way. `wait()` returns what the blocking form returns, and raises what it raises."""

    def __init__(
        self, communicator: _C.Communicator, delivery: _C.Delivery | None, finish: Callable[[Any], Any]
    ) -> None:
        assert delivery is not None
        self._communicator = communicator
        self._delivery = delivery
        self._finish: Callable[[Any], Any] | None = finish
        self._result: Any = None

    def done(self) -> bool:
        """Whether `wait()` would return (or raise) at once."""
        return self._delivery.done()

    def wait(self) -> Any:
        if self._finish is not None:
            self._result = self._finish(self._communicator.wait(self._delivery))
            self._finish = None
        return self._result


class Bridge(Observed):
    """Moves the boundary tensor of one module to the next, and its gradient back, between any two layouts.

    The constructor is collective over the default process group (or over `group`): every rank calls it, in the same
    order of bridges, also ranks that are on neither side. It compares the arguments of all ranks before it creates
    anything, and connects only ranks that exchange something. Ranks meet in the store of the default process group,
    whose backend may be any but MPI.

    Samples of the global microbatch are split over lanes by position: lane i of k holds samples [i*B//k, (i+1)*B//k).
    Every rank of a destination lane receives the lane's whole tensor (or its own sequence shard, where its layout says
    so).

    Args:
        src, dst: layouts of the two modules.
        ndim: 2 for [rows of the lane, h], 3 for tensors with a batch and a sequence axis.
        batch_dim, seq_dim: the axes of a 3-D tensor; seq_dim defaults to the other one of the first two.
        dtype: of activations and gradients.
        shape: of the global microbatch, all lanes together, where it never changes: then nothing but payload is sent.
            Default: shapes vary, and a small header goes ahead of each payload.
        timeout: how long any wait for a peer may last; in the constructor at least as long as the default process
            group's timeout.
        device: of the tensors on this rank, "cpu" or a CUDA device ("cuda": the current one); of the same type on every
            rank.
        transport: what carries them; None: the ranks choose. On the CPU "gloo". On CUDA "nccl" where each rank has a
            GPU of its own and the default process group knows NCCL, else "staged": over gloo, through pinned memory of
            the host, so that ranks may share a GPU. `bridge.transport` tells. ("staged" and "groups", which is what
            "nccl" does, also run on the CPU: for tests. See docs/transports.md.)
        src_stage, dst_stage: pipeline stages that the bridge joins: by default the source's last and the destination's
            first.
        group: a process group that holds all ranks of both sides, in place of the default group.
        max_in_flight: microbatches per direction that are sent but have not arrived; a further send waits. (One that
            travels unasked arrives before its receive is called: see docs/promises.md, "Order".)
        max_chunks, min_chunk_bytes: what a rank receives for its whole lane it forwards to the lane's other ranks in up
            to so many chunks, none below so many bytes: one is forwarded while the next is on the wire.
        path: how the ranks of a lane that hold the same come by their copies. "pipelined": each receives an equal part
            and forwards it; "direct": each receives everything from one sender; "leader": one of them does, and
            forwards it; "auto": the fastest of these by a model of the links, for each pair of lanes and each
            microbatch. `print(bridge.plan)` tells the choice.
        links: what that model takes the links to be. Default: gloo over Ethernet (1 GB/s per rank, 4 GB/s inside a
            host, 30 us latency, 20 us per message).
        unpaired_backward: let gradients travel before the microbatch that they belong to, or without one: the n-th
            gradient is still that of the n-th microbatch, and its samples (2-D: rows) are split evenly. By default
            such a call is an error.
        name: of the edge, for messages; default "src.name -> dst.name".
        setup: set this bridge up together with others; it can be used at the end of the `Setup`'s block. `group`
            is not used then.

    Raises:
        ValueError: arguments that do not fit, or that differ between ranks (with both sides' values).
        RuntimeError: a rank that does not call the constructor in time, by name.
            Also a device or a transport that is not there.
        NotImplementedError: a device that is neither the CPU nor CUDA.
    """

    _checked = False  # see _canary.py
    _copy_delay = timedelta(0)  # of the imitated copies of "staged" on the CPU

    def __new__(cls, *_: Any, **__: Any) -> Self:
        from ._canary import CheckedBridge, enabled  # it is made of this class

        made: Any = CheckedBridge if cls is Bridge and enabled() else cls
        return cast("Self", object.__new__(made))

    def __init__(
        self,
        src: Layout,
        dst: Layout,
        *,
        ndim: int = 2,
        batch_dim: int = 0,
        seq_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        shape: Sequence[int] | None = None,
        timeout: timedelta = timedelta(minutes=10),
        device: torch.device | str = "cpu",
        transport: str | None = None,
        src_stage: int = -1,
        dst_stage: int = 0,
        group: dist.ProcessGroup | None = None,
        max_in_flight: int = 32,
        max_chunks: int = 8,
        min_chunk_bytes: int = 64 * 1024,
        path: str = "auto",
        links: Links | None = None,
        unpaired_backward: bool = False,
        name: str | None = None,
        setup: Setup | None = None,
    ) -> None:
        names = [getattr(side, "name", "") for side in (src, dst)]
        self.name = name or f"{names[0] or 'source'} -> {names[1] or 'destination'}"
        self._communicator: _C.Communicator | None = None
        self._transport: str | None = None  # once the ranks have chosen
        self._groups: Groups | None = None
        self._flight: dict[str, Any] = {}
        self._flight_note: str | None = None
        if not dist.is_initialized():
            raise RuntimeError(f"bridge '{self.name}': torch.distributed is not initialized")
        self.rank = dist.get_rank()
        where = f"bridge '{self.name}', rank {self.rank}"
        check_group(where, group)
        try:
            for what, side in (("src", src), ("dst", dst)):
                checked_type(where, what, side, Layout, "a mimo_ext.Layout")
            checked_type(where, "dtype", dtype, torch.dtype, "a torch.dtype")
            self.device = checked_device(where, device)
            check_transport(where, transport, self.device)
            self._asked_transport = transport
            self.src, self.dst, self.dtype = src, dst, dtype
            self.batch_dim, self.seq_dim = axes_of(where, ndim, batch_dim, seq_dim)
            self.ndim = int(ndim)
            max_in_flight = checked_int(where, "max_in_flight", max_in_flight, 1)
            timeout = checked_timeout(where, timeout)
            self._source = boundary_of(where, "src_stage", src, src_stage)
            self._destination = boundary_of(where, "dst_stage", dst, dst_stage)
            sides = self._source, self._destination
            fixed = None
            if shape is not None:
                axes = self.ndim, self.batch_dim, self.seq_dim
                fixed = static_microbatch(where, shape, axes, sides, dtype.itemsize)
            self._ranks = ranks = sorted({rank for side in sides for lane in side.lanes for rank in lane})
            check_ranks(
                where, ranks, setup.ranks if setup is not None else ranks_of(group) or range(dist.get_world_size())
            )
            max_chunks = checked_int(where, "max_chunks", max_chunks, 1, _C.MAX_CHUNKS)
            min_chunk_bytes = checked_int(where, "min_chunk_bytes", min_chunk_bytes, 1, INT64_MAX)
            if path not in PATHS:
                raise ValueError(f"{where}: path: expected one of {', '.join(PATHS)}, got {path!r}")
            self._plan_options: dict[str, Any] = {
                "max_chunks": max_chunks,
                "min_chunk_bytes": min_chunk_bytes,
                "path": path,
                "links": None if links is None else links_of(where, links),
            }
            text = (
                f"{self.name}: {self._source} | {self._destination}; ndim={self.ndim} batch_dim={self.batch_dim} "
                f"seq_dim={self.seq_dim} dtype={dtype} shape={None if shape is None else tuple(shape)}"
                f" chunks={max_chunks}x{min_chunk_bytes} path={path} links={links}"
                f" device={self.device.type} transport={transport}"
                f"{' unpaired_backward' if unpaired_backward else ''}{' MIMO_EXT_CHECK' if self._checked else ''}"
                f" layouts={_C.hash_of(self._source, self._destination):016x} {library_text()}"
            )
        except Exception as error:
            # The others wait for this rank's word: they get an error too, at once. A setup tells them by itself.
            if setup is None:
                refuse_bridge(self.name, error, group)
            raise
        self._options: dict[str, Any] = {
            "fixed": fixed,
            "timeout": timeout,
            "max_in_flight": max_in_flight,
            "unpaired_backward": unpaired_backward,
            **self._plan_options,
        }
        if setup is not None:
            setup.add(self, text)
            return
        with Setup(f"bridge '{self.name}'", ranks_of(group), timeout) as alone:
            alone.add(self, text)

    # Construction

    def _connect(self, groups: Groups | None, text: str, transport: str) -> None:
        """Open the bridge, after the agreement of the ranks on `text`; without groups on ranks that are outside."""
        self._groups = groups
        self._transport = transport
        carrier = CARRIERS[transport]
        self._communicator = _C.Communicator(
            name=self.name,
            source=self._source,
            destination=self._destination,
            ndim=self.ndim,
            batch_dim=self.batch_dim,
            seq_dim=self.seq_dim,
            dtype=self.dtype,
            hash=digest_of(text),
            rank=self.rank,
            group=groups.forward if groups else None,
            backward_group=groups.backward if groups else None,
            group_ranks=groups.ranks if groups else (),
            tag_offset=groups.first_tag if groups else 0,
            device=self.device,
            carrier=carrier,
            copy_delay=self._copy_delay,
            forward_groups=groups.payload[0] if groups and carrier == "groups" else None,
            backward_groups=groups.payload[1] if groups and carrier == "groups" else None,
            **self._options,
        )
        if groups is not None:
            groups.remains.append(self._communicator.remains)
        self._open = self._communicator
        watch(self, digest_of(text))
        # Where close() was forgotten: what has been sent still arrives, and no thread outlives the interpreter.
        finish_leftovers_at_exit()
        self._finalizer = weakref.finalize(self, self._communicator.leave)

    # Properties

    @property
    def transport(self) -> str:
        """What carries the tensors: "gloo", "staged", "nccl" or "groups"; the same on every rank."""
        if self._transport is None:
            raise BridgeError(f"bridge '{self.name}': its setup did not finish")
        return self._transport

    @property
    def is_source(self) -> bool:
        """Whether this rank sends forward."""
        return self._is_on(self._source) if self._communicator is None else self._communicator.is_source

    @property
    def is_destination(self) -> bool:
        """Whether this rank receives forward."""
        return self._is_on(self._destination) if self._communicator is None else self._communicator.is_destination

    def _is_on(self, side: _C.Boundary) -> bool:
        return any(self.rank in lane for lane in side.lanes)

    @property
    def closed(self) -> bool:
        return self._communicator is None or self._communicator.closed

    @property
    def max_in_flight(self) -> int:
        """Microbatches per direction that are sent but have not arrived. Each rank may set its own, at any time."""
        return self._open.max_in_flight

    @max_in_flight.setter
    def max_in_flight(self, microbatches: int) -> None:
        if microbatches < 1:
            raise ValueError(f"bridge '{self.name}': max_in_flight must be positive, got {microbatches}")
        self._limit(microbatches)

    def _limit(self, microbatches: int) -> None:
        if self._communicator is None:
            raise BridgeError(f"bridge '{self.name}': its setup did not finish")
        self._communicator.max_in_flight = microbatches

    @property
    def plan(self) -> Plan:
        """The forward plan: of the static shape, else of the last microbatch sent here, else of an example."""
        last = self._open.last_plan()
        if last is not None:
            return last
        samples = math.lcm(len(self._source.lanes), len(self._destination.lanes))
        parts = math.lcm(len(self._source.lanes[0]), len(self._destination.lanes[0]))
        shape = [parts] * self.ndim
        microbatch = _C.Microbatch(
            ndim=self.ndim,
            batch_dim=self.batch_dim,
            seq_dim=self.seq_dim,
            samples=samples,
            shape=shape,
            rows_per_sample=parts,
            element_size=self.dtype.itemsize,
        )
        return Plan(self._source, self._destination, microbatch, False, **self._plan_options)

    def __getattr__(self, name: str) -> Any:
        if name == "_open":  # set when the ranks have met
            raise BridgeError(f"bridge '{self.__dict__.get('name')}': its setup did not finish")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # The six operations. Each blocking one is a single call into C++.

    def isend_forward(
        self,
        x: torch.Tensor,
        row_counts: Sequence[int] | None = None,
        num_samples: int | None = None,
        row_shards: RowShards | None = None,
    ) -> Handle:
        """Enqueue this lane's activation; the handle's `wait()` returns None once the storage is free again.

        Args:
            x: [rows, h] or 3-D, of the bridge's dtype; this rank's shard of it where the source is sharded. Do not
                change it in place before the handle has ended; freeing it (or swapping `x.data`) is fine.
            row_counts: 2-D only: rows of each sample of this lane. Default: the rows split evenly.
            num_samples: of the global microbatch; default: as many in every source lane as here.
            row_shards: 2-D only: which of its rows each rank of a destination lane uses; no others are sent. It tells
                the row counts and the number of samples, too. The destination has to give the same for the samples
                that it shares with this lane.

        Raises:
            ValueError: dtype, axes, device or rows that do not fit, before anything is sent.
            BridgeError: this rank is not on the source side, the bridge is closed, or an earlier operation failed.
        """
        delivery = self._send_forward(x, row_counts, num_samples, row_shards, True)
        return Handle(self._open, delivery, _nothing)

    def send_forward(
        self,
        x: torch.Tensor,
        row_counts: Sequence[int] | None = None,
        num_samples: int | None = None,
        row_shards: RowShards | None = None,
    ) -> None:
        """As `isend_forward`, without a handle: returns once enqueued and never waits for the receiver."""
        self._send_forward(x, row_counts, num_samples, row_shards, False)

    def _send_forward(
        self,
        x: torch.Tensor,
        row_counts: Sequence[int] | None,
        num_samples: int | None,
        row_shards: RowShards | None,
        want_delivery: bool,
    ) -> _C.Delivery | None:
        try:
            return self._open.send_forward(x, row_counts, num_samples, row_shards, want_delivery)
        except TypeError as error:
            # Most callers give lists; what else there is, is looked at when it is there.
            where = f"bridge '{self.name}', rank {self.rank}: send_forward"
            checked_type(where, "x", x, torch.Tensor, "a tensor")
            counts = None if row_counts is None else checked_ints(where, "row_counts", row_counts)
            if num_samples is not None:
                num_samples = checked_int(where, "num_samples", num_samples, 0, INT64_MAX)
            if row_shards is not None:
                checked_type(where, "row_shards", row_shards, RowShards, "mimo_ext.RowShards")
            if counts is None or isinstance(row_counts, (list, tuple)):
                raise TypeError(f"{where}: {error}") from None
            return self._open.send_forward(x, counts, num_samples, row_shards, want_delivery)

    def irecv_forward(self, row_shards: RowShards | None = None, *, waits_soon: bool = False) -> Handle:
        """Post the receive of the next microbatch; `wait()` returns a leaf tensor.

        It has `requires_grad=True` (floating dtypes), unless the sender or the receiver ran under `torch.no_grad()`.
        The receive makes progress by itself, whatever the caller does meanwhile (with "nccl": it is carried out by
        `wait()`, and by that of any later one).

        Args:
            row_shards: as the sender has them, for the samples of this lane: the tensor then holds the rows of this
                rank's shard only.
            waits_soon: `wait()` comes next: it then carries the receive out itself, where that is still to be done,
                which takes less time for small payloads.
        """
        wants_backward = torch.is_grad_enabled()
        try:
            delivery = self._open.irecv_forward(row_shards, waits_soon)
        except TypeError:
            self._check_row_shards(row_shards)
            raise

        def finish(y: torch.Tensor) -> torch.Tensor:
            if not wants_backward:
                return y
            return y.requires_grad_(delivery.expects_backward and (y.is_floating_point() or y.is_complex()))

        return Handle(self._open, delivery, finish)

    def recv_forward(self, row_shards: RowShards | None = None) -> torch.Tensor:
        """The next microbatch of this lane; as `irecv_forward`, carried out by the calling thread.

        Raises:
            BridgeTimeoutError: nothing came within the timeout; names the peer and the microbatch.
            BridgeError: a peer died or sent something else than expected, or this rank is not on the destination side.
        """
        try:
            return self._open.recv_forward(row_shards)
        except TypeError:
            self._check_row_shards(row_shards)
            raise

    def isend_backward(self, dy: torch.Tensor | None) -> Handle:
        """Enqueue the gradient of the oldest received microbatch that waits for one.

        None says that there is none; with static shapes, zeros are sent in its place.
        """
        return Handle(self._open, self._send_backward(dy, True), _nothing)

    def send_backward(self, dy: torch.Tensor | None) -> None:
        """As `isend_backward`, without a handle."""
        self._send_backward(dy, False)

    def _send_backward(self, dy: torch.Tensor | None, want_delivery: bool) -> _C.Delivery | None:
        try:
            return self._open.send_backward(dy, want_delivery)
        except TypeError:
            checked_type(f"bridge '{self.name}', rank {self.rank}: send_backward", "dy", dy, torch.Tensor, "a tensor")
            raise

    def irecv_backward(self, *, waits_soon: bool = False) -> Handle:
        """Post the receive of the oldest outstanding gradient; `wait()` returns it, or None where there is none.

        `waits_soon` as in `irecv_forward`.
        """
        return Handle(self._open, self._open.irecv_backward(waits_soon), _unchanged)

    def recv_backward(self) -> torch.Tensor | None:
        """The gradient of the oldest sent microbatch; errors as `recv_forward`."""
        return self._open.recv_backward()

    def isend_forward_recv_backward(self, x: torch.Tensor, **options: Any) -> Handle:
        """`isend_forward(x, **options)` and `irecv_backward()`; the handle is that of the gradient."""
        self.send_forward(x, **options)
        return self.irecv_backward()

    def send_forward_recv_backward(self, x: torch.Tensor, **options: Any) -> torch.Tensor | None:
        """`send_forward(x, **options)`, then `recv_backward()`: of the oldest microbatch that waits for one."""
        self.send_forward(x, **options)
        return self.recv_backward()

    def isend_backward_recv_forward(self, dy: torch.Tensor | None, row_shards: RowShards | None = None) -> Handle:
        """`isend_backward(dy)` and `irecv_forward(row_shards)`; the handle is that of the activation."""
        self.send_backward(dy)
        return self.irecv_forward(row_shards)

    def send_backward_recv_forward(self, dy: torch.Tensor | None, row_shards: RowShards | None = None) -> torch.Tensor:
        """`send_backward(dy)`, then `recv_forward(row_shards)`."""
        self.send_backward(dy)
        return self.recv_forward(row_shards)

    def _check_row_shards(self, row_shards: Any) -> None:
        if row_shards is not None:
            where = f"bridge '{self.name}', rank {self.rank}: recv_forward"
            checked_type(where, "row_shards", row_shards, RowShards, "mimo_ext.RowShards")

    # End

    def close(self, abort: bool = False) -> None:
        """End the bridge: wait for what is under way (`abort`: do not), join its threads, give up its process groups.

        Later operations raise BridgeError. Calling it again does nothing. In a process that was forked off from the one
        that made the bridge it gives up the copy there, and the parent goes on.

        Peers that wait for a rank that aborts raise BridgeError at once, which names it and says why: because of the
        exception that is being handled here, if there is one.

        Raises:
            BridgeError: what was under way failed, and no operation has said so before; the bridge is closed all the
                same. Not with `abort`.
        """
        if self._communicator is None or self._communicator.closed:
            return
        error = sys.exception() if abort else None
        why = "the bridge was closed with abort=True" if error is None else f"{type(error).__name__}: {error}"
        groups, self._groups = self._groups, None
        if abort and groups is not None:
            groups.close(abort=True)  # before anything is freed that they may still write to
            groups = None
        try:
            self._communicator.close(abort, why if abort else "")
        except BaseException:
            if groups is not None:
                groups.close(abort=True)
                groups = None
            raise
        finally:
            self._finalizer.detach()
            if groups is not None:
                groups.close(abort=False)

    def __enter__(self) -> Bridge:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Peers of a rank that failed may never come: do not wait for them.
        self.close(abort=kind is not None)

    def __repr__(self) -> str:
        return f"Bridge({self.name}: {self._source} | {self._destination}; ndim={self.ndim}, {self.dtype})"


# For help() and inspect: what is given is what __init__ takes, though __new__ is asked first.
_of_init = inspect.signature(Bridge.__init__)
Bridge.__signature__ = _of_init.replace(  # type: ignore[attr-defined]
    parameters=[each for name, each in _of_init.parameters.items() if name != "self"]
)
