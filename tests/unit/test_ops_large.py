"""pack and unpack of more than the caches hold: copies go another way there; and of transposed matrices."""

import pytest
import torch

from mimo_ext import ops, reference


@pytest.mark.parametrize("of_buffer", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shift", [0, 1, 7])
def test_large_boxes_match_the_reference(shift: int, of_buffer: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(1500 * 3 * 2048 + shift, generator=generator).bfloat16()
    x = memory[shift:].view(1500, 3, 2048)  # nothing is aligned
    starts, sizes = [0, 1, 5, 7, 0, 0], [1490, 2, 2041, 1400, 1, 2048]
    buffer = ops.pack(x, starts, sizes, dtype=of_buffer)
    assert buffer.nbytes > 16 << 20
    assert torch.equal(buffer, reference.pack(x, starts, sizes, dtype=of_buffer))
    pieces = -buffer
    for accumulate in (False, True):
        expected = x.clone()
        reference.unpack_(expected, pieces, starts, sizes, accumulate=accumulate)
        out = torch.empty_like(memory)[shift:].view(x.shape).copy_(x)
        ops.unpack_(out, pieces, starts, sizes, accumulate=accumulate)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.complex128], ids=str)
def test_transposed_matrices_move_in_blocks(dtype: torch.dtype) -> None:
    whole = torch.arange(3 * 150 * 131).reshape(3, 150, 131).to(dtype)
    x = whole.transpose(1, 2)
    starts, sizes = [0, 0, 0, 1, 3, 70], [3, 131, 150, 2, 120, 80]
    buffer = ops.pack(x, starts, sizes)
    assert torch.equal(buffer, reference.pack(x, starts, sizes))
    out = torch.zeros_like(whole).transpose(1, 2)
    expected = torch.zeros_like(whole).transpose(1, 2)
    ops.unpack_(out, buffer, starts, sizes)
    reference.unpack_(expected, buffer, starts, sizes)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("of_buffer", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 150, 331), (1, 2100, 1330)], ids=["small", "large"])
def test_transposed_matrices_convert_and_add_in_blocks(
    shape: tuple[int, int, int], dtype: torch.dtype, of_buffer: torch.dtype, accumulate: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(shape, generator=generator).to(dtype)
    x = whole.transpose(1, 2)
    matrices, columns, rows = shape
    # Whole matrices, and a part that begins and ends within blocks and lines.
    starts = [0, 0, 0, matrices - 1, 3, 70]
    sizes = [matrices, rows, columns, 1, rows - 5, columns - 71]
    buffer = ops.pack(x, starts, sizes, dtype=of_buffer)
    assert torch.equal(buffer, reference.pack(x, starts, sizes, dtype=of_buffer))
    pieces = torch.randn(buffer.numel(), generator=generator).to(of_buffer)
    out = whole.clone().transpose(1, 2)
    expected = whole.clone().transpose(1, 2)
    ops.unpack_(out, pieces, starts, sizes, accumulate=accumulate)
    reference.unpack_(expected, pieces, starts, sizes, accumulate=accumulate)
    assert torch.equal(out, expected)
