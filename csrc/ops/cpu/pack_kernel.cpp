#include <ATen/OpMathType.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "ops/cpu/move.h"
#include "ops/cpu/numbers.h"
#include "ops/cpu/vector_kernels.h"
#include "ops/pack.h"
#include "ops/strided.h"

namespace mimo_ext::ops {
namespace {

/// Calls `visit(region, first, count)` for each box of `t` that is not empty: its elements lie in `region` of `t` and
/// at [first, first + count) of the buffer.
template <typename Visit>
void for_each_box(const at::Tensor& t, at::IntArrayRef starts, at::IntArrayRef sizes, Visit&& visit) {
  const auto ndim = static_cast<size_t>(t.dim());
  int64_t first = 0;
  for (size_t box = 0; box < starts.size(); box += ndim) {
    int64_t offset = 0;
    for (size_t d = 0; d < ndim; ++d) offset += starts[box + d] * t.strides()[d];
    const Strided region = merge_dims(sizes.slice(box, ndim), t.strides(), offset);
    const int64_t count = region.numel();
    if (count > 0) visit(region, first, count);
    first += count;
  }
}

template <typename scalar_t>
scalar_t sum(scalar_t a, scalar_t b) {
  if constexpr (std::is_integral_v<scalar_t>) {
    // Wraps around, as PyTorch's integers do; signed overflow would be undefined.
    using unsigned_t = std::make_unsigned_t<scalar_t>;
    return static_cast<scalar_t>(static_cast<unsigned_t>(a) + static_cast<unsigned_t>(b));
  } else {
    // Narrow types are added in float and rounded once.
    using opmath_t = std::conditional_t<sizeof(scalar_t) == 1, float, at::opmath_type<scalar_t>>;
    return static_cast<scalar_t>(static_cast<opmath_t>(a) + static_cast<opmath_t>(b));
  }
}

/// Sums of dtypes that the vector kernels do not know.
template <typename scalar_t>
void add_boxes(const at::Tensor& out, const at::Tensor& buffer, at::IntArrayRef starts, at::IntArrayRef sizes) {
  auto* to = static_cast<scalar_t*>(out.mutable_data_ptr());
  const auto* from = static_cast<const scalar_t*>(buffer.const_data_ptr());
  for_each_box(out, starts, sizes, [&](const Strided& region, int64_t first, int64_t count) {
    const scalar_t* piece = from + first;
    const int64_t stride = region.strides.back();
    for_each_run(region, 0, count, [&](int64_t offset, int64_t n) {
      scalar_t* run = to + offset;
      if (stride == 1) {  // a loop that the compiler can vectorise
        for (int64_t i = 0; i < n; ++i) run[i] = sum(run[i], piece[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) run[i * stride] = sum(run[i * stride], piece[i]);
      }
      piece += n;
    });
  });
}

void add_boxes_of_other_dtypes(const at::Tensor& out, const at::Tensor& buffer, at::IntArrayRef starts,
                               at::IntArrayRef sizes) {
  switch (out.scalar_type()) {
    case at::kFloat8_e4m3fn:
      return add_boxes<at::Float8_e4m3fn>(out, buffer, starts, sizes);
    case at::kFloat8_e5m2:
      return add_boxes<at::Float8_e5m2>(out, buffer, starts, sizes);
    case at::kFloat8_e4m3fnuz:
      return add_boxes<at::Float8_e4m3fnuz>(out, buffer, starts, sizes);
    case at::kFloat8_e5m2fnuz:
      return add_boxes<at::Float8_e5m2fnuz>(out, buffer, starts, sizes);
    case at::kByte:
      return add_boxes<uint8_t>(out, buffer, starts, sizes);
    case at::kChar:
      return add_boxes<int8_t>(out, buffer, starts, sizes);
    case at::kUInt16:
      return add_boxes<uint16_t>(out, buffer, starts, sizes);
    case at::kShort:
      return add_boxes<int16_t>(out, buffer, starts, sizes);
    case at::kUInt32:
      return add_boxes<uint32_t>(out, buffer, starts, sizes);
    case at::kInt:
      return add_boxes<int32_t>(out, buffer, starts, sizes);
    case at::kUInt64:
      return add_boxes<uint64_t>(out, buffer, starts, sizes);
    case at::kLong:
      return add_boxes<int64_t>(out, buffer, starts, sizes);
    case at::kComplexHalf:
      return add_boxes<c10::complex<at::Half>>(out, buffer, starts, sizes);
    case at::kComplexFloat:
      return add_boxes<c10::complex<float>>(out, buffer, starts, sizes);
    case at::kComplexDouble:
      return add_boxes<c10::complex<double>>(out, buffer, starts, sizes);
    default:
      TORCH_CHECK_TYPE(false, "unpack_: adding is not supported for dtype ", out.scalar_type());
  }
}

constexpr int64_t kTile = 512;  // elements of memory with gaps that are worked on at a time
using Tile = std::array<std::byte, kTile * sizeof(double)>;

/// Boxes into a buffer of another dtype.
void convert_from_boxes(const at::Tensor& x, std::byte* to, size_t to_type, int64_t to_size, at::IntArrayRef starts,
                        at::IntArrayRef sizes) {
  const cpu::Convert convert = cpu::vector_kernels().convert[to_type][*number_of(x.scalar_type())];
  const auto itemsize = static_cast<int64_t>(x.element_size());
  const auto* from = static_cast<const std::byte*>(x.const_data_ptr());
  for_each_box(x, starts, sizes, [&](const Strided& region, int64_t first, int64_t count) {
    std::byte* piece = to + first * to_size;
    const int64_t step = region.strides.back() * itemsize;
    for_each_run(region, 0, count, [&](int64_t offset, int64_t n) {
      const std::byte* run = from + offset * itemsize;
      if (step == itemsize) {
        convert(piece, run, n);
      } else {
        Tile tile;
        for (int64_t i = 0; i < n; i += kTile) {
          const int64_t some = std::min(kTile, n - i);
          move_run(itemsize, run + i * step, step, tile.data(), itemsize, some);
          convert(piece + i * to_size, tile.data(), some);
        }
      }
      piece += n * to_size;
    });
  });
}

/// A buffer into boxes of another dtype, or added to boxes.
void convert_to_boxes(const at::Tensor& out, const std::byte* from, size_t from_type, int64_t from_size,
                      at::IntArrayRef starts, at::IntArrayRef sizes, bool add) {
  const cpu::VectorKernels& kernels = cpu::vector_kernels();
  const cpu::Convert convert = (add ? kernels.add : kernels.convert)[*number_of(out.scalar_type())][from_type];
  const auto itemsize = static_cast<int64_t>(out.element_size());
  auto* to = static_cast<std::byte*>(out.mutable_data_ptr());
  for_each_box(out, starts, sizes, [&](const Strided& region, int64_t first, int64_t count) {
    const std::byte* piece = from + first * from_size;
    const int64_t step = region.strides.back() * itemsize;
    for_each_run(region, 0, count, [&](int64_t offset, int64_t n) {
      std::byte* run = to + offset * itemsize;
      if (step == itemsize) {
        convert(run, piece, n);
      } else {
        Tile tile;
        for (int64_t i = 0; i < n; i += kTile) {
          const int64_t some = std::min(kTile, n - i);
          if (add) move_run(itemsize, run + i * step, step, tile.data(), itemsize, some);
          convert(tile.data(), piece + i * from_size, some);
          move_run(itemsize, tile.data(), itemsize, run + i * step, step, some);
        }
      }
      piece += n * from_size;
    });
  });
}

void pack_into_cpu(const at::Tensor& buffer, const at::Tensor& x, at::IntArrayRef starts, at::IntArrayRef sizes) {
  check_pack_into(buffer, x, starts, sizes);
  const auto itemsize = static_cast<int64_t>(x.element_size());
  const auto* from = static_cast<const std::byte*>(x.const_data_ptr());
  auto* to = static_cast<std::byte*>(buffer.mutable_data_ptr());
  if (buffer.scalar_type() != x.scalar_type()) {
    return convert_from_boxes(x, to, *number_of(buffer.scalar_type()), static_cast<int64_t>(buffer.element_size()),
                              starts, sizes);
  }
  for_each_box(x, starts, sizes, [&](const Strided& region, int64_t first, int64_t count) {
    std::byte* piece = to + first * itemsize;
    const int64_t step = region.strides.back() * itemsize;
    for_each_run(region, 0, count, [&](int64_t offset, int64_t n) {
      move_run(itemsize, from + offset * itemsize, step, piece, itemsize, n);
      piece += n * itemsize;
    });
  });
}

void unpack_cpu(const at::Tensor& out, const at::Tensor& buffer, at::IntArrayRef starts, at::IntArrayRef sizes,
                bool accumulate) {
  check_unpack_(out, buffer, starts, sizes, accumulate);
  const at::Tensor pieces = buffer.contiguous();  // an incoming gradient may be expanded
  const auto* from = static_cast<const std::byte*>(pieces.const_data_ptr());
  if (accumulate || out.scalar_type() != pieces.scalar_type()) {
    const std::optional<size_t> number = number_of(pieces.scalar_type());
    if (!number) return add_boxes_of_other_dtypes(out, pieces, starts, sizes);
    return convert_to_boxes(out, from, *number, static_cast<int64_t>(pieces.element_size()), starts, sizes, accumulate);
  }
  const auto itemsize = static_cast<int64_t>(out.element_size());
  auto* to = static_cast<std::byte*>(out.mutable_data_ptr());
  for_each_box(out, starts, sizes, [&](const Strided& region, int64_t first, int64_t count) {
    const std::byte* piece = from + first * itemsize;
    const int64_t step = region.strides.back() * itemsize;
    for_each_run(region, 0, count, [&](int64_t offset, int64_t n) {
      move_run(itemsize, piece, itemsize, to + offset * itemsize, step, n);
      piece += n * itemsize;
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mimo_ext, CPU, m) {
  m.impl("pack_into", pack_into_cpu);
  m.impl("unpack_", unpack_cpu);
}

}  // namespace mimo_ext::ops
