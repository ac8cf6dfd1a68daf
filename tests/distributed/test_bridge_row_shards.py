"""Row shards across the bridge on real ranks: each rank of a destination lane has its rows alone, and back."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bridge_reference import Case, find, global_gradients, lane_samples, lane_slice, local_tensor
from launch import launch

import mimo_ext
from mimo_ext import Layout, RowShards

RAGGED = (3, 0, 7, 1, 4, 2)
CHUNKS = {"path": "pipelined", "max_chunks": 3, "min_chunk_bytes": 8}
CASES = [
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "tp": 2}, rows=RAGGED, name="fan-in to tp 2"),
    Case({"ranks": range(2), "tp": 2}, {"ranks": range(2, 6), "cp": 2, "dp": 2}, rows=RAGGED, name="fan-out to cp 2"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 8), "tp": 3, "dp": 2}, rows=RAGGED, name="equal dp, tp 3"),
    Case({"ranks": range(3), "dp": 3}, {"ranks": range(3, 7), "tp": 2, "dp": 2}, rows=RAGGED, name="non-dividing"),
    Case({"ranks": range(4), "tp": 2, "dp": 2}, {"ranks": range(4, 8), "tp": 2, "cp": 2}, rows=RAGGED, name="tp x cp"),
    Case({"ranks": range(4), "cp": 2, "dp": 2}, {"ranks": range(4, 8), "cp": 4}, rows=RAGGED, name="source cp copies"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 8), "tp": 3, "cp": 2}, rows=(2,) * 6, name="equal counts"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "tp": 2}, rows=(0,) * 6, name="no rows"),
    Case(
        {"ranks": range(2), "dp": 2}, {"ranks": range(2, 6), "tp": 2, "cp": 2}, rows=RAGGED, extra=CHUNKS, name="chunks"
    ),
    Case(
        {"ranks": range(4), "dp": 4},
        {"ranks": range(4), "tp": 2, "cp": 2},
        rows=(*RAGGED, 5, 3),
        samples=8,
        name="same ranks",
    ),
    Case({"ranks": range(4), "tp": 4}, {"ranks": range(2, 6), "tp": 2, "dp": 2}, rows=RAGGED, name="overlapping ranks"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "tp": 2}, rows=RAGGED, dtype=torch.bfloat16, name="bf16"),
]
WORLD = 8
MICROBATCHES = 4


def shards_of(case: Case, num_shards: int, seed: int) -> list[list[int]]:
    """The shard of every row, by sample: in runs, as positions give them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, num_shards, (rows,), generator=generator).sort(descending=bool(seed % 2)).values.tolist()
        for rows in case.row_counts()
    ]


def known(shards: list[list[int]], num_shards: int, lane: int, lanes: int) -> RowShards:
    """What a rank of a lane knows."""
    first, last = lane_samples(len(shards), lane, lanes)
    segments = [[(shard, 1) for shard in sample] for sample in shards[first:last]]
    return RowShards(segments, num_shards, len(shards), first)


def own_rows(
    case: Case, dst: Layout, whole: torch.Tensor, shards: list[list[int]], lane: int, shard: int
) -> torch.Tensor:
    """Rows of a shard of a destination lane."""
    first, last = lane_samples(case.samples, lane, len(dst.lanes()))
    of_lane = [s for sample in shards[first:last] for s in sample]
    mine = [row for row, s in enumerate(of_lane) if s == shard]
    return lane_slice(case, whole, lane, len(dst.lanes()))[mine]


def run_case(rank: int, case: Case, tp_replicas: bool) -> None:
    """Microbatches with row shards, other ones each time, and one without; all under way at once."""
    src, dst = case.layouts()
    num_shards = dst.cp if tp_replicas else dst.tp * dst.cp
    bridge = mimo_ext.Bridge(src, dst, ndim=2, dtype=case.dtype, **case.extra)
    here_src, here_dst = find(src, rank, -1), find(dst, rank, 0)
    shard = None if here_dst is None else here_dst[1] // dst.tp if tp_replicas else here_dst[1]
    dealt = [None if step == 1 else shards_of(case, num_shards, step) for step in range(MICROBATCHES)]
    for step, shards in enumerate(dealt):
        whole = case.global_tensor(step)
        if here_src is not None:
            options: dict[str, Any] = {}
            if shards is None:
                first, last = lane_samples(case.samples, here_src[0], len(src.lanes()))
                options = {"row_counts": case.row_counts()[first:last], "num_samples": case.samples}
            else:
                options = {"row_shards": known(shards, num_shards, here_src[0], len(src.lanes()))}
            bridge.send_forward(local_tensor(case, src, whole, *here_src), **options)
        if here_dst is not None:
            if shards is None:
                y, expected = bridge.recv_forward(), local_tensor(case, dst, whole, *here_dst)
            else:
                mine = known(shards, num_shards, here_dst[0], len(dst.lanes()))
                y = bridge.recv_forward(row_shards=mine) if step % 2 else bridge.irecv_forward(row_shards=mine).wait()
                expected = own_rows(case, dst, whole, shards, here_dst[0], shard)
            assert y.requires_grad
            torch.testing.assert_close(y.detach(), expected, rtol=0, atol=0)
    for step, shards in enumerate(dealt):
        # Without row shards the gradients of cp copies are partial. With them every row has one gradient.
        partial = global_gradients(case, dst, step) if shards is None else [case.global_tensor(step + 1000)]
        if here_dst is not None:
            copy = here_dst[1] // dst.tp if len(partial) > 1 else 0
            if shards is None:
                bridge.send_backward(local_tensor(case, dst, partial[copy], *here_dst))
            else:
                bridge.send_backward(own_rows(case, dst, partial[0], shards, here_dst[0], shard))
        if here_src is not None:
            expected = local_tensor(case, src, torch.stack(partial).sum(0), *here_src)
            torch.testing.assert_close(bridge.recv_backward(), expected, rtol=0, atol=0)
    bridge.close()


def run_cases(rank: int, world_size: int, cases: list[Case]) -> None:
    for case in cases:
        for tp_replicas in (False, True):
            try:
                run_case(rank, case, tp_replicas)
            except BaseException as error:
                raise AssertionError(f"case {case.name!r}, tp_replicas={tp_replicas}") from error


def test_values():
    launch(run_cases, WORLD, CASES, timeout=120)


def evaluation(rank: int, world_size: int) -> None:
    case = CASES[0]
    src, dst = case.layouts()
    bridge = mimo_ext.Bridge(src, dst, ndim=2)
    here_src, here_dst = find(src, rank, -1), find(dst, rank, 0)
    shards = shards_of(case, 2, 0)
    whole = case.global_tensor(0)
    with torch.no_grad():
        if here_src is not None:
            x = local_tensor(case, src, whole, *here_src)
            bridge.send_forward(x, row_shards=known(shards, 2, here_src[0], 2))
        else:
            y = bridge.recv_forward(row_shards=known(shards, 2, 0, 1))
            assert not y.requires_grad
            assert torch.equal(y, own_rows(case, dst, whole, shards, 0, here_dst[1]))
    # A gradient that is not there on one rank is zero for its rows.
    if here_src is not None:
        bridge.send_forward(x, row_shards=known(shards, 2, here_src[0], 2))
        assert bridge.recv_backward() is None
    else:
        bridge.recv_forward(row_shards=known(shards, 2, 0, 1))
        bridge.send_backward(None)
    bridge.close()


def test_evaluation_and_absent_gradients():
    launch(evaluation, 4)


def refusals(rank: int, world_size: int) -> list[str]:
    """One bridge per wrong use: what the ranks say."""
    src, dst = Layout([0], name="images"), Layout([1, 2], tp=2, name="language")
    shards = RowShards([[(0, 1), (1, 2)], [(1, 1)]], 2)
    x = torch.arange(8.0).view(4, 2)
    wrong: list[dict[str, Any]] = [
        {"recv": None},
        {"send": None},
        {"recv": RowShards([[(0, 2), (1, 1)], [(1, 1)]], 2)},
        {"recv": RowShards([[(1, 1)]], 2, num_samples=2, first_sample=1)},
    ]
    texts = []
    for options in wrong:
        bridge = mimo_ext.Bridge(src, dst, ndim=2, timeout=timedelta(seconds=20))
        given = {"send": shards, "recv": shards} | options
        try:
            if rank == 0:
                bridge.send_forward(x, row_shards=given["send"], row_counts=[3, 1])
            else:
                bridge.recv_forward(row_shards=given["recv"])
            texts.append("")
        except mimo_ext.BridgeError as error:
            texts.append(str(error))
        dist.barrier()  # a rank that hung up early would be an error of its own
        bridge.close(abort=True)
    # What a rank can see by itself, before anything is sent.
    bridge = mimo_ext.Bridge(src, dst, ndim=2)
    if rank == 0:
        for arguments, message in [
            ({"row_shards": shards, "row_counts": [2, 2]}, "row_shards: other row counts than row_counts"),
            ({"row_shards": shards, "num_samples": 3}, "expected shards of 3 samples, got 2"),
            ({"row_shards": RowShards([[(0, 4)]], 2, 2)}, r"expected those of samples 0\.\.1 \(lane 0\), got none of"),
            ({"row_shards": RowShards([[(0, 5)]], 2)}, "5"),
        ]:
            with pytest.raises(ValueError, match=message):
                bridge.send_forward(x, **arguments)
        bridge.send_forward(x, row_shards=shards)
    else:
        expected = x[[0]] if rank == 1 else x[[1, 2, 3]]
        assert torch.equal(bridge.recv_forward(row_shards=shards).detach(), expected)
    bridge.close()
    return texts


def test_sides_that_differ_are_refused_and_say_how():
    ranks = launch(refusals, 3, timeout=100)
    patterns = [
        "bridge 'images -> language', rank {}: .* rank 0 deals the rows of module 'images' .*expected none, got shards",
        "rank {}: .* deals the rows of module 'images' in another way .*expected shards with hash .*, got none",
        "rank {}: .* deals the rows of module 'images' in another way .*expected shards with hash .*, got shards with",
        "rank {}: .*row_shards: .*samples .* are needed, those of .* are known here",
    ]
    for rank in (1, 2):
        for text, pattern in zip(ranks[rank], patterns, strict=True):
            assert re.search(pattern.format(rank), text), (rank, text)
