"""rescale_: values, sums and flags against the reference; the same bits for any number of threads."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from mimo_ext import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BLOCK = 16384  # elements in one partial sum of the CPU kernel: sizes around it are the interesting ones


def tensor_in_memory(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random values in memory of some layout, and all of that memory. Gaps hold 7."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if not shape or layout == "contiguous":
        return values, values
    if layout == "reversed":  # the first dimension is the innermost
        memory = torch.empty(shape[::-1], dtype=dtype)
        view = memory.permute(*range(len(shape))[::-1])
    elif layout == "stepped":  # gaps between elements in every dimension
        memory = torch.full([2 * n for n in shape], 7, dtype=dtype)
        view = memory[(slice(None, None, 2),) * len(shape)]
    else:  # "windowed": rows of a wider tensor, not from its start
        memory = torch.full([n + 2 for n in shape], 7, dtype=dtype)
        view = memory[tuple(slice(1, 1 + n) for n in shape)]
    return view.copy_(values), memory


def tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> Tensor:
    return tensor_in_memory(shape, dtype, layout, seed)[0]


def exact_sumsq(buffers: list[Tensor]) -> float:
    return math.fsum(v * v for b in buffers for v in b.double().flatten().tolist())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["contiguous", "reversed", "stepped", "windowed"])
@pytest.mark.parametrize("shape", [(37,), (17, 19), (3, 5, 70), ()], ids=str)
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype: torch.dtype, factor_dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    buffer, memory = tensor_in_memory(shape, dtype, layout)
    factor = torch.tensor(1 / 3, dtype=factor_dtype)
    expected = buffer.clone()
    expected_sumsq, expected_found = reference.rescale_([expected], factor, with_sumsq=True, with_found_inf=True)

    sumsq, found_inf = ops.rescale_([buffer], factor, with_sumsq=True, with_found_inf=True)
    assert torch.equal(buffer, expected)
    assert (sumsq.dtype, sumsq.shape) == (torch.float64, ())
    assert (found_inf.dtype, found_inf.shape) == (torch.float32, ())
    torch.testing.assert_close(sumsq, expected_sumsq, rtol=1e-14, atol=0)
    assert sumsq.item() == pytest.approx(exact_sumsq([buffer]), rel=1e-14)
    assert found_inf == expected_found == 0
    assert (memory == 7).sum() == memory.numel() - buffer.numel()  # gaps stay as they were


@pytest.mark.parametrize(("with_sumsq", "with_found_inf"), itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_what_is_asked_for(dtype: torch.dtype, with_sumsq: bool, with_found_inf: bool) -> None:
    buffers = [tensor((100,), dtype), torch.tensor([1.0, math.inf], dtype=dtype)]
    expected = [b * torch.tensor(0.5, dtype=dtype) for b in buffers]
    sumsq, found_inf = ops.rescale_(buffers, 0.5, with_sumsq=with_sumsq, with_found_inf=with_found_inf)
    assert torch.equal(buffers[0], expected[0])
    assert torch.equal(buffers[1], expected[1])
    assert sumsq.item() == (math.inf if with_sumsq else 0)
    assert found_inf.item() == (1 if with_found_inf else 0)


@pytest.mark.parametrize("numel", [0, 1, 15, 16, 63, 64, 65, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77])
def test_sizes_around_a_block(numel: int) -> None:
    buffer = tensor((numel,), torch.float32)
    expected = buffer * 3
    sumsq, found_inf = ops.rescale_([buffer], 3.0, with_sumsq=True, with_found_inf=True)
    assert torch.equal(buffer, expected)
    assert sumsq.item() == pytest.approx(exact_sumsq([expected]), rel=1e-13)
    assert found_inf.item() == 0


def test_many_buffers_of_all_dtypes_and_sizes() -> None:
    shapes: list[tuple[int, ...]] = [(0,), (1,), (5, 0, 2), (7, 9), (BLOCK + 3,), (2, 3, 4), (), (40, 500)]
    layouts = ["contiguous", "reversed", "stepped", "windowed"]
    buffers = [
        tensor(shape, dtype, layouts[(i + j) % 4], seed=i)
        for i, shape in enumerate(shapes)
        for j, dtype in enumerate(DTYPES)
    ]
    expected = [b.clone() for b in buffers]
    expected_sumsq, _ = reference.rescale_(expected, 0.7, with_sumsq=True)
    sumsq, found_inf = ops.rescale_(buffers, 0.7, with_sumsq=True, with_found_inf=True)
    for got, want in zip(buffers, expected, strict=True):
        assert torch.equal(got, want)
    torch.testing.assert_close(sumsq, expected_sumsq, rtol=1e-13, atol=0)
    assert found_inf.item() == 0


def test_no_buffers() -> None:
    sumsq, found_inf = ops.rescale_([], torch.tensor(2.0), with_sumsq=True, with_found_inf=True)
    assert (sumsq.item(), found_inf.item()) == (0, 0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(DTYPES)), max_size=5),
    st.sampled_from([0.0, -1.0, 0.25, 1e-3, 1e4]),
    st.integers(0, 99),
)
def test_random_lists(cases: list[tuple[list[int], torch.dtype]], factor: float, seed: int) -> None:
    layouts = itertools.cycle(["contiguous", "reversed", "stepped", "windowed"])
    buffers = [tensor(tuple(shape), dtype, next(layouts), seed) for shape, dtype in cases]
    expected = [b.clone() for b in buffers]
    want = reference.rescale_(expected, factor, with_sumsq=True, with_found_inf=True)
    got = ops.rescale_(buffers, factor, with_sumsq=True, with_found_inf=True)
    assert all(torch.equal(a, b) for a, b in zip(buffers, expected, strict=True))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


# Infinities and NaNs.


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 40, 64, BLOCK - 1, BLOCK + 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_found_inf_wherever_it_is(dtype: torch.dtype, where: int, bad: float) -> None:
    for with_sumsq in (False, True):
        buffers = [tensor((9,), dtype), tensor((BLOCK + 3,), dtype), tensor((0,), dtype)]
        buffers[1][where] = bad
        sumsq, found_inf = ops.rescale_(buffers, 2.0, with_sumsq=with_sumsq, with_found_inf=True)
        assert found_inf.item() == 1
        assert sumsq.isfinite().item() == (not with_sumsq)


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float16, 4e4), (torch.bfloat16, 3e38), (torch.float32, 3e38), (torch.float64, 1e308)]
)
def test_overflow_in_the_multiplication_is_found(dtype: torch.dtype, value: float) -> None:
    for scale, found in ((1.0, 0), (2.0, 1)):
        buffer = torch.full((70,), value, dtype=dtype)
        _, found_inf = ops.rescale_([buffer], scale, with_found_inf=True)
        assert found_inf.item() == found
        assert buffer.isinf().all().item() == bool(found)


def test_large_finite_values_are_not_taken_for_infinities() -> None:
    # Squares of float64 overflow; the values do not. The largest float32 has a square that float64 holds.
    big = torch.full((3 * BLOCK,), 1e200, dtype=torch.float64)
    sumsq, found_inf = ops.rescale_([big], 1.0, with_sumsq=True, with_found_inf=True)
    assert (sumsq.item(), found_inf.item()) == (math.inf, 0)
    most = torch.full((3 * BLOCK,), torch.finfo(torch.float32).max)
    sumsq, found_inf = ops.rescale_([most], 1.0, with_sumsq=True, with_found_inf=True)
    assert found_inf.item() == 0
    assert sumsq.item() == pytest.approx(3 * BLOCK * torch.finfo(torch.float32).max ** 2, rel=1e-13)


def test_a_factor_that_is_not_finite() -> None:
    buffer = torch.ones(5)
    _, found_inf = ops.rescale_([buffer], torch.tensor(math.nan), with_found_inf=True)
    assert buffer.isnan().all()
    assert found_inf.item() == 1


def test_narrow_types_are_rounded_once() -> None:
    # 1/3 rounded to bfloat16 first would give other products.
    buffer = tensor((100,), torch.bfloat16)
    expected = (buffer.float() * torch.tensor(1 / 3)).bfloat16()
    assert not torch.equal(expected, buffer * torch.tensor(1 / 3).bfloat16())
    ops.rescale_([buffer], 1 / 3)
    assert torch.equal(buffer, expected)


# Determinism.


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    shapes = [(11 * BLOCK + 5,), (300, 301), (3,), (2 * BLOCK,)]
    originals = [tensor(s, dtype, "reversed" if len(s) > 1 else "contiguous", seed=i) for i, s in enumerate(shapes)]
    results = []
    for num_threads in (1, 2, 3, 4):
        torch.set_num_threads(num_threads)
        buffers = [b.clone() for b in originals]
        sumsq, found_inf = ops.rescale_(buffers, 1.1, with_sumsq=True, with_found_inf=True)
        results.append((sumsq.item(), found_inf.item(), buffers))
    for sumsq_value, found_value, buffers in results[1:]:
        assert (sumsq_value, found_value) == results[0][:2]
        assert all(torch.equal(a, b) for a, b in zip(buffers, results[0][2], strict=True))


def test_the_sum_does_not_depend_on_where_memory_starts() -> None:
    # Vector code must not treat a first unaligned part apart.
    values = tensor((2 * BLOCK + 31,), torch.float32)
    sums = set()
    for offset in range(5):
        memory = torch.zeros(values.numel() + offset)
        memory[offset:].copy_(values)
        sums.add(ops.rescale_([memory[offset:]], 0.3, with_sumsq=True)[0].item())
    assert len(sums) == 1


# PyTorch's rules and bad input.


def test_opcheck() -> None:
    op = torch.ops.mimo_ext.rescale_.default
    opcheck(op, ([torch.randn(3, 4), torch.randn(5, 2).t().bfloat16()], torch.tensor(0.5), True, True))
    opcheck(op, ([torch.randn(3)], torch.tensor(0.5, dtype=torch.float64)))


def test_writes_count_as_new_versions() -> None:
    a, b = torch.ones(3), torch.ones(2, 2)
    with torch.inference_mode():
        ops.rescale_([a, b], 2.0)
    ops.rescale_([b], 2.0)
    assert (a._version, b._version) == (1, 2)
    assert torch.equal(b, torch.full((2, 2), 4.0))


@pytest.mark.parametrize("which", ["buffer", "factor"])
def test_refuses_what_requires_grad(which: str) -> None:
    buffer = torch.ones(3, requires_grad=which == "buffer")
    factor = torch.tensor(2.0, requires_grad=which == "factor")
    with pytest.raises(RuntimeError, match="rescale_: expected tensors that do not require grad"):
        ops.rescale_([torch.ones(2), buffer], factor)
    assert torch.equal(buffer.detach(), torch.ones(3))
    with torch.no_grad():
        ops.rescale_([torch.ones(2), buffer], factor)
    assert torch.equal(buffer.detach(), torch.full((3,), 2.0))


def test_bad_input_is_named_and_nothing_is_scaled() -> None:
    good = torch.ones(3)
    one = torch.ones(6)
    cases = [
        ([good, torch.ones(2, dtype=torch.int32)], torch.tensor(2.0), TypeError, r"got Int \(buffer 1\)"),
        ([good, torch.ones(2, dtype=torch.complex64)], torch.tensor(2.0), TypeError, r"got ComplexFloat \(buffer 1\)"),
        ([good], torch.tensor(2), TypeError, "expected a factor of dtype Float or Double, got Long"),
        ([good], torch.tensor([2.0]), ValueError, r"expected a 0-d factor, got shape \[1\]"),
        ([good, torch.ones(1).expand(3)], torch.tensor(2.0), ValueError, r"elements do not share memory.*buffer 1"),
        ([good, torch.ones(9).as_strided((3, 4), (2, 1))], torch.tensor(2.0), ValueError, "do not share memory"),
        ([good, torch.ones(1), good], torch.tensor(2.0), ValueError, "got buffers 0 and 2 that do"),
        ([good, one[:4], one[3:]], torch.tensor(2.0), ValueError, "got buffers 1 and 2 that do"),
        ([good, one[::2], one[:3]], torch.tensor(2.0), ValueError, "got buffers 1 and 2 that do"),
    ]
    for buffers, factor, error, message in cases:
        with pytest.raises(error, match=message):
            ops.rescale_(buffers, factor)
    assert torch.equal(good, torch.ones(3))


def test_interleaved_buffers_are_apart() -> None:
    whole = torch.ones(4, 6)
    ops.rescale_([whole[:, ::2], whole[:, 1::2]], 3.0)
    assert torch.equal(whole, torch.full((4, 6), 3.0))
