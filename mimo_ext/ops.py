"""The ops of the extension. For each: the documented function, its fake (shapes without data) and its gradient.

A *box* is a rectangular range of an n-D tensor, given by ``start[n]`` and ``size[n]``. Functions take k boxes as two
flat lists of ``k * n`` integers, ``starts`` and ``sizes``. A *buffer* is a 1-D tensor with the elements of the boxes,
one box after another, each in row-major order: what travels between ranks.

Between float32, float64, bfloat16 and float16 the ops convert on the way, in the same pass.

All ops run on CPU tensors of any strides, and on CUDA tensors where the extension was built with its CUDA kernels
(:func:`mimo_ext.has_cuda`); on a device without a kernel they raise NotImplementedError.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mimo_ext import _extension  # noqa: F401  the library registers the ops when it is loaded

__all__ = ["pack", "rescale_", "unpack", "unpack_"]


def _check(condition: bool, error: type[Exception], message: str) -> None:
    if not condition:
        raise error(message)


def _numel_of_boxes(op: str, shape: Sequence[int], starts: Sequence[int], sizes: Sequence[int]) -> int:
    """Number of elements in the boxes, for the fakes; the checks are those of the kernels."""
    ndim = len(shape)
    _check(ndim > 0, ValueError, f"{op}: expected a tensor of 1 or more dimensions, got a 0-d tensor")
    _check(
        len(starts) == len(sizes) and len(starts) % ndim == 0,
        ValueError,
        f"{op}: expected {ndim} starts and sizes for each box of a {ndim}-D tensor, "
        f"got {len(starts)} starts and {len(sizes)} sizes",
    )
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        _check(
            start >= 0 and size >= 0 and start + size <= shape[i % ndim],
            ValueError,
            f"{op}: box {i // ndim} leaves the tensor: expected start and size within 0..{shape[i % ndim]} "
            f"in dimension {i % ndim}, got start {start} and size {size} (tensor of shape {list(shape)})",
        )
    return sum(math.prod(sizes[i : i + ndim]) for i in range(0, len(sizes), ndim))


_CONVERTED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check_dtype(op: str, buffer: torch.dtype, tensor: torch.dtype) -> None:
    _check(
        buffer == tensor or (buffer in _CONVERTED and tensor in _CONVERTED),
        TypeError,
        f"{op}: expected a buffer of dtype {tensor} (that of the tensor)"
        f"{', or float32, float64, bfloat16 or float16' if tensor in _CONVERTED else ''}, got {buffer}",
    )


def _check_buffer(op: str, buffer: Tensor, tensor_dtype: torch.dtype, numel: int) -> None:
    _check(buffer.dim() == 1, ValueError, f"{op}: expected a 1-D buffer, got shape {list(buffer.shape)}")
    _check(
        buffer.numel() == numel,
        ValueError,
        f"{op}: expected a buffer of {numel} elements (the boxes together), got {buffer.numel()}",
    )
    _check_dtype(op, buffer.dtype, tensor_dtype)


# ---------------------------------------------------------------------------------------------------------------- pack


def pack(x: Tensor, starts: Sequence[int], sizes: Sequence[int], *, dtype: torch.dtype | None = None) -> Tensor:
    """Copies boxes of a tensor into a new buffer. Differentiable; its adjoint is :func:`unpack`.

    Args:
        x: n-D tensor (n >= 1) of any dtype and any strides, expanded ones included.
        starts: ``k * n`` integers, the first index of each box in each dimension.
        sizes: ``k * n`` integers. Boxes may be empty and may overlap.
        dtype: of the buffer; None: that of ``x``.

    Returns:
        1-D contiguous tensor on the device of ``x``, with ``sum(prod(size) for each box)`` elements.

    Raises:
        ValueError: a box leaves ``x``, or the lists do not hold n numbers for each box.
        TypeError: there is no conversion from the dtype of ``x`` to ``dtype``.
    """
    return torch.ops.mimo_ext.pack.default(x, starts, sizes, dtype)


@torch.library.register_fake("mimo_ext::pack")
def _pack_fake(x: Tensor, starts: Sequence[int], sizes: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    numel = _numel_of_boxes("pack", x.shape, starts, sizes)
    _check_dtype("pack_into", dtype or x.dtype, x.dtype)
    return x.new_empty(numel, dtype=dtype or x.dtype)


def _pack_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.starts, ctx.sizes, _ = inputs
    ctx.shape, ctx.dtype = x.shape, x.dtype


def _pack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return unpack(grad, ctx.shape, ctx.starts, ctx.sizes, dtype=ctx.dtype), None, None, None


torch.library.register_autograd("mimo_ext::pack", _pack_backward, setup_context=_pack_setup_context)


# -------------------------------------------------------------------------------------------------------------- unpack


def unpack(
    buffer: Tensor,
    shape: Sequence[int],
    starts: Sequence[int],
    sizes: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Zeros with the pieces of a buffer added into boxes. Differentiable; the adjoint of :func:`pack`.

    Args:
        buffer: 1-D tensor of an integer, floating point or complex dtype, as long as the boxes together.
        shape: shape of the result, n numbers (n >= 1).
        starts: ``k * n`` integers, the first index of each box in each dimension.
        sizes: ``k * n`` integers. Where boxes overlap, their pieces sum, in the order of the boxes; float16, bfloat16
            and float8 are added in float32 and rounded after each box.
        dtype: of the result; None: that of ``buffer``.

    Returns:
        Contiguous tensor of ``shape`` on the device of ``buffer``.

    Raises:
        ValueError: a box leaves ``shape``, the lists do not hold n numbers for each box, or the buffer is not 1-D or of
            another length.
        TypeError: a dtype that has no sums (bool, float8_e8m0fnu), or no conversion from that of ``buffer``.
    """
    return torch.ops.mimo_ext.unpack.default(buffer, shape, starts, sizes, dtype)


@torch.library.register_fake("mimo_ext::unpack")
def _unpack_fake(
    buffer: Tensor,
    shape: Sequence[int],
    starts: Sequence[int],
    sizes: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    dtype = dtype or buffer.dtype
    _check_buffer("unpack_", buffer, dtype, _numel_of_boxes("unpack", shape, starts, sizes))
    return buffer.new_empty(shape, dtype=dtype)


def _unpack_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    buffer, _, ctx.starts, ctx.sizes, _ = inputs
    ctx.dtype = buffer.dtype


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return pack(grad, ctx.starts, ctx.sizes, dtype=ctx.dtype), None, None, None, None


torch.library.register_autograd("mimo_ext::unpack", _unpack_backward, setup_context=_unpack_setup_context)


# ------------------------------------------------------------------------------------------------------------- unpack_


def unpack_(
    out: Tensor, buffer: Tensor, starts: Sequence[int], sizes: Sequence[int], *, accumulate: bool = False
) -> None:
    """Writes the pieces of a buffer into boxes of a tensor, or adds them. Not differentiable.

    Args:
        out: n-D tensor (n >= 1), changed in place; elements outside the boxes stay as they are. Any dtype, and any
            strides that keep its elements apart (an expanded tensor is refused).
        buffer: 1-D tensor on the device of ``out``, as long as the boxes together; dtype of ``out``, or both are of
            float32, float64, bfloat16 and float16.
        starts: ``k * n`` integers, the first index of each box in each dimension.
        sizes: ``k * n`` integers. Where boxes overlap, the last one written stays.
        accumulate: add instead of writing, as :func:`unpack` does: in the dtype of ``out``, or in float32 where that is
            narrower.

    Raises:
        ValueError: a box leaves ``out``; the lists do not hold n numbers for each box; the buffer is not 1-D, of
            another length or on another device; elements of ``out`` share memory.
        TypeError: dtypes without a conversion, or ``accumulate`` with a dtype that has no sums (bool, float8_e8m0fnu).
        RuntimeError: ``out`` or ``buffer`` requires grad while grad mode is on, or they share memory.
    """
    torch.ops.mimo_ext.unpack_.default(out, buffer, starts, sizes, accumulate)


@torch.library.register_fake("mimo_ext::unpack_")
def _unpack_in_place_fake(
    out: Tensor, buffer: Tensor, starts: Sequence[int], sizes: Sequence[int], accumulate: bool = False
) -> None:
    _check_buffer("unpack_", buffer, out.dtype, _numel_of_boxes("unpack_", out.shape, starts, sizes))


@torch.library.register_fake("mimo_ext::pack_into")
def _pack_into_fake(buffer: Tensor, x: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> None:
    _check_buffer("pack_into", buffer, x.dtype, _numel_of_boxes("pack_into", x.shape, starts, sizes))


# ------------------------------------------------------------------------------------------------------------ rescale_


def rescale_(
    buffers: Sequence[Tensor], factor: Tensor | float, *, with_sumsq: bool = False, with_found_inf: bool = False
) -> tuple[Tensor, Tensor]:
    """Multiplies every buffer in place by one factor, in one pass. Not differentiable.

    float16 and bfloat16 are multiplied in float32 and rounded once. The host never waits for a device: the factor is
    read, and both results are written, where the buffers are. On a CUDA device a launch takes up to 128 buffers, and
    the call can be captured in a CUDA graph.

    Args:
        buffers: float32, float64, bfloat16 or float16 tensors (they may differ) of any sizes and any strides, none
            sharing memory with itself or with another.
        factor: 0-d float32 or float64 tensor on the device of the buffers, or a number.
        with_sumsq: compute the sum of squares.
        with_found_inf: look for infinities and NaNs.

    Returns:
        ``(sumsq, found_inf)``, 0-d tensors on the device of the factor, zero where not asked for. ``sumsq`` (float64)
        is the sum of squares of the scaled values and the same bits for the same input, whatever the number of threads.
        ``found_inf`` (float32) is 1.0 if any scaled value is infinite or NaN, else 0.0.

    Raises:
        TypeError: a buffer or the factor has another dtype.
        ValueError: the factor is not 0-d; devices differ; buffers share memory.
        RuntimeError: a buffer or the factor requires grad while grad mode is on.
    """
    if not isinstance(factor, Tensor):
        # float64 keeps a Python number as it is; a fill needs no copy from the host.
        factor = torch.full((), factor, dtype=torch.float64, device=buffers[0].device if len(buffers) else "cpu")
    return torch.ops.mimo_ext.rescale_.default(list(buffers), factor, with_sumsq, with_found_inf)


@torch.library.register_fake("mimo_ext::rescale_")
def _rescale_fake(
    buffers: Sequence[Tensor], factor: Tensor, with_sumsq: bool = False, with_found_inf: bool = False
) -> tuple[Tensor, Tensor]:
    _check(factor.dim() == 0, ValueError, f"rescale_: expected a 0-d factor, got shape {list(factor.shape)}")
    return factor.new_empty((), dtype=torch.float64), factor.new_empty((), dtype=torch.float32)
