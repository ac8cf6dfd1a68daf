#!/usr/bin/env python3
"""Does the emulated cluster hold its links to their rates? Plain TCP streams over each kind of path, without torch.

    sudo python benchmarks/check_emulation.py

Prints the rate that was set, the rate that was measured and their quotient (frame headers take 0.7 %), for one stream
between hosts, one inside a host, both ways at once, and three ranks that send to one. Ends with status 1 where one is
more than 5 % off.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P

from emulation import EmulatedCluster, EmulationUnavailable, Rates, enter_namespace

SECONDS = 1.5
TOLERANCE = 0.05
PORT = 20000
Stream = tuple[int, int]  # sender, receiver


def main() -> int:
    rates = Rates(200, 1440)
    cases: list[tuple[str, list[Stream], float]] = [
        ("between hosts", [(0, 4)], rates.nic_mbit),
        ("between hosts, both ways at once", [(0, 4), (4, 0)], 2 * rates.nic_mbit),
        ("between hosts, three to one", [(0, 4), (1, 4), (2, 4)], rates.nic_mbit),
        ("between hosts, four pairs", [(0, 4), (1, 5), (2, 6), (3, 7)], 4 * rates.nic_mbit),
        ("inside a host", [(0, 1)], rates.nvl_mbit),
        ("inside a host, two to one", [(0, 1), (2, 1)], rates.nvl_mbit),
    ]
    off = False
    try:
        with EmulatedCluster([(0, 1, 2, 3), (4, 5, 6, 7)], rates) as cluster:
            for words, streams, mbit in cases:
                measured = _measure(cluster, streams)
                off |= abs(measured / mbit - 1) > TOLERANCE
                print(f"{words:34} set {mbit:7.0f} Mbit/s  measured {measured:7.0f}  quotient {measured / mbit:.3f}")
    except EmulationUnavailable as reason:
        print(f"skipped: {reason}", file=sys.stderr)
        return 77
    return int(off)


def _measure(cluster: EmulatedCluster, streams: Sequence[Stream]) -> float:
    """Mbit/s of payload of all streams together, in the middle of their time."""
    context = multiprocessing.get_context("fork")
    results, processes = [], []
    for index, (sender, receiver) in enumerate(streams):
        mine, theirs = context.Pipe(duplex=False)
        address = (cluster.address(receiver), PORT + index)
        ready = context.Event()
        receiving = context.Process(target=_receive, args=(cluster.namespace(receiver), address, ready, theirs))
        sending = context.Process(target=_send, args=(cluster.namespace(sender), address, ready))
        for process in (receiving, sending):
            process.start()
            processes.append(process)
        results.append(mine)
    try:
        return sum(result.recv() for result in results) * 8 / 1e6 if all(r.poll(20) for r in results) else 0.0
    finally:
        for process in processes:
            process.kill()
            process.join()


def _receive(namespace: str, address: tuple[str, int], ready: Event, result: Connection) -> None:
    enter_namespace(namespace)
    with socket.create_server(address) as server:
        ready.set()
        connection, _ = server.accept()
    buffer = bytearray(1 << 20)
    # The first part fills buckets and buffers.
    end, received = time.monotonic() + 0.5, 0
    while time.monotonic() < end:
        connection.recv_into(buffer)
    begun = time.monotonic()
    end = begun + SECONDS
    while (now := time.monotonic()) < end:
        received += connection.recv_into(buffer)
    result.send(received / (now - begun))
    time.sleep(SECONDS)  # the others are still measuring: their sender should have the same company


def _send(namespace: str, address: tuple[str, int], ready: Event) -> None:
    enter_namespace(namespace)
    ready.wait()
    data = bytes(1 << 18)
    # The receiver hangs up when it has seen enough.
    with contextlib.suppress(ConnectionError), socket.create_connection(address) as connection:
        while True:
            connection.sendall(data)


if __name__ == "__main__":
    sys.exit(main())
