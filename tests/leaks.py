"""What a process holds, and what it still holds when it should have let go: threads, descriptors, groups, storages."""

from __future__ import annotations

import gc
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import mimo_ext
from mimo_ext import _groups, flight

PATIENCE_S = 5.0  # for threads that are about to end
# Made once by whoever first needs them, and kept for the next time.
OWN_THREADS = re.compile(r"pt_autograd_\d+|pt_main_thread|cuda-.*|tqdm.*")
# What a process group of torch's holds. Ours have no run loops, and their devices are counted by themselves.
OF_GROUPS = re.compile(
    r"thread (gloo_tcp_loop|pt_gloo_runloop|python)|descriptor (anon_inode|pipe|socket)|process group"
)
OWN_DESCRIPTORS = re.compile(r"/dev/(u?random|null|shm/.*)|/proc/.*|/sys/.*")


@dataclass(frozen=True)
class Level:
    """What this process holds at one moment.

    Attributes:
        held: by what it is: "thread mimo-send-fwd", "descriptor socket", "process group", "bridge", "gloo device".
    """

    held: Counter[str]

    @classmethod
    def now(cls) -> Level:
        held = Counter(f"thread {name}" for name in _threads() if not OWN_THREADS.fullmatch(name))
        held += Counter(f"descriptor {name}" for name in _descriptors() if not OWN_DESCRIPTORS.fullmatch(name))
        held["process group"] = len(dist.distributed_c10d._world.pg_map)
        held["gloo device"] = len(_groups._devices)
        held["bridge"] = len(flight._bridges)
        return cls(+held)

    def growth(self, groups: bool = True) -> list[str]:
        """What is there now and was not at this level: "2 x thread mimo-send-fwd". Gives it time to go.

        `groups`: with what process groups of torch's hold.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            more = Level.now().held - self.held
            if not groups:
                more = Counter({what: count for what, count in more.items() if not OF_GROUPS.fullmatch(what)})
            if not more or time.monotonic() > deadline:
                return [f"{count} x {what}" for what, count in sorted(more.items())]
            gc.collect()
            time.sleep(0.02)


def _threads() -> list[str]:
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm") as file:
                names.append(file.read().strip())
        except OSError:  # it has just ended
            continue
    return names


def _descriptors() -> list[str]:
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{descriptor}").split(":[")[0])
        except OSError:  # that of listdir
            continue
    return names


class Storages:
    """The storages of all tensors that go through a bridge while it is installed, sent and received.

    A context manager. `alive()` says which of them somebody still holds.
    """

    def __init__(self) -> None:
        self._seen: dict[int, str] = {}  # weak reference -> what it is
        self._enough = 100
        self._connect: Any = None

    def __enter__(self) -> Storages:
        self._connect = connect = mimo_ext.Bridge._connect
        storages = self

        def connect_and_watch(bridge: mimo_ext.Bridge, *arguments: Any) -> None:
            connect(bridge, *arguments)
            bridge._open = _Watched(bridge._communicator, storages, bridge.name)

        mimo_ext.Bridge._connect = connect_and_watch
        return self

    def __exit__(self, *_: object) -> None:
        mimo_ext.Bridge._connect = self._connect
        for reference in self._seen:
            torch.UntypedStorage._free_weak_ref(reference)
        self._seen.clear()

    def add(self, tensors: Iterable[Any], what: str) -> None:
        for tensor in tensors:
            # Sparse and meta tensors are refused by the bridge, and have no storage to hold.
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                # A weak reference keeps the address, though not the data: it stands for this storage alone.
                if storage._cdata not in self._seen:
                    self._seen[storage._weak_ref()] = f"{what} {list(tensor.shape)} {tensor.dtype}"
        if len(self._seen) >= self._enough:
            # A long run must not grow by being watched.
            for reference in [reference for reference in self._seen if torch.UntypedStorage._expired(reference)]:
                torch.UntypedStorage._free_weak_ref(reference)
                del self._seen[reference]
            self._enough = 2 * len(self._seen) + 100

    def alive(self, module: str) -> list[str]:
        """Those that are held by anything but the global variables of the module. Gives them time to go."""
        for value in vars(sys.modules[module]).values():
            if isinstance(value, torch.Tensor):
                self._seen.pop(value.untyped_storage()._cdata, None)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            held = [what for reference, what in self._seen.items() if not torch.UntypedStorage._expired(reference)]
            if not held or time.monotonic() > deadline:
                return [f"{count} x storage of {what}" for what, count in sorted(Counter(held).items())]
            gc.collect()
            time.sleep(0.02)


class _Watched:
    """A communicator whose tensors are noted."""

    def __init__(self, communicator: Any, storages: Storages, name: str) -> None:
        self._communicator = communicator
        self._storages = storages
        self._name = name

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._communicator, name)
        if name not in ("send_forward", "send_backward", "recv_forward", "recv_backward", "wait"):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            self._storages.add([*arguments, *options.values()], f"bridge '{self._name}' {name}:")
            result = found(*arguments, **options)
            self._storages.add([result], f"bridge '{self._name}' {name}:")
            return result

        return call
