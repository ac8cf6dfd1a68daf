"""What the ops compute, with indexing and plain arithmetic: slow, obvious, and the truth that tests compare with.

The arguments are those of :mod:`mimo_ext.ops`; nothing here needs the compiled extension.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def boxes(ndim: int, starts: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """The boxes as indices: ``x[box]`` is the range of a tensor of ``ndim`` dimensions."""
    for i in range(0, len(starts), ndim):
        yield tuple(slice(a, a + n) for a, n in zip(starts[i : i + ndim], sizes[i : i + ndim], strict=True))


def pack(x: Tensor, starts: Sequence[int], sizes: Sequence[int], *, dtype: torch.dtype | None = None) -> Tensor:
    """The boxes of ``x``, flattened and joined. Returns [elements], dtype of ``x`` or another."""
    pieces = [x[box].reshape(-1) for box in boxes(x.dim(), starts, sizes)]
    return torch.cat([x.new_empty(0), *pieces]).to(dtype or x.dtype)


def unpack_(
    out: Tensor, buffer: Tensor, starts: Sequence[int], sizes: Sequence[int], *, accumulate: bool = False
) -> None:
    """Cuts the buffer into pieces and assigns each to its box of ``out`` (or adds it), in order."""
    first = 0
    for box in boxes(out.dim(), starts, sizes):
        target = out[box]
        piece = buffer[first : first + target.numel()].reshape(target.shape)
        first += target.numel()
        if accumulate:
            # float32 holds narrower floating types exactly: one rounding, when the sum is stored.
            wide = torch.float32 if out.dtype.is_floating_point and out.dtype.itemsize < 4 else out.dtype
            piece = (target.to(wide) + piece.to(wide)).to(out.dtype)
        out[box] = piece


def unpack(
    buffer: Tensor,
    shape: Sequence[int],
    starts: Sequence[int],
    sizes: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Zeros of ``shape`` with the pieces added."""
    out = torch.zeros(shape, dtype=dtype or buffer.dtype)
    unpack_(out, buffer, starts, sizes, accumulate=True)
    return out


def rescale_(
    buffers: Sequence[Tensor], factor: Tensor | float, *, with_sumsq: bool = False, with_found_inf: bool = False
) -> tuple[Tensor, Tensor]:
    """One pass for each thing: multiply, then square and add in float64, then look for infinities."""
    for buffer in buffers:
        wide = torch.float64 if buffer.dtype == torch.float64 else torch.float32
        buffer.copy_(buffer.to(wide) * torch.as_tensor(factor, dtype=wide))
    sumsq = torch.zeros((), dtype=torch.float64)
    found_inf = torch.zeros((), dtype=torch.float32)
    for buffer in buffers:
        if with_sumsq:
            sumsq += buffer.double().square().sum()
        if with_found_inf and not buffer.isfinite().all():
            found_inf.fill_(1.0)
    return sumsq, found_inf
