"""Values across the bridge, forward and backward, on real ranks, against a slow reference."""

import pytest
import torch
from bridge_reference import Case, find, global_gradients, lane_samples, lane_slice, local_tensor
from launch import launch

import mimo_ext

RAGGED = (3, 0, 7, 1, 4, 2)
CHUNKS = {"path": "pipelined", "max_chunks": 3, "min_chunk_bytes": 8}
CASES = [
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "tp": 2}, name="fan-in"),
    Case({"ranks": range(2), "tp": 2}, {"ranks": range(2, 4), "dp": 2}, name="fan-out"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "dp": 2}, name="equal dp"),
    Case({"ranks": range(3), "dp": 3}, {"ranks": range(3, 5), "dp": 2}, name="non-dividing dp"),
    Case({"ranks": range(3), "dp": 3}, {"ranks": range(3, 5), "dp": 2}, samples=7, rows=(*RAGGED, 5), name="uneven"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 6), "tp": 2, "dp": 2}, rows=RAGGED, name="ragged equal"),
    Case({"ranks": range(4), "tp": 2, "dp": 2}, {"ranks": range(4, 6), "tp": 2}, rows=RAGGED, name="ragged fan-in"),
    Case({"ranks": range(2), "tp": 2}, {"ranks": range(2, 5), "dp": 3}, rows=RAGGED, name="ragged fan-out"),
    Case({"ranks": range(3), "dp": 3}, {"ranks": range(3, 5), "dp": 2}, rows=RAGGED, name="ragged non-dividing"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "tp": 2}, rows=(0,) * 6, name="no rows"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "tp": 2}, pass_counts=False, name="even, no counts"),
    Case({"ranks": range(3), "tp": 3}, {"ranks": range(3, 8), "tp": 5}, hidden=8, name="tp 3 to 5"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 6), "tp": 2, "cp": 2}, rows=RAGGED, name="cp copies"),
    Case({"ranks": range(4), "cp": 2, "dp": 2}, {"ranks": range(4, 6), "dp": 2}, rows=RAGGED, name="source cp copies"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "tp": 2}, ndim=3, batch_dim=0, name="3-D bsh"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "tp": 2}, ndim=3, batch_dim=1, name="3-D sbh"),
    Case({"ranks": range(3), "dp": 3}, {"ranks": range(3, 5), "dp": 2}, ndim=3, batch_dim=1, name="3-D non-dividing"),
    Case(
        {"ranks": range(2), "dp": 2},
        {"ranks": range(2, 6), "tp": 2, "cp": 2, "cp_placement": "zigzag", "sequence_parallel": True},
        ndim=3,
        batch_dim=1,
        seq=16,
        name="3-D zigzag and sequence parallel",
    ),
    Case(
        {"ranks": range(2), "tp": 2, "sequence_parallel": True},
        {"ranks": range(2, 6), "cp": 2, "dp": 2, "cp_placement": "contiguous"},
        ndim=3,
        batch_dim=0,
        seq=8,
        name="3-D shards on both sides",
    ),
    Case(
        {"ranks": range(2), "tp": 2, "sequence_parallel": True},
        {"ranks": range(2, 4), "tp": 2, "sequence_parallel": True},
        rows_per_sample=4,
        pass_counts=False,
        name="2-D shards on both sides",
    ),
    Case(
        {"ranks": range(2), "tp": 2, "sequence_parallel": True},
        {"ranks": range(2, 4), "dp": 2},
        rows=RAGGED,
        name="2-D ragged sharded source",
    ),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "tp": 2}, static=True, name="static 2-D"),
    Case({"ranks": range(3), "dp": 3}, {"ranks": range(3, 5), "dp": 2}, ndim=3, static=True, name="static 3-D"),
    Case({"ranks": range(4), "tp": 2, "dp": 2}, {"ranks": range(4), "tp": 4}, rows=RAGGED, name="same ranks"),
    Case({"ranks": range(4), "dp": 4}, {"ranks": range(2, 6), "tp": 2, "dp": 2}, rows=RAGGED, name="overlapping ranks"),
    Case({"ranks": range(4), "dp": 4}, {"ranks": range(4), "tp": 4}, ndim=3, static=True, name="same ranks, static"),
    Case(
        {"ranks": range(4), "pp": 2, "tp": 2}, {"ranks": range(4, 8), "pp": 2, "dp": 2}, rows=RAGGED, name="pp stages"
    ),
    Case({"ranks": range(3, 1, -1), "dp": 2}, {"ranks": (6, 1, 4), "tp": 3}, rows=RAGGED, name="ranks in any order"),
    Case({"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "tp": 2}, dtype=torch.bfloat16, name="bf16"),
    Case(
        {"ranks": range(4), "tp": 4}, {"ranks": range(4, 8), "tp": 4}, ndim=3, batch_dim=1, extra=CHUNKS, name="chunks"
    ),
    Case(
        {"ranks": range(3), "dp": 3},
        {"ranks": range(3, 7), "tp": 2, "dp": 2},
        rows=RAGGED,
        extra=CHUNKS,
        name="chunks 3-2",
    ),
    Case(
        {"ranks": range(2), "tp": 2},
        {"ranks": range(2, 8), "tp": 3, "cp": 2},
        rows=RAGGED,
        extra=CHUNKS,
        name="chunks cp",
    ),
    Case(
        {"ranks": range(4), "dp": 2, "tp": 2},
        {"ranks": range(2, 6), "tp": 4},
        rows=RAGGED,
        extra=CHUNKS,
        name="chunks, overlapping ranks",
    ),
    Case(
        {"ranks": range(2), "dp": 2}, {"ranks": range(2, 4), "tp": 2}, static=True, extra=CHUNKS, name="chunks, static"
    ),
    Case(
        {"ranks": range(2), "dp": 2},
        {"ranks": range(2, 4), "tp": 2},
        samples=130,
        rows=tuple(index % 4 for index in range(130)),
        name="row counts beyond the header",
    ),
    # Each lane takes all rows to be even, as its own are; only the receiver knows that the lanes differ.
    Case(
        {"ranks": range(2), "dp": 2},
        {"ranks": range(2, 4), "tp": 2},
        rows=(2, 2, 2, 5, 5, 5),
        pass_counts=False,
        extra=CHUNKS,
        name="even lanes that differ",
    ),
    *(
        Case(src, dst, rows=RAGGED, extra={"path": path}, name=f"{path}, {name}")
        for path in ("pipelined", "direct", "leader")
        for src, dst, name in (
            ({"ranks": range(3), "dp": 3}, {"ranks": range(3, 7), "tp": 2, "dp": 2}, "ragged"),
            ({"ranks": range(2), "tp": 2}, {"ranks": range(2, 8), "tp": 3, "cp": 2}, "cp copies"),
            ({"ranks": range(4), "dp": 2, "tp": 2}, {"ranks": range(2, 6), "tp": 2, "cp": 2}, "overlapping"),
        )
    ),
    *(
        Case(
            {"ranks": range(2), "dp": 2}, {"ranks": range(2, 6), "tp": 4}, static=True, extra={"path": path}, name=path
        )
        for path in ("pipelined", "direct", "leader")
    ),
]
WORLD = 8
MICROBATCHES = 3


def run_case(rank: int, case: Case) -> None:
    src, dst = case.layouts()
    bridge = mimo_ext.Bridge(
        src,
        dst,
        ndim=case.ndim,
        batch_dim=case.batch_dim,
        dtype=case.dtype,
        shape=case.global_shape() if case.static else None,
        **case.extra,
    )
    here_src, here_dst = find(src, rank, -1), find(dst, rank, 0)
    assert bridge.is_source == (here_src is not None)
    assert bridge.is_destination == (here_dst is not None)
    options = {}
    if here_src is not None and case.ndim == 2 and not case.static and case.pass_counts:
        first, last = lane_samples(case.samples, here_src[0], len(src.lanes()))
        options["row_counts"] = case.row_counts()[first:last]
    if case.samples % len(src.lanes()):
        options["num_samples"] = case.samples
    # All forwards first, then all backwards: more than one microbatch is in flight.
    for step in range(MICROBATCHES):
        whole = case.global_tensor(step)
        if here_src is not None:
            x = local_tensor(case, src, whole, *here_src)
            sent = x.clone()
            bridge.send_forward(sent, **options)
            sent.data = torch.empty(1, dtype=case.dtype)  # what deallocate_output_tensor does
        if here_dst is not None:
            y = bridge.recv_forward()
            assert y.is_leaf
            assert y.requires_grad
            torch.testing.assert_close(y.detach(), local_tensor(case, dst, whole, *here_dst), rtol=0, atol=0)
    for step in range(MICROBATCHES):
        gradients = global_gradients(case, dst, step)
        if here_dst is not None:
            copy = here_dst[1] // dst.tp if len(gradients) > 1 else 0
            bridge.send_backward(local_tensor(case, dst, gradients[copy], *here_dst))
        if here_src is not None:
            expected = local_tensor(case, src, torch.stack(gradients).sum(0), *here_src)
            dx = bridge.recv_backward()
            torch.testing.assert_close(dx, expected, rtol=0, atol=0)
    bridge.close()
    assert bridge.closed


def run_cases(rank: int, world_size: int, cases: list[Case]) -> None:
    for case in cases:
        try:
            run_case(rank, case)
        except BaseException as error:
            raise AssertionError(f"case {case.name!r}") from error


@pytest.mark.parametrize("half", [0, 1])
def test_values(half):
    launch(run_cases, WORLD, CASES[half::2], timeout=120)


def differentiable(rank: int, world_size: int, case: Case) -> None:
    src, dst = case.layouts()
    bridge = mimo_ext.Bridge(src, dst, ndim=2)
    here_src, here_dst = find(src, rank, -1), find(dst, rank, 0)
    whole = case.global_tensor(1)
    x, options = None, {}
    if here_src is not None:
        x = local_tensor(case, src, whole, *here_src).requires_grad_()
        first, last = lane_samples(case.samples, here_src[0], len(src.lanes()))
        options = {"row_counts": case.row_counts()[first:last], "num_samples": case.samples}
    y = mimo_ext.bridge(x, bridge, **options)
    (3 * y).sum().backward()
    if here_dst is not None:
        torch.testing.assert_close(y.detach(), local_tensor(case, dst, whole, *here_dst))
    if x is not None:
        torch.testing.assert_close(x.grad, torch.full_like(x, 3.0))
    with torch.no_grad():
        z = mimo_ext.bridge(x, bridge, **options)
    assert not z.requires_grad
    if here_dst is not None:
        torch.testing.assert_close(z, local_tensor(case, dst, whole, *here_dst))
    bridge.close()


@pytest.mark.parametrize("dst_ranks", [range(4, 6), range(2)], ids=["disjoint", "colocated"])
def test_differentiable_form(dst_ranks):
    case = Case({"ranks": range(4), "dp": 4}, {"ranks": dst_ranks, "tp": 2}, rows=RAGGED)
    launch(differentiable, 6, case)


def no_gradient(rank: int, world_size: int) -> None:
    case = Case({"ranks": range(2), "tp": 2}, {"ranks": range(2, 4), "dp": 2})
    src, dst = case.layouts()
    bridge = mimo_ext.Bridge(src, dst, ndim=2)
    whole = case.global_tensor(0)
    # Evaluation in between: nothing travels back for it.
    for grad_mode in (True, False, True):
        with torch.set_grad_enabled(grad_mode):
            if bridge.is_source:
                bridge.send_forward(whole)
            else:
                assert bridge.recv_forward().requires_grad == grad_mode
    if bridge.is_destination:
        lane = rank - 2
        mine = lane_slice(case, whole, lane, 2)
        bridge.send_backward(None)
        bridge.send_backward(None if lane == 0 else mine)
        with pytest.raises(mimo_ext.BridgeError, match="no received microbatch waits"):
            bridge.send_backward(mine)
    else:
        assert bridge.recv_backward() is None
        # One lane has a gradient, the other has none: its part is zero.
        expected = whole.clone()
        expected[: expected.shape[0] // 2] = 0
        torch.testing.assert_close(bridge.recv_backward(), expected)
        with pytest.raises(mimo_ext.BridgeError, match="no sent microbatch waits"):
            bridge.recv_backward()
    bridge.close()


def test_absent_gradients_and_evaluation():
    launch(no_gradient, 4)


def handles(rank: int, world_size: int) -> None:
    bridge = mimo_ext.Bridge(mimo_ext.Layout([0]), mimo_ext.Layout([1]), ndim=2, max_in_flight=2)
    x = torch.arange(8.0).view(4, 2)
    if rank == 0:
        sends = [bridge.isend_forward(x + step) for step in range(5)]
        grads = [bridge.irecv_backward() for _ in range(5)]
        for handle in sends:
            assert handle.wait() is None
        for step, handle in enumerate(grads):
            torch.testing.assert_close(handle.wait(), x * step)
            assert handle.done()
    else:
        received = [bridge.irecv_forward() for _ in range(5)]
        for step, handle in enumerate(received):
            y = handle.wait()
            assert handle.wait() is y
            torch.testing.assert_close(y.detach(), x + step)
        for step in range(5):
            bridge.isend_backward(x * step)
    bridge.close()
    bridge.close()


def test_handles_and_window():
    launch(handles, 2)
