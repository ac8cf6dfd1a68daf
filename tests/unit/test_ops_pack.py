"""pack, unpack and unpack_: values against the reference, bit by bit, over dtypes, strides and dimensions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimo_ext import ops, reference

SUMMABLE = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
]
MOVED_ONLY = [torch.bool, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2]
RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}

SHAPES = {1: (7,), 2: (6, 8), 3: (4, 6, 5), 4: (2, 3, 4, 3)}
BOXES = {  # one box with a tail, one empty, one that overlaps the first, the whole tensor
    1: ([1, 3, 2, 0], [4, 0, 5, 7]),
    2: ([1, 2, 6, 0, 0, 3, 0, 0], [3, 4, 0, 8, 6, 2, 6, 8]),
    3: ([1, 0, 2, 0, 6, 0, 0, 0, 0, 0, 0, 0], [2, 5, 3, 4, 0, 5, 3, 6, 5, 4, 6, 5]),
    4: ([0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0], [2, 1, 4, 2, 1, 3, 2, 2, 2, 3, 4, 3]),
}
LAYOUTS = ["contiguous", "reversed", "stepped", "windowed"]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bit pattern: infinities and NaNs with payloads included."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(torch.bool)
    numel = math.prod(shape)
    return (
        torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)
    )


def with_layout(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The values of contiguous `x` in memory of another layout, and all of that memory: 1-D, as integers or numbers."""
    raw = x.view(RAW[x.dtype.itemsize])
    shape = raw.shape
    if layout == "reversed":  # the first dimension is the innermost
        whole = raw.new_zeros(shape[::-1])
        out = whole.permute(*range(raw.dim())[::-1])
    elif layout == "stepped":  # gaps between elements in every dimension
        whole = raw.new_zeros([2 * n for n in shape])
        out = whole[(slice(None, None, 2),) * raw.dim()]
    elif layout == "windowed":  # rows of a wider tensor, not from its start
        whole = raw.new_zeros([n + 3 for n in shape])
        out = whole[tuple(slice(1, 1 + n) for n in shape)]
    else:
        whole = out = raw.new_zeros(shape)
    out.copy_(raw)
    return out.view(x.dtype), whole.view(-1)


def bits(x: Tensor) -> Tensor:
    return x.view(RAW[x.dtype.itemsize]).contiguous().view(torch.uint8)


def small_values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Values of which sums need rounding in narrow floating types and wrap around in narrow integers."""
    if dtype.is_complex:
        wide = torch.complex(*torch.randn(2, *shape, generator=generator))
        return wide.to(dtype)
    if dtype.is_floating_point:
        return (3 * torch.randn(shape, generator=generator)).to(dtype)
    return random_bits(shape, dtype, generator)


def unpack_reference(out: Tensor, buffer: Tensor, starts: list[int], sizes: list[int]) -> Tensor:
    """Accumulation, for dtypes too that PyTorch cannot add: unsigned sums are signed sums read differently, and a
    complex number of two halves is added in complex64."""
    if out.dtype in (torch.uint16, torch.uint32, torch.uint64):
        signed = RAW[out.dtype.itemsize]
        result = out.view(signed).clone()
        reference.unpack_(result, buffer.view(signed), starts, sizes, accumulate=True)
        return result.view(out.dtype)
    if out.dtype == torch.complex32:
        result = torch.view_as_real(out.clone())
        starts_real, sizes_real = with_last_dim(starts, out.dim(), 0), with_last_dim(sizes, out.dim(), 2)
        reference.unpack_(result, torch.view_as_real(buffer).reshape(-1), starts_real, sizes_real, accumulate=True)
        return torch.view_as_complex(result)
    result = out.clone()
    reference.unpack_(result, buffer, starts, sizes, accumulate=True)
    return result


def with_last_dim(values: list[int], ndim: int, last: int) -> list[int]:
    """Boxes of a tensor with one more dimension, for each box `last` in it."""
    return [v for i in range(0, len(values), ndim) for v in [*values[i : i + ndim], last]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ndim", SHAPES)
@pytest.mark.parametrize("dtype", SUMMABLE + MOVED_ONLY, ids=str)
def test_moves_are_bit_exact(dtype: torch.dtype, ndim: int, layout: str) -> None:
    generator = torch.Generator().manual_seed(ndim)
    starts, sizes = BOXES[ndim]
    raw_dtype = RAW[dtype.itemsize]
    x, _ = with_layout(random_bits(SHAPES[ndim], dtype, generator), layout)

    buffer = ops.pack(x, starts, sizes)
    assert buffer.dtype == dtype
    assert buffer.is_contiguous()
    expected = reference.pack(x.view(raw_dtype), starts, sizes)
    assert buffer.shape == expected.shape
    assert torch.equal(bits(buffer), bits(expected))

    out, memory = with_layout(random_bits(SHAPES[ndim], dtype, generator), layout)
    pieces = random_bits(tuple(buffer.shape), dtype, generator)[: -math.prod(SHAPES[ndim])]
    some = slice(0, -ndim)  # without the box that is the whole tensor: something must stay as it was
    expected = out.view(raw_dtype).clone()
    reference.unpack_(expected, pieces.view(raw_dtype), starts[some], sizes[some])
    outside = torch.ones(memory.shape, dtype=torch.bool)
    outside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(False)
    around = torch.full_like(memory[outside], 7)
    memory[outside] = around
    ops.unpack_(out, pieces, starts[some], sizes[some])
    assert torch.equal(bits(out), bits(expected))
    assert (around.numel() > 0) == (layout in ("stepped", "windowed"))
    assert torch.equal(memory[outside], around)  # memory that is not part of `out` is untouched


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("dtype", SUMMABLE, ids=str)
def test_sums_match_the_reference(dtype: torch.dtype, ndim: int, layout: str) -> None:
    generator = torch.Generator().manual_seed(ndim)
    starts, sizes = BOXES[ndim]
    start = small_values(SHAPES[ndim], dtype, generator)
    numel = sum(math.prod(sizes[i : i + ndim]) for i in range(0, len(sizes), ndim))
    buffer = small_values((numel,), dtype, generator)

    out, _ = with_layout(start, layout)
    ops.unpack_(out, buffer, starts, sizes, accumulate=True)
    assert torch.equal(bits(out), bits(unpack_reference(start, buffer, starts, sizes)))

    functional = ops.unpack(buffer, SHAPES[ndim], starts, sizes)
    expected = unpack_reference(torch.zeros(SHAPES[ndim], dtype=dtype), buffer, starts, sizes)
    assert functional.shape == SHAPES[ndim]
    assert functional.is_contiguous()
    assert torch.equal(bits(functional), bits(expected))


def test_narrow_sums_are_rounded_after_each_box() -> None:
    # In bfloat16 1 + 2^-9 rounds to 1: added one by one, two of them vanish; added as one number, 2^-8 + 2^-8 stays.
    out = torch.ones(1, 1, dtype=torch.bfloat16)
    ops.unpack_(out, torch.full((2,), 2.0**-9, dtype=torch.bfloat16), [0, 0, 0, 0], [1, 1, 1, 1], accumulate=True)
    assert out.item() == 1
    ops.unpack_(out, torch.full((1,), 2.0**-7, dtype=torch.bfloat16), [0, 0], [1, 1], accumulate=True)
    assert out.item() == 1 + 2.0**-7


# Random boxes and strides.


@st.composite
def strided_tensors(draw: st.DrawFn) -> Tensor:
    """int64 tensor of 1 to 4 dimensions in a random order of memory, with random gaps and a random offset."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    strides = [0] * len(shape)
    reach = 1
    for d in order:
        strides[d] = reach + draw(st.integers(0, 2))
        reach = strides[d] * shape[d]
    offset = draw(st.integers(0, 3))
    storage = torch.randint(
        -99, 100, (offset + reach,), generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    )
    return storage.as_strided(shape, strides, offset)


@st.composite
def tensors_and_boxes(draw: st.DrawFn) -> tuple[Tensor, list[int], list[int]]:
    x = draw(strided_tensors())
    starts: list[int] = []
    sizes: list[int] = []
    for _ in range(draw(st.integers(0, 4))):
        for n in x.shape:
            start = draw(st.integers(0, n))
            starts.append(start)
            sizes.append(draw(st.integers(0, n - start)))
    return x, starts, sizes


@settings(max_examples=300, deadline=None)
@given(tensors_and_boxes())
def test_random_boxes_of_random_strides(case: tuple[Tensor, list[int], list[int]]) -> None:
    x, starts, sizes = case
    packed = ops.pack(x, starts, sizes)
    assert torch.equal(packed, reference.pack(x, starts, sizes))

    y = torch.randint(-99, 100, packed.shape, generator=torch.Generator().manual_seed(0))
    # Adjoint, exact in integers: <pack x, y> == <x, unpack y>.
    unpacked = ops.unpack(y, x.shape, starts, sizes)
    assert torch.equal(unpacked, reference.unpack(y, x.shape, starts, sizes))
    assert (packed * y).sum() == (x * unpacked).sum()

    for accumulate in (False, True):
        expected = x.clone()
        reference.unpack_(expected, y, starts, sizes, accumulate=accumulate)
        out = x._base.clone().as_strided(x.shape, x.stride(), x.storage_offset())
        ops.unpack_(out, y, starts, sizes, accumulate=accumulate)
        assert torch.equal(out, expected)


@settings(max_examples=100, deadline=None)
@given(tensors_and_boxes(), st.integers(0, 3))
def test_pack_reads_expanded_tensors(case: tuple[Tensor, list[int], list[int]], dim: int) -> None:
    x, starts, sizes = case
    x = x.narrow(dim % x.dim(), 0, 1).expand(x.shape)
    assert torch.equal(ops.pack(x, starts, sizes), reference.pack(x, starts, sizes))


# Sizes at the edges.


def test_no_boxes_and_empty_tensors() -> None:
    assert ops.pack(torch.ones(3, 4), [], []).shape == (0,)
    assert ops.pack(torch.ones(0, 4), [0, 1], [0, 2]).shape == (0,)
    assert torch.equal(ops.unpack(torch.ones(0), (2, 3), [], []), torch.zeros(2, 3))
    assert ops.unpack(torch.ones(0), (2, 0), [1, 0], [1, 0]).shape == (2, 0)
    out = torch.arange(6.0).view(2, 3)
    ops.unpack_(out, torch.ones(0), [2, 3], [0, 0])
    assert torch.equal(out, torch.arange(6.0).view(2, 3))


def test_offsets_beyond_32_bits() -> None:
    # 4 GiB of address space, of which a few pages are touched.
    rows = torch.empty(2**32 + 16, dtype=torch.uint8).view(2, 2**31 + 8)
    rows[1, -3:] = torch.tensor([5, 6, 7], dtype=torch.uint8)
    rows[0, -1] = 4
    starts, sizes = [0, 2**31 + 7, 1, 2**31 + 5], [1, 1, 1, 3]
    buffer = ops.pack(rows, starts, sizes)
    assert buffer.tolist() == [4, 5, 6, 7]
    ops.unpack_(rows, buffer, starts, sizes, accumulate=True)
    assert [rows[0, -1].item(), *rows[1, -3:].tolist()] == [8, 10, 12, 14]


def test_indices_beyond_32_bits() -> None:
    x = torch.arange(3).expand(2**40, 3)
    assert ops.pack(x, [2**40 - 2, 1], [2, 2]).tolist() == [1, 2, 1, 2]


def test_lazy_conjugates_are_seen() -> None:
    x = torch.randn(3, 4, dtype=torch.complex64)
    assert torch.equal(ops.pack(x.conj(), [0, 1], [3, 2]), x[:, 1:3].conj().resolve_conj().flatten())
    out = torch.zeros(3, 4, dtype=torch.complex64)
    ops.unpack_(out, x.flatten().conj(), [0, 0], [3, 4])
    assert torch.equal(out, x.conj().resolve_conj())


def test_pack_into_fills_the_buffer_it_is_given() -> None:
    x = torch.randn(4, 6).t()
    memory = torch.full((14,), -1.0)
    torch.ops.mimo_ext.pack_into(memory[1:13], x, [0, 1, 3, 0], [3, 2, 2, 3])
    assert torch.equal(memory[1:13], reference.pack(x, [0, 1, 3, 0], [3, 2, 2, 3]))
    assert memory[0] == memory[13] == -1.0
