"""Set-up on eight gloo ranks: process groups, threads and seconds, Megatron-Core's released classes against ours."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from busy import Usage, machine_usage, other_share, process_usage
from plan_records import record
from released import on_gloo, require_released

Made = tuple[Callable[[], None], Sequence[Any]]

RANKS = 8
DEADLINE_S = 180.0
PRELOADED = ["torch", "torch.distributed", "mimo_ext.megatron.communicator", "plan_setup"]
CASES = ({"tp": 4, "dp": 1}, {"tp": 4, "dp": 1}), ({"tp": 2, "dp": 2}, {"tp": 4, "dp": 1})


def grids(source: dict[str, int], destination: dict[str, int]) -> list[Any]:
    """Megatron's grids, one behind the other."""
    from megatron.core.hyper_comm_grid import HyperCommGrid

    made, offset = [], 0
    for sizes in (source, destination):
        shape = [sizes["tp"], 1, sizes["dp"], 1]
        made.append(HyperCommGrid(shape, ["tp", "cp", "dp", "pp"], offset, backend="gloo"))
        offset += sizes["tp"] * sizes["dp"]
    return made


def _config() -> Any:
    from megatron.core.model_parallel_config import ModelParallelConfig

    return ModelParallelConfig(pipeline_dtype=torch.float32)


# Each of these makes one and returns how to take it down again, and the bridges that it is made of.


def released_bridge(source: Any, destination: Any) -> Made:
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator

    BridgeCommunicator(source, destination, comm_dtype=torch.float32)
    return _take_down_released, []


def our_bridge(source: Any, destination: Any) -> Made:
    from mimo_ext.megatron.communicator import BridgeCommunicator

    made = BridgeCommunicator(source, destination, comm_dtype=torch.float32)
    return made.close, [made.bridge]


def _of_modules(source: Any, destination: Any) -> tuple[Any, ...]:
    axes = {"s": 0, "b": 1, "h": 2}
    return {"images": source, "language": destination}, {"images": ["language"], "language": []}, _config(), axes


def released_communicator(source: Any, destination: Any) -> Made:
    from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator

    MultiModulePipelineCommunicator(*_of_modules(source, destination))
    return _take_down_released, []


def our_communicator(source: Any, destination: Any) -> Made:
    from mimo_ext.megatron.communicator import MultiModulePipelineCommunicator

    made = MultiModulePipelineCommunicator(*_of_modules(source, destination))
    return made.close, [edge.bridge for edge in made.bridge_comms]


def _take_down_released() -> None:
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator

    BridgeCommunicator.destroy_broadcast_pgs()
    BridgeCommunicator.destroy_bridge_pgs()


PAIRS = {
    "BridgeCommunicator": (released_bridge, our_bridge),
    "MultiModulePipelineCommunicator": (released_communicator, our_communicator),
}


# On every rank


def threads() -> int:
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


def groups(bridges: Sequence[Any] = ()) -> set[str]:
    """The process groups that this rank is a member of: the world's by their names, our bridges' by their ranks."""
    held = [bridge._groups for bridge in bridges if bridge._groups is not None]
    ours = {f"{direction} {groups.ranks}" for groups in held for direction in ("forward", "backward")}
    return ours | set(dist.distributed_c10d._world.pg_names.values())


def measure(make: Callable[..., Made], case: tuple[dict[str, int], dict[str, int]]) -> dict[str, Any]:
    """Make it once; what it took on this rank."""
    pair = grids(*case)
    for grid in pair:
        grid.create_pg(["pp"])  # a communicator asks the grids for these; they are the model's, not its own
    dist.barrier()
    groups_before, threads_before = groups(), threads()
    begin = time.perf_counter()
    take_down, bridges = make(*pair)
    seconds = time.perf_counter() - begin
    result = {
        "seconds": seconds,
        "groups": sorted(groups(bridges) - groups_before),
        "threads": threads() - threads_before,
    }
    dist.barrier()
    take_down()
    for grid in pair:
        grid.destroy()
    dist.barrier()
    deadline = time.monotonic() + 5.0
    while threads() > threads_before and time.monotonic() < deadline:
        time.sleep(0.01)  # threads of a group end a moment after it
    return result


def on_rank(repeats: int) -> tuple[list[dict[str, Any]], Usage, Usage]:
    """All cases, interleaved: the released class, then ours, again and again. One warm-up each.

    Returns what was measured, and the processor time of the machine and of this rank meanwhile.
    """
    import mimo_ext.megatron

    results = []
    dist.barrier()
    machine, mine = machine_usage(), process_usage()
    with mimo_ext.megatron.cpu(), on_gloo(timedelta(seconds=DEADLINE_S)):
        for case in CASES:
            for name, makers in PAIRS.items():
                for repeat in range(repeats + 1):
                    for method, make in zip(("released", "ours"), makers, strict=True):
                        result = measure(make, case)
                        if repeat:
                            results.append({"case": case, "name": name, "method": method, **result})
    dist.barrier()
    return results, machine_usage() - machine, process_usage() - mine


def _rank_main(rank: int, port: int, repeats: int, pipe: multiprocessing.connection.Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.TCPStore("localhost", port, RANKS, is_master=False),
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(seconds=DEADLINE_S),
        )
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            pipe.send((True, on_rank(repeats)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    pipe.close()
    # Peers of a rank that failed may never come: end without waiting for them.
    threading.Timer(5.0, os._exit, (1,)).start()
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)


def run_ranks(repeats: int) -> list[tuple[list[dict[str, Any]], Usage, Usage]]:
    """What `on_rank` returned on every rank.

    Raises:
        RuntimeError: a rank failed or did not answer in time, with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ranks: list[Any] = []
    # As torchrun's: the ranks meet at a store in a process of its own.
    store = dist.TCPStore("localhost", 0, RANKS, is_master=True, wait_for_workers=False)
    try:
        for rank in range(RANKS):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, args=(rank, store.port, repeats, theirs))
            process.start()
            theirs.close()
            ranks.append((process, ours))
        deadline = time.monotonic() + DEADLINE_S
        results: list[Any] = [None] * len(ranks)
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
        while waiting:
            answered = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not answered:
                raise RuntimeError(f"ranks {sorted(waiting.values())} did not answer within {DEADLINE_S:.0f} s")
            for pipe in answered:
                rank = waiting.pop(pipe)
                good, value = _answer(pipe)
                if not good:
                    raise RuntimeError(f"rank {rank} failed:\n{value}")
                results[rank] = value
        for process, _ in ranks:
            process.join(10.0)
        return results
    finally:
        for process, pipe in ranks:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
            pipe.close()


def _answer(pipe: Any) -> tuple[bool, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return False, "it ended without a word"


def setup(repeats: int) -> Iterator[dict[str, Any]]:
    """One record per layout and class.

    Raises:
        ReleasedUnavailable: there is no Megatron-Core.
    """
    require_released()
    begin = process_usage()
    by_rank, machine, usages = zip(*run_ranks(repeats), strict=True)
    busy = other_share(machine[0], [*usages, process_usage() - begin])
    runs = [_together(items) for items in zip(*by_rank, strict=True)]
    for case in CASES:
        for name in PAIRS:
            mine = [run for run in runs if run["case"] == case and run["name"] == name]
            released, ours = ([run for run in mine if run["method"] == method] for method in ("released", "ours"))
            ratios = [theirs["seconds"] / own["seconds"] for theirs, own in zip(released, ours, strict=True)]
            yield record(
                name=f"set-up of {name}",
                layout="-".join(_sizes_text(sizes) for sizes in case),
                method="replicated",
                ratio_median=statistics.median(ratios),
                ratio_lo=min(ratios),
                ratio_hi=max(ratios),
                repeats=len(ratios),
                busy=busy,
                ranks=RANKS,
                ours=_summary(ours),
                released=_summary(released),
            )


def _sizes_text(sizes: dict[str, int]) -> str:
    return "".join(f"{dim}{size}" for dim, size in sizes.items() if size > 1) or "tp1"


def _together(items: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One construction, all ranks: the slowest rank's time, the most threads, the groups that any rank is in."""
    return {
        **{key: items[0][key] for key in ("case", "name", "method")},
        "seconds": max(item["seconds"] for item in items),
        "threads": max(item["threads"] for item in items),
        "groups": len({name for item in items for name in item["groups"]}),
    }


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [run["seconds"] for run in runs]
    return {
        "process_groups": max(run["groups"] for run in runs),
        "threads": max(run["threads"] for run in runs),
        "seconds_median": statistics.median(seconds),
        "seconds_lo": min(seconds),
        "seconds_hi": max(seconds),
    }
