"""pack, unpack and unpack_ as PyTorch ops: schemas, gradients, versions, and errors that name expected and got."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from mimo_ext import ops, reference

SHAPES = {2: (6, 8), 3: (4, 6, 5)}
BOXES = {  # one box with a tail, one empty, one that overlaps the first, the whole tensor
    2: ([1, 2, 6, 0, 0, 3, 0, 0], [3, 4, 0, 8, 6, 2, 6, 8]),
    3: ([1, 0, 2, 0, 6, 0, 0, 0, 0, 0, 0, 0], [2, 5, 3, 4, 0, 5, 3, 6, 5, 4, 6, 5]),
}

# PyTorch's rules: schemas, gradients, versions.


OPCHECK_CASES = {
    "pack": lambda x, buffer, starts, sizes: (torch.ops.mimo_ext.pack.default, (x.requires_grad_(), starts, sizes)),
    "unpack": lambda x, buffer, starts, sizes: (
        torch.ops.mimo_ext.unpack.default,
        (buffer.requires_grad_(), tuple(x.shape), starts, sizes),
    ),
    "unpack_": lambda x, buffer, starts, sizes: (torch.ops.mimo_ext.unpack_.default, (x, buffer, starts, sizes)),
    "unpack_ accumulate": lambda x, buffer, starts, sizes: (
        torch.ops.mimo_ext.unpack_.default,
        (x, buffer, starts, sizes, True),
    ),
    "pack_into": lambda x, buffer, starts, sizes: (torch.ops.mimo_ext.pack_into.default, (buffer, x, starts, sizes)),
}


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("case", OPCHECK_CASES)
def test_opcheck(case: str, ndim: int) -> None:
    x = torch.randn(SHAPES[ndim][::-1]).permute(*range(ndim)[::-1])
    starts, sizes = BOXES[ndim]
    op, args = OPCHECK_CASES[case](x, reference.pack(x, starts, sizes), starts, sizes)
    opcheck(op, args)


@pytest.mark.parametrize("layout", ["contiguous", "reversed"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_gradients(ndim: int, layout: str) -> None:
    starts, sizes = BOXES[ndim]  # overlapping boxes: gradients sum
    x = torch.randn(SHAPES[ndim], dtype=torch.float64)
    if layout == "reversed":  # the first dimension is the innermost
        x = x.permute(*range(ndim)[::-1]).contiguous().permute(*range(ndim)[::-1])
    x.requires_grad_()
    buffer = torch.randn(ops.pack(x, starts, sizes).shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.pack(t, starts, sizes), (x,))
    assert torch.autograd.gradcheck(lambda t: ops.unpack(t, x.shape, starts, sizes), (buffer,))
    assert torch.autograd.gradgradcheck(lambda t: ops.pack(t, starts, sizes).square(), (x,))
    assert torch.autograd.gradgradcheck(lambda t: ops.unpack(t, x.shape, starts, sizes).square(), (buffer,))


def test_gradient_of_a_sum_is_the_number_of_boxes() -> None:
    # sum() hands an expanded gradient to the backward.
    x = torch.randn(3, 4, requires_grad=True)
    ops.pack(x, [0, 0, 1, 1], [2, 2, 2, 2]).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([[1.0, 1, 0, 0], [1, 2, 1, 0], [0, 1, 1, 0]]))
    buffer = torch.randn(4, requires_grad=True)
    (3 * ops.unpack(buffer, (3, 4), [1, 1], [2, 2])).sum().backward()
    assert buffer.grad is not None
    assert torch.equal(buffer.grad, torch.full((4,), 3.0))


def test_writes_count_as_new_versions() -> None:
    out = torch.zeros(2, 2)
    weight = torch.ones(2, 2, requires_grad=True)
    loss = (out * weight).sum()
    ops.unpack_(out, torch.ones(4), [0, 0], [2, 2])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    version = out._version
    with torch.inference_mode():
        ops.unpack_(out, torch.ones(4), [0, 0], [2, 2])
        inside = torch.zeros(2, 2)
        ops.unpack_(inside, torch.ones(4), [0, 0], [2, 2])
    assert out._version == version + 1
    assert torch.equal(inside, torch.ones(2, 2))


@pytest.mark.parametrize("which", ["out", "buffer"])
def test_in_place_refuses_what_requires_grad(which: str) -> None:
    out = torch.zeros(2, 2, requires_grad=which == "out")
    buffer = torch.arange(4.0).requires_grad_(which == "buffer")
    with pytest.raises(RuntimeError, match="unpack_: expected tensors that do not require grad"):
        ops.unpack_(out, buffer, [0, 0], [2, 2])
    with torch.no_grad():
        ops.unpack_(out, buffer, [0, 0], [2, 2])
    assert torch.equal(out.detach(), torch.arange(4.0).view(2, 2))


# Bad input.


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta: the checks of the fakes
@pytest.mark.parametrize(
    ("starts", "sizes", "message"),
    [
        ([0, 0, 2, 1], [1, 1, 2, 1], r"box 1 leaves the tensor.*0\.\.3 in dimension 0, got start 2 and size 2"),
        ([0, -1], [1, 1], r"box 0 leaves the tensor.*0\.\.4 in dimension 1, got start -1 and size 1"),
        ([0, 0], [1, -2], r"box 0 leaves the tensor.*0\.\.4 in dimension 1, got start 0 and size -2"),
        ([0, 2**62], [1, 2**62], r"box 0 leaves the tensor.*got start 4611686018427387904"),
        ([0, 0, 0], [1, 1, 1], r"expected 2 starts and sizes for each box of a 2-D tensor, got 3 starts and 3 sizes"),
        ([0, 0], [1, 1, 1, 1], r"expected 2 starts and sizes for each box of a 2-D tensor, got 2 starts and 4 sizes"),
    ],
)
def test_bad_boxes(starts: list[int], sizes: list[int], message: str, device: str) -> None:
    x = torch.zeros(3, 4, device=device)
    buffer = torch.zeros(1, device=device)
    with pytest.raises(ValueError, match=f"(?s)pack: .*{message}"):
        ops.pack(x, starts, sizes)
    with pytest.raises(ValueError, match=f"(?s)unpack: .*{message}"):
        ops.unpack(buffer, (3, 4), starts, sizes)
    with pytest.raises(ValueError, match=f"(?s)unpack_: .*{message}"):
        ops.unpack_(x, buffer, starts, sizes)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_buffers(device: str) -> None:
    out = torch.zeros(3, 4, device=device)
    box = ([0, 0], [2, 2])
    with pytest.raises(ValueError, match=r"expected a buffer of 4 elements .*got 5"):
        ops.unpack_(out, torch.zeros(5, device=device), *box)
    with pytest.raises(ValueError, match=r"expected a buffer of 4 elements .*got 3"):
        ops.unpack(torch.zeros(3, device=device), (3, 4), *box)
    with pytest.raises(ValueError, match=r"expected a 1-D buffer, got shape \[2, 2\]"):
        ops.unpack_(out, torch.zeros(2, 2, device=device), *box)
    with pytest.raises(
        TypeError, match=r"(?i)expected a buffer of dtype (Float|torch.float32) .*bfloat16.*got (Int|torch.int32)"
    ):
        ops.unpack_(out, torch.zeros(4, device=device, dtype=torch.int32), *box)
    with pytest.raises(ValueError, match="expected a tensor of 1 or more dimensions, got a 0-d tensor"):
        ops.pack(torch.zeros((), device=device), [], [])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2], ids=str)
def test_dtypes_without_sums_are_refused(dtype: torch.dtype) -> None:
    buffer = torch.zeros(4, dtype=torch.uint8).view(dtype)
    with pytest.raises(TypeError, match="expected an integer, floating point or complex dtype to add to, got"):
        ops.unpack_(torch.zeros(2, 2, dtype=torch.uint8).view(dtype), buffer, [0, 0], [2, 2], accumulate=True)
    with pytest.raises(TypeError, match="expected an integer, floating point or complex dtype to add to, got"):
        ops.unpack(torch.zeros(4, dtype=torch.uint8).view(dtype), (2, 2), [0, 0], [2, 2])


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    "out", [torch.zeros(3, 1).expand(3, 4), torch.zeros(9).as_strided((3, 4), (2, 1))], ids=["expanded", "windows"]
)
def test_outputs_that_share_memory_are_refused(out: Tensor, accumulate: bool) -> None:
    with pytest.raises(ValueError, match=r"elements do not share memory, got shape \[3, 4\] with strides"):
        ops.unpack_(out, torch.ones(1), [0, 0], [1, 1], accumulate=accumulate)


def test_buffers_inside_the_tensor_are_refused() -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="refer to a single memory location"):
        ops.unpack_(x, x[0], [1, 0], [1, 4])


def test_a_device_without_a_kernel_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"pack.*SparseCPU"):
        ops.pack(torch.eye(3).to_sparse(), [0, 0], [1, 1])
