"""pack, unpack and unpack_ between dtypes: conversion and sums in the same pass, bit by bit as the reference."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from mimo_ext import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPE = (5, 4, 37)
STARTS, SIZES = [1, 0, 2, 0, 3, 0, 0, 0, 20], [4, 3, 33, 5, 0, 37, 3, 4, 17]  # the third shares elements with the first


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 100).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "reversed":  # the first dimension is the innermost: elements of a run lie apart
        return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if layout == "windowed":
        return torch.zeros([n + 3 for n in x.shape], dtype=x.dtype)[1:-2, 1:-2, 1:-2].copy_(x)
    return x.clone()


@pytest.mark.parametrize("layout", ["contiguous", "windowed", "reversed"])
@pytest.mark.parametrize("of_buffer", DTYPES, ids=str)
@pytest.mark.parametrize("of_tensor", DTYPES, ids=str)
def test_conversion_and_sums_match_the_reference(of_tensor: torch.dtype, of_buffer: torch.dtype, layout: str) -> None:
    x = laid_out(values(SHAPE, of_tensor, 0), layout)
    buffer = ops.pack(x, STARTS, SIZES, dtype=of_buffer)
    assert buffer.dtype == of_buffer
    assert torch.equal(buffer, reference.pack(x, STARTS, SIZES, dtype=of_buffer))

    pieces = values(tuple(buffer.shape), of_buffer, 1)
    for accumulate in (False, True):
        out = laid_out(x, layout)
        expected = x.clone()
        ops.unpack_(out, pieces, STARTS, SIZES, accumulate=accumulate)
        reference.unpack_(expected, pieces, STARTS, SIZES, accumulate=accumulate)
        assert torch.equal(out, expected)

    zeros = ops.unpack(pieces, SHAPE, STARTS, SIZES, dtype=of_tensor)
    assert zeros.dtype == of_tensor
    assert torch.equal(zeros, reference.unpack(pieces, SHAPE, STARTS, SIZES, dtype=of_tensor))


def test_conversion_is_pytorch_s() -> None:
    # Halfway cases, numbers that are subnormal or too large for float16, infinities.
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = bits.view(torch.float32)
    x = torch.cat([x[x.isfinite()], torch.arange(-70000, 70000, 3.0), torch.tensor([torch.inf, -torch.inf, -0.0])])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        got = ops.pack(x, [0], [x.numel()], dtype=dtype)
        assert torch.equal(got, x.to(dtype))
        assert torch.equal(got.signbit(), x.to(dtype).signbit())
        assert torch.equal(ops.pack(got, [0], [x.numel()], dtype=torch.float32), got.to(torch.float32))


def test_sums_of_narrow_gradients_in_a_wide_tensor_are_not_rounded_in_between() -> None:
    # 1 + 2^-9 is no bfloat16.
    out = torch.ones(1, 1)
    ops.unpack_(out, torch.full((2,), 2.0**-9, dtype=torch.bfloat16), [0, 0, 0, 0], [1, 1, 1, 1], accumulate=True)
    assert out.item() == 1 + 2.0**-8


def test_gradients_come_back_in_the_dtype_of_the_input() -> None:
    x = values(SHAPE, torch.float32, 0).requires_grad_()
    ops.pack(x, STARTS, SIZES, dtype=torch.bfloat16).float().square().sum().backward()
    expected = torch.zeros(SHAPE)
    packed = reference.pack(x.detach(), STARTS, SIZES, dtype=torch.bfloat16)
    reference.unpack_(expected, (2 * packed.float()).bfloat16(), STARTS, SIZES, accumulate=True)
    assert x.grad is not None
    assert torch.equal(x.grad, expected)

    buffer = values(tuple(packed.shape), torch.bfloat16, 1).requires_grad_()
    weight = values(SHAPE, torch.float32, 2)
    (ops.unpack(buffer, SHAPE, STARTS, SIZES, dtype=torch.float32) * weight).sum().backward()
    assert buffer.grad is not None
    assert torch.equal(buffer.grad, reference.pack(weight, STARTS, SIZES, dtype=torch.bfloat16))


def test_opcheck() -> None:
    x = values(SHAPE, torch.float32, 0).requires_grad_()
    opcheck(torch.ops.mimo_ext.pack.default, (x, STARTS, SIZES, torch.bfloat16))
    buffer = reference.pack(x.detach(), STARTS, SIZES, dtype=torch.float16).requires_grad_()
    opcheck(torch.ops.mimo_ext.unpack.default, (buffer, SHAPE, STARTS, SIZES, torch.float32))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("of_tensor", "of_buffer"),
    [
        (torch.float32, torch.int32),
        (torch.int32, torch.float32),
        (torch.int32, torch.int64),
        (torch.float8_e4m3fn, torch.float16),
        (torch.complex64, torch.float32),
        (torch.bool, torch.uint8),
    ],
    ids=str,
)
def test_other_conversions_are_refused(of_tensor: torch.dtype, of_buffer: torch.dtype, device: str) -> None:
    x = torch.zeros(2, 3, dtype=torch.uint8, device=device).to(of_tensor)
    with pytest.raises(TypeError, match=r"pack_into: expected a buffer of dtype .*, got"):
        ops.pack(x, [0, 0], [1, 3], dtype=of_buffer)
    buffer = torch.zeros(3, dtype=torch.uint8, device=device).to(of_buffer)
    with pytest.raises(TypeError, match=r"unpack_: expected a buffer of dtype .*, got"):
        ops.unpack_(x, buffer, [0, 0], [1, 3])
