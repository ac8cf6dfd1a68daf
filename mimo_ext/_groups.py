"""The process groups of bridges: gloo's, made without a barrier, on the ranks that exchange something and no others.

`torch.distributed.new_group` gives each group a network device and workers of its own, three threads in all, and makes
every rank of the world wait for every group. A bridge only needs point-to-point messages: these groups share one device
(one thread) per direction of traffic, have no workers, and are known to nobody but the bridge that holds them.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ._agreement import Meeting, ranks_text, wait_for
from ._extension import _C

TAGS = 16  # of a bridge in its groups
_DIRECTIONS = ("forward", "backward")

# (process, direction, interfaces) -> the devices that open groups use. A forked process makes its own.
_devices: weakref.WeakValueDictionary[tuple[int, str, str], _Devices] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Groups:
    """What one bridge moves its messages with.

    Attributes:
        ranks: of both groups, in their order.
        forward, backward: one group for each direction.
        first_tag: of the `TAGS` tags of this bridge in both groups.
        payload: for each direction the group of what goes in groups: one of NCCL, or the one above.
        devices: for as long as a bridge holds them, the next one shares them.
        remains: what bridges have left behind in these groups; of all that share them.
    """

    ranks: tuple[int, ...]
    forward: dist.ProcessGroup
    backward: dist.ProcessGroup
    first_tag: int
    devices: tuple[_Devices, ...]
    payload: tuple[dist.ProcessGroup, dist.ProcessGroup]
    remains: list[_C.Remains]

    def close(self, abort: bool) -> None:
        """End the communicators of NCCL, once; others end when nobody holds them.

        `abort`: whatever they do, and whether or not their peers end theirs.
        """
        for group in self.payload:
            if group is self.forward or group is self.backward:
                continue
            if abort:
                group.abort()
            else:
                group.shutdown()


class Connection(NamedTuple):
    """What one bridge wants.

    Attributes:
        ranks: that this rank is connected with, itself among them; or none.
        what: it is for, in messages.
        device: where its payload goes over NCCL.
    """

    ranks: Sequence[int]
    what: str
    device: torch.device | None = None


def connect(meeting: Meeting, bridges: Sequence[Connection]) -> list[Groups | None]:
    """The groups of bridges that are set up together: one pair for the same ranks, each bridge with tags of its own.

    Opposite directions have groups of their own: a connection delivers in order, and gloo's notices of posted receives
    would stand behind our own payload. All connections are made at the same time, whatever their number.

    Args:
        meeting: every rank of it calls this, with the same bridges in the same order.
        bridges: what they want.

    Raises:
        RuntimeError: ranks that do not come in time, by name, or that cannot be reached.
    """
    wanted: dict[tuple[int, ...], str] = {}
    for ranks, what, _ in bridges:
        wanted.setdefault(tuple(ranks), what)
    wanted.pop((), None)
    devices: tuple[_Devices, ...] = ()
    if meeting.store is None:
        pairs = {key: [dist.new_group(list(key), backend="fake") for _ in range(2)] for key in wanted}
    elif wanted:
        devices = tuple(_devices_for(direction) for direction in _DIRECTIONS)
        # A connection is waiting for others, by far the most of its time.
        made = [
            (key, _in_a_thread(_new_group, meeting, key, device, what))
            for key, what in wanted.items()
            for device in devices
        ]
        errors = [error for _, group in made if (error := group.exception()) is not None]
        if errors:
            raise errors[0]
        pairs = {key: [group.result() for other, group in made if other == key] for key in wanted}
        for key, what in wanted.items():
            _wait_until_all_are_connected(meeting, key, what)
    bridges_between: Counter[tuple[int, ...]] = Counter()
    found: list[Groups | None] = []
    remains: dict[tuple[int, ...], list[_C.Remains]] = {}
    for number, (ranks, what, device) in enumerate(bridges):
        key = tuple(ranks)
        if not key:
            found.append(None)
            continue
        forward, backward = pairs[key]
        payload = forward, backward
        if device is not None:
            # One pair for each bridge: what goes over NCCL is told apart by its order alone.
            payload = (
                nccl_group(meeting, key, what, device, f"{number}/f"),
                nccl_group(meeting, key, what, device, f"{number}/b"),
            )
        first_tag = TAGS * bridges_between[key]
        found.append(Groups(key, forward, backward, first_tag, devices, payload, remains.setdefault(key, [])))
        bridges_between[key] += 1
    return found


def nccl_group(
    meeting: Meeting, ranks: tuple[int, ...], what: str, device: torch.device, key: str
) -> dist.ProcessGroup:
    """A process group of NCCL, made by `ranks` alone, and connected: later nobody waits for anyone to do so.

    Never run: no machine with several GPUs was there.
    """
    assert meeting.store is not None
    store = dist.PrefixStore(f"nccl/{key}/{_digest(ranks)}", meeting.store)
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = False
    options._timeout = meeting.limit
    options.global_ranks_in_group = list(ranks)
    options.group_name = f"mimo_ext {meeting.turn} {key} {_digest(ranks)}"
    index = ranks.index(meeting.rank)
    backend = dist.ProcessGroupNCCL(store, index, len(ranks), options)
    backend._set_sequence_number_for_group()
    group = dist.ProcessGroup(store, index, len(ranks))
    group._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
    group._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, backend)
    group._set_group_desc(f"mimo_ext {what}")
    if len(ranks) > 1:
        backend.eager_connect_single_device(device)
    return group


def connected_ranks(source: _C.Boundary, destination: _C.Boundary, rank: int) -> list[int]:
    """The ranks that `rank` exchanges something with over a bridge, and that those do, and so on; [] outside of it.

    Lane i of n and lane j of m share samples where [i/n, (i+1)/n) and [j/m, (j+1)/m) overlap.
    """
    n, m = len(source.lanes), len(destination.lanes)
    # The line of samples is cut where lanes of both sides begin: no lane reaches across.
    cuts = [lane for lane in range(n) if lane * m % n == 0]
    pieces = []
    for begin, end in zip(cuts, [*cuts[1:], n], strict=True):
        lanes = [*source.lanes[begin:end], *destination.lanes[begin * m // n : end * m // n]]
        pieces.append({member for lane in lanes for member in lane})
    found = set[int]()
    # Ranks that are on both sides may join pieces.
    more = [piece for piece in pieces if rank in piece]
    while more:
        found.update(*more)
        pieces = [piece for piece in pieces if piece not in more]
        more = [piece for piece in pieces if not found.isdisjoint(piece)]
    return sorted(found)


class _Devices:
    """One of gloo's network devices (a thread) per interface."""

    def __init__(self, direction: str, interfaces: str) -> None:
        self.direction = direction
        make = dist.ProcessGroupGloo
        # As torch's own groups choose them. Lazy connections would wait for each other's first message.
        if len(interfaces) > 1:
            self.devices = [make.create_device(interface=name, lazy_init=False) for name in interfaces.split(",")]
        else:
            self.devices = [make.create_default_device(lazy_init=False)]


def _devices_for(direction: str) -> _Devices:
    if not dist.is_gloo_available():
        raise RuntimeError("expected a PyTorch that was built with gloo")
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
    key = os.getpid(), direction, interfaces
    devices = _devices.get(key)
    if devices is None:
        devices = _devices[key] = _Devices(direction, interfaces)
    return devices


def _digest(ranks: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, ranks)).encode()).hexdigest()[:16]


def _new_group(meeting: Meeting, ranks: tuple[int, ...], devices: _Devices, what: str) -> dist.ProcessGroup:
    assert meeting.store is not None
    store = dist.PrefixStore(f"{devices.direction}/{_digest(ranks)}", meeting.store)
    options = dist.ProcessGroupGloo._Options()
    options._devices = devices.devices
    options._threads = 0  # workers: only collectives need them
    options._timeout = meeting.limit
    index = ranks.index(meeting.rank)
    where = f"{what}, rank {meeting.rank}: connections for {devices.direction} traffic"
    try:
        backend = dist.ProcessGroupGloo(_Addresses(store, meeting, ranks), index, len(ranks), options)
    except RuntimeError as error:
        raise RuntimeError(f"{where}: {error}") from error
    group = dist.ProcessGroup(store, index, len(ranks))
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    group._set_group_desc(f"mimo_ext {what} {devices.direction}")
    _say_connected(meeting, ranks, devices.direction)
    return group


def _in_a_thread(function: Callable[..., dist.ProcessGroup], *args: Any) -> Future[dist.ProcessGroup]:
    """Whoever waits for the result may be interrupted, and leave: the thread keeps neither them nor the interpreter."""
    future: Future[dist.ProcessGroup] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="mimo_ext connect", daemon=True).start()
    return future


# A rank that has all its connections, and gives them up at once, would break those that others are still making.


def _connected_store(meeting: Meeting, ranks: tuple[int, ...]) -> dist.Store:
    assert meeting.store is not None
    return dist.PrefixStore(f"connected/{_digest(ranks)}", meeting.store)


def _say_connected(meeting: Meeting, ranks: tuple[int, ...], direction: str) -> None:
    store = _connected_store(meeting, ranks)
    store.set(f"{direction}/{meeting.rank}", "")
    if store.add("count", 1) == len(_DIRECTIONS) * len(ranks):
        store.set("all", "")


def _wait_until_all_are_connected(meeting: Meeting, ranks: tuple[int, ...], what: str) -> None:
    store = _connected_store(meeting, ranks)
    if wait_for(store, ["all"], meeting.limit):
        return
    missing = [rank for rank in ranks if not store.check([f"{direction}/{rank}" for direction in _DIRECTIONS])]
    raise RuntimeError(
        f"{what}, rank {meeting.rank}: connections: waited {meeting.limit.total_seconds():g} s for "
        f"{ranks_text(missing)} to make theirs"
    )


class _Addresses(dist.Store):
    """The store that a group connects through: gloo sets this rank's address and then gets one after the other.

    All are fetched at once. Keys are "device/rank in the group".
    """

    def __init__(self, inner: dist.Store, meeting: Meeting, ranks: Sequence[int]) -> None:
        super().__init__()
        self._inner = inner
        self._meeting = meeting
        self._ranks = ranks
        self._fetched: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        self._inner.set(key, value)

    def get(self, key: str) -> bytes:
        if key not in self._fetched:
            self._fetch(key)
        return self._fetched[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        return self._inner.check(keys)

    def has_extended_api(self) -> bool:
        return False

    def _fetch(self, key: str) -> None:
        device = key.rpartition("/")[0]
        keys = [f"{device}/{index}" for index in range(len(self._ranks))]
        if key not in keys:
            raise RuntimeError(f"expected a key of gloo like {keys[0]!r}, got {key!r}")
        if not wait_for(self._inner, keys, self._meeting.limit):
            missing = [rank for rank, one in zip(self._ranks, keys, strict=True) if not self._inner.check([one])]
            raise RuntimeError(f"waited {self._meeting.limit.total_seconds():g} s for {ranks_text(missing)}")
        self._fetched.update(zip(keys, self._inner.multi_get(keys), strict=True))
