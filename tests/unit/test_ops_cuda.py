"""The ops on a GPU: bit by bit as the reference on the CPU. Skipped, with the reason, where there is none."""

import itertools
import math

import pytest
import torch
from test_ops_pack import BOXES, SHAPES, SUMMABLE, bits, random_bits, small_values, unpack_reference, with_layout
from test_ops_rescale import tensor

from mimo_ext import ops, reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "reversed", "stepped", "windowed"]
NO_SUMS_ON_CUDA = [dtype for dtype in SUMMABLE if dtype.is_floating_point and dtype.itemsize == 1]
NO_SUMS_ON_CUDA.append(torch.complex32)


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    """The same strides on the GPU."""
    raw = x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[x.itemsize])
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    memory = torch.zeros(extent, dtype=raw.dtype, device="cuda")
    return memory.as_strided(x.shape, x.stride()).copy_(raw).view(x.dtype)


@pytest.mark.parametrize("dtype", [*SUMMABLE, torch.bool], ids=str)
def test_moves_are_bit_exact(dtype: torch.dtype) -> None:
    for ndim, layout in itertools.product(SHAPES, LAYOUTS):
        generator = torch.Generator().manual_seed(ndim)
        starts, sizes = BOXES[ndim]
        x, _ = with_layout(random_bits(SHAPES[ndim], dtype, generator), layout)
        expected = ops.pack(x, starts, sizes)
        assert torch.equal(bits(ops.pack(on_gpu(x), starts, sizes)).cpu(), bits(expected))
        pieces = random_bits(tuple(expected.shape), dtype, generator)
        out = on_gpu(x)
        ops.unpack_(out, pieces.cuda(), starts, sizes)
        ops.unpack_(x, pieces, starts, sizes)
        assert torch.equal(bits(out).cpu(), bits(x))


@pytest.mark.parametrize("dtype", [dtype for dtype in SUMMABLE if dtype not in NO_SUMS_ON_CUDA], ids=str)
def test_sums_match_the_reference(dtype: torch.dtype) -> None:
    starts, sizes = BOXES[3]
    numel = sum(math.prod(sizes[i : i + 3]) for i in range(0, len(sizes), 3))
    for layout in LAYOUTS:
        generator = torch.Generator().manual_seed(3)
        start, _ = with_layout(small_values(SHAPES[3], dtype, generator), layout)
        buffer = small_values((numel,), dtype, generator)
        out = on_gpu(start)
        ops.unpack_(out, buffer.cuda(), starts, sizes, accumulate=True)
        assert torch.equal(bits(out).cpu(), bits(unpack_reference(start.contiguous(), buffer, starts, sizes)))


@pytest.mark.parametrize("dtype", NO_SUMS_ON_CUDA, ids=str)
def test_sums_that_no_kernel_has_are_refused(dtype: torch.dtype) -> None:
    out = torch.zeros(2, 2, dtype=torch.uint8, device="cuda").to(dtype)
    with pytest.raises(NotImplementedError, match="unpack_: adding on a CUDA device is not supported for dtype"):
        ops.unpack_(out, out.flatten().clone(), [0, 0], [2, 2], accumulate=True)


@pytest.mark.parametrize("of_tensor", DTYPES, ids=str)
def test_conversions_match_the_reference(of_tensor: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    starts, sizes = [1, 0, 4, 0, 0, 0], [5, 4, 60, 3, 4, 64]
    for of_buffer, shape in itertools.product(DTYPES, ((6, 4, 64), (6, 4, 65))):
        x = small_values(shape, of_tensor, generator)
        got = ops.pack(x.cuda(), starts, sizes, dtype=of_buffer)
        assert torch.equal(got.cpu(), reference.pack(x, starts, sizes, dtype=of_buffer))
        pieces = small_values(tuple(got.shape), of_buffer, generator)
        for accumulate in (False, True):
            out, expected = x.cuda(), x.clone()
            ops.unpack_(out, pieces.cuda(), starts, sizes, accumulate=accumulate)
            reference.unpack_(expected, pieces, starts, sizes, accumulate=accumulate)
            assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float64], ids=str)
def test_rescale_of_many_buffers(factor_dtype: torch.dtype) -> None:
    shapes = [(0,), (1,), (7, 9), (16384 * 3 + 5,), (2, 3, 4), (), (40, 500)]
    buffers = [
        tensor(shape, dtype, LAYOUTS[(i + j) % 4], seed=i)
        for i, shape in enumerate(shapes * 6)
        for j, dtype in enumerate(DTYPES)
    ]
    factor = torch.tensor(1 / 3, dtype=factor_dtype)
    ours = [on_gpu(b) for b in buffers]
    runs = []
    for _ in range(3):
        scaled = [b.clone() for b in ours]
        runs.append(ops.rescale_(scaled, factor.cuda(), with_sumsq=True, with_found_inf=True))
    sumsq, found_inf = reference.rescale_(buffers, factor, with_sumsq=True, with_found_inf=True)
    assert all(torch.equal(got.cpu(), want) for got, want in zip(scaled, buffers, strict=True))
    assert len({run[0].item() for run in runs}) == 1
    torch.testing.assert_close(runs[0][0].cpu(), sumsq, rtol=1e-13, atol=0)
    assert runs[0][1].item() == found_inf.item() == 0
    scaled[-1].view(-1)[3] = math.nan
    assert ops.rescale_(scaled, factor.cuda(), with_found_inf=True)[1].item() == 1


def test_rescale_is_captured_in_a_graph_and_reads_the_factor_at_replay() -> None:
    buffers = [torch.ones(100_000, device="cuda"), torch.ones(33, device="cuda", dtype=torch.bfloat16)]
    factor = torch.tensor(2.0, device="cuda")
    ops.rescale_(buffers, factor, with_sumsq=True, with_found_inf=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sumsq, found_inf = ops.rescale_(buffers, factor, with_sumsq=True, with_found_inf=True)
    factor.fill_(4.0)
    graph.replay()
    assert all(torch.equal(b, torch.full_like(b, 8.0)) for b in buffers)
    assert (sumsq.item(), found_inf.item()) == (64.0 * 100_033, 0.0)


def test_rescale_and_pack_do_not_wait_for_the_device() -> None:
    buffers = [torch.ones(1000, device="cuda")]
    factor = torch.tensor(2.0, device="cuda")
    x = torch.ones(8, 8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.rescale_(buffers, factor, with_sumsq=True, with_found_inf=True)
        ops.unpack_(x, ops.pack(x, [0, 0], [4, 8]), [4, 0], [4, 8], accumulate=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.sum().item() == 96


def test_work_is_on_the_current_stream() -> None:
    x = torch.zeros(1 << 20, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.fill_(3.0)
        packed = ops.pack(x, [0], [1 << 20])
        ops.rescale_([packed], 2.0)
    side.synchronize()
    assert torch.equal(packed, torch.full_like(packed, 6.0))
