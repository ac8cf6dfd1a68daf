"""A cluster on one machine: a network namespace per rank, with a network card of its own and a faster path in its host.

    with EmulatedCluster(hosts=[(0, 1, 2, 3), (4, 5, 6, 7)], rates=Rates(nic_mbit=200, nvl_mbit=1440)) as cluster:
        cluster.enter(rank)      # in the process that becomes the rank, before it starts a thread

Every namespace has two links: `nic0` into a bridge that joins all hosts, and `nvl0` into the bridge of its host. A rank
has one address; /32 routes send what is for a rank of the same host over `nvl0` and everything else over `nic0`, so
that a program that knows one interface (gloo) takes the right path. Token buckets on both ends of every link hold it to
its rate in both directions. The bridges live in one more namespace: removing the namespaces removes everything.

Needs root, `ip` and `tc`. Names hold the process that made them: what a killed run has left behind is removed by the
next.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

NETNS = Path("/run/netns")
MTU = 9000
BURST_BYTES = 16 * 1024
BURST_S = 0.7e-3  # a slow link's bucket is smaller: it must not carry a good part of a payload for nothing
LEAST_BURST_BYTES = MTU + 512  # a packet must fit
# Inside a host: a bucket that holds the 64 KiB which the kernel handles as one packet. A smaller one has it cut into
# frames, and two cores are then busy with frames instead of links: 8 ranks that copy to 8 ranks reached half the rate.
IN_HOST_BURST_BYTES = 80 * 1024
# What a port buffers before it drops: enough for the fan-in of all ranks, as fabrics for training lose nothing.
BUFFER_BYTES = 8 * 1024 * 1024
# Linux's default, whatever this machine is set to: figures of different machines must be comparable.
CONGESTION_CONTROL = "cubic"
CLONE_NEWNET = 0x40000000

_NAME = re.compile(r"^mimo-ext-(\d+)-(\d+)-(hub|r\d+)$")


class EmulationUnavailable(RuntimeError):
    """This machine cannot emulate a cluster; the text says what is missing."""


@dataclass(frozen=True)
class Rates:
    """Of every link, in both directions, in Mbit/s."""

    nic_mbit: float
    nvl_mbit: float

    @property
    def nic_bytes_per_s(self) -> float:
        return self.nic_mbit * 1e6 / 8

    @property
    def nvl_bytes_per_s(self) -> float:
        return self.nvl_mbit * 1e6 / 8


class Loopback:
    """No cluster: ranks that talk over the machine's own loopback. Used as `EmulatedCluster`; needs nothing."""

    interface = "lo"

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def namespace(self, rank: int) -> None:
        """The ranks stay where they are started."""

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: object) -> None: ...


class EmulatedCluster:
    """A context manager: the namespaces exist inside of it, and are removed however it is left.

    Args:
        hosts: the ranks of each host; together 0 .. n-1, each once.
        rates: of the links.

    Raises:
        ValueError: ranks that are missing, or on two hosts.
        EmulationUnavailable: on entering: not root, tools that are missing, or a kernel without them.
    """

    interface = "nic0"  # of every rank: the one with its address

    def __init__(self, hosts: Sequence[Sequence[int]], rates: Rates) -> None:
        self.hosts = tuple(tuple(host) for host in hosts)
        self.rates = rates
        ranks = sorted(rank for host in self.hosts for rank in host)
        if ranks != list(range(len(ranks))) or len(ranks) > 250:
            raise ValueError(f"hosts: expected the ranks 0 .. n-1 (at most 250), each once, got {self.hosts}")
        self.world_size = len(ranks)
        self._prefix = f"mimo-ext-{os.getpid()}-{_start_time(os.getpid())}"

    def namespace(self, rank: int) -> str:
        """Name of the rank's namespace."""
        return f"{self._prefix}-r{rank}"

    def address(self, rank: int) -> str:
        """The rank's only address."""
        return f"10.213.0.{rank + 1}"

    def host_of(self, rank: int) -> int:
        return next(index for index, host in enumerate(self.hosts) if rank in host)

    def __enter__(self) -> EmulatedCluster:
        require_tools()
        remove_leftovers()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def enter(self, rank: int) -> None:
        """Move the calling thread, and the threads that it starts later, into the namespace of `rank`."""
        enter_namespace(self.namespace(rank))

    def _build(self) -> None:
        hub = f"{self._prefix}-hub"
        names = [hub, *(self.namespace(rank) for rank in range(self.world_size))]
        _run("ip", "-batch", "-", lines=[f"netns add {name}" for name in names])
        for name in names:
            # Nothing but what the ranks send: no neighbour discovery of IPv6, no router solicitations.
            _sysctl(name, "net.ipv6.conf.all.disable_ipv6=1", may_fail=True)
            _sysctl(name, f"net.ipv4.tcp_congestion_control={CONGESTION_CONTROL}")
        _run("ip", "-n", hub, "-batch", "-", lines=self._hub_lines())
        limits = []
        for rank in range(self.world_size):
            _run("ip", "-n", self.namespace(rank), "-batch", "-", lines=self._rank_lines(rank))
            own = [_limit("nic0", self.rates.nic_mbit), _in_host_limit("nvl0", self.rates.nvl_mbit)]
            _run("tc", "-n", self.namespace(rank), "-batch", "-", lines=own)
            # A rank's ingress is the egress of the other end.
            limits += [_limit(f"f{rank}", self.rates.nic_mbit), _in_host_limit(f"v{rank}", self.rates.nvl_mbit)]
        _run("tc", "-n", hub, "-batch", "-", lines=limits)

    def _hub_lines(self) -> list[str]:
        bridges = ["fabric", *(f"host{index}" for index in range(len(self.hosts)))]
        lines = [f"link add name {bridge} type bridge" for bridge in bridges]
        for rank in range(self.world_size):
            for port, peer, bridge in (
                (f"f{rank}", "nic0", "fabric"),
                (f"v{rank}", "nvl0", f"host{self.host_of(rank)}"),
            ):
                lines.append(
                    f"link add name {port} mtu {MTU} type veth peer name {peer} mtu {MTU} netns {self.namespace(rank)}"
                )
                lines.append(f"link set {port} master {bridge} up")
        return [*lines, *(f"link set {bridge} up" for bridge in bridges)]

    def _rank_lines(self, rank: int) -> list[str]:
        own = self.address(rank)
        lines = ["link set lo up", "link set nic0 up", "link set nvl0 up", f"address add {own}/32 dev nic0"]
        for peer in range(self.world_size):
            if peer != rank:
                link = "nvl0" if self.host_of(peer) == self.host_of(rank) else "nic0"
                lines.append(f"route add {self.address(peer)}/32 dev {link} src {own}")
        return lines

    def _remove(self) -> None:
        _remove_namespaces(name for name in _namespaces() if name.startswith(f"{self._prefix}-"))


def require_tools() -> None:
    """Raises EmulationUnavailable, naming what is missing."""
    if not sys.platform.startswith("linux"):
        raise EmulationUnavailable(f"network namespaces need Linux, this is {sys.platform}")
    if os.geteuid() != 0:
        raise EmulationUnavailable("network namespaces need root, this is user " + str(os.geteuid()))
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise EmulationUnavailable(f"{' and '.join(missing)} not found: install iproute2")


def remove_leftovers() -> list[str]:
    """Remove the namespaces of runs whose process is gone; returns their names."""
    stale = leftovers(_namespaces(), _start_time)
    _remove_namespaces(stale)
    return stale


def leftovers(names: Iterable[str], start_time: Callable[[int], int | None]) -> list[str]:
    """Those of `names` that are ours and whose maker is gone.

    Args:
        start_time: of a process; None where there is none. A process that was given the number of an earlier one has
            another.
    """
    stale = []
    for name in names:
        match = _NAME.match(name)
        if match and start_time(int(match[1])) != int(match[2]):
            stale.append(name)
    return stale


def enter_namespace(name: str) -> None:
    """As `EmulatedCluster.enter`, by name. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(NETNS / name) as handle:
        if libc.setns(handle.fileno(), CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"entering the network namespace {name}: {os.strerror(number)}")


def _limit(link: str, mbit: float) -> str:
    return _token_bucket(link, mbit, min(BURST_BYTES, max(LEAST_BURST_BYTES, round(mbit * 1e6 / 8 * BURST_S))))


def _in_host_limit(link: str, mbit: float) -> str:
    return _token_bucket(link, mbit, IN_HOST_BURST_BYTES)


def _token_bucket(link: str, mbit: float, burst: int) -> str:
    return f"qdisc add dev {link} root tbf rate {round(mbit * 1e6)}bit burst {burst} limit {BUFFER_BYTES}"


def _namespaces() -> list[str]:
    return sorted(path.name for path in NETNS.iterdir()) if NETNS.is_dir() else []


def _remove_namespaces(names: Iterable[str]) -> None:
    for name in names:
        _run("ip", "netns", "delete", name, may_fail=True)


def _start_time(pid: int) -> int | None:
    """In clock ticks since the machine was started; None where there is no such process."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        # The name of the program, in parentheses, may hold anything.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None


def _sysctl(namespace: str, setting: str, may_fail: bool = False) -> None:
    _run("ip", "netns", "exec", namespace, "sysctl", "-qw", setting, may_fail=may_fail)


def _run(*command: str, lines: Sequence[str] | None = None, may_fail: bool = False) -> None:
    # In a session of its own: Ctrl-C reaches this process alone, which then cleans up.
    done = subprocess.run(
        command,
        input=None if lines is None else "\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    if done.returncode != 0 and not may_fail:
        words = (done.stderr or done.stdout).strip()
        raise EmulationUnavailable(f"'{' '.join(command)}' failed: {words}")
