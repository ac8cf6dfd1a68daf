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

constexpr int64_t kTile = 512;  // elements that are worked on at a time where they cannot be in their places
using Tile = std::array<std::byte, kTile * sizeof(double)>;

// Copies that write more than this, in bytes, go past the caches, run by run where a run is long enough.
constexpr int64_t kStreamed = int64_t{8} << 20;
constexpr int64_t kStreamedRun = 1024;

bool is_streamed(const at::Tensor& buffer) {
  return static_cast<int64_t>(buffer.nbytes()) >= kStreamed;
}

/// In elements; where the region has one axis only, whatever.
int64_t to_next_run(const Strided& region) {
  const size_t ndim = region.sizes.size();
  return ndim > 1 ? region.strides[ndim - 2] : region.sizes.back();
}

/// Moves the elements of a box between the tensor, whose memory begins at `boxes`, and their place in the buffer.
void move_box(const Strided& region, int64_t count, std::byte* boxes, std::byte* piece, int64_t itemsize,
              bool to_buffer, bool streamed) {
  const cpu::Stream stream = cpu::vector_kernels().stream;
  const int64_t step = region.strides.back() * itemsize;
  const size_t ndim = region.sizes.size();
  if (ndim > 1 && step != itemsize && region.strides[ndim - 2] == 1) {
    // Rows here are columns there.
    const int64_t rows = region.sizes[ndim - 2];
    const int64_t columns = region.sizes[ndim - 1];
    Strided outer = region;
    outer.sizes.pop_back();
    outer.strides.pop_back();
    outer.sizes.back() = 1;
    outer.strides.back() = 1;
    for_each_run(outer, 0, outer.numel(), [&](int64_t offset, int64_t) {
      std::byte* box = boxes + offset * itemsize;
      if (to_buffer) {
        move_matrix(itemsize, box, itemsize, step, piece, columns * itemsize, itemsize, rows, columns);
      } else {
        move_matrix(itemsize, piece, columns * itemsize, itemsize, box, itemsize, step, rows, columns);
      }
      piece += rows * columns * itemsize;
    });
    return;
  }
  for_each_run(region, 0, count, [&](int64_t offset, int64_t n) {
    std::byte* box = boxes + offset * itemsize;
    std::byte* to = to_buffer ? piece : box;
    const std::byte* from = to_buffer ? box : piece;
    if (streamed && step == itemsize && n * itemsize >= kStreamedRun) {
      stream(to, from, n * itemsize, from + (to_buffer ? to_next_run(region) : n) * itemsize);
    } else {
      move_run(itemsize, from, to_buffer ? step : itemsize, to, to_buffer ? itemsize : step, n);
    }
    piece += n * itemsize;
  });
}

/// Converts a run; past the caches where it is streamed.
void convert_run(cpu::Convert convert, std::byte* to, int64_t to_size, const std::byte* from, int64_t from_size,
                 int64_t count, bool streamed) {
  if (!streamed || count * to_size < kStreamedRun) return convert(to, from, count);
  const cpu::Stream stream = cpu::vector_kernels().stream;
  Tile tile;
  for (int64_t i = 0; i < count; i += kTile) {
    const int64_t some = std::min(kTile, count - i);
    convert(tile.data(), from + i * from_size, some);
    stream(to + i * to_size, tile.data(), some * to_size, tile.data());
  }
}

/// Boxes into a buffer of another dtype.
void convert_from_boxes(const at::Tensor& x, std::byte* to, size_t to_type, int64_t to_size, at::IntArrayRef starts,
                        at::IntArrayRef sizes, bool streamed) {
  const cpu::Convert convert = cpu::vector_kernels().convert[to_type][*number_of(x.scalar_type())];
  const auto itemsize = static_cast<int64_t>(x.element_size());
  const auto* from = static_cast<const std::byte*>(x.const_data_ptr());
  for_each_box(x, starts, sizes, [&](const Strided& region, int64_t first, int64_t count) {
    std::byte* piece = to + first * to_size;
    const int64_t step = region.strides.back() * itemsize;
    for_each_run(region, 0, count, [&](int64_t offset, int64_t n) {
      const std::byte* run = from + offset * itemsize;
      if (step == itemsize) {
        convert_run(convert, piece, to_size, run, itemsize, n, streamed);
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
                      at::IntArrayRef starts, at::IntArrayRef sizes, bool add, bool streamed) {
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
        // What is added to has been read, and is in the cache.
        convert_run(convert, run, itemsize, piece, from_size, n, streamed && !add);
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
  const bool streamed = is_streamed(buffer);
  const auto itemsize = static_cast<int64_t>(x.element_size());
  auto* to = static_cast<std::byte*>(buffer.mutable_data_ptr());
  auto* from = static_cast<std::byte*>(const_cast<void*>(x.const_data_ptr()));  // read only
  if (buffer.scalar_type() != x.scalar_type()) {
    convert_from_boxes(x, to, *number_of(buffer.scalar_type()), static_cast<int64_t>(buffer.element_size()), starts,
                       sizes, streamed);
  } else {
    for_each_box(x, starts, sizes, [&](const Strided& region, int64_t first, int64_t count) {
      move_box(region, count, from, to + first * itemsize, itemsize, /*to_buffer=*/true, streamed);
    });
  }
  if (streamed) cpu::vector_kernels().finish_streams();
}

void unpack_cpu(const at::Tensor& out, const at::Tensor& buffer, at::IntArrayRef starts, at::IntArrayRef sizes,
                bool accumulate) {
  check_unpack_(out, buffer, starts, sizes, accumulate);
  const at::Tensor pieces = buffer.contiguous();  // an incoming gradient may be expanded
  const bool streamed = is_streamed(pieces);
  const auto itemsize = static_cast<int64_t>(out.element_size());
  auto* to = static_cast<std::byte*>(out.mutable_data_ptr());
  auto* from = static_cast<std::byte*>(const_cast<void*>(pieces.const_data_ptr()));  // read only
  const std::optional<size_t> number = number_of(pieces.scalar_type());
  if (!accumulate && out.scalar_type() == pieces.scalar_type()) {
    for_each_box(out, starts, sizes, [&](const Strided& region, int64_t first, int64_t count) {
      move_box(region, count, to, from + first * itemsize, itemsize, /*to_buffer=*/false, streamed);
    });
  } else if (number) {
    convert_to_boxes(out, from, *number, static_cast<int64_t>(pieces.element_size()), starts, sizes, accumulate,
                     streamed);
  } else {
    add_boxes_of_other_dtypes(out, pieces, starts, sizes);
  }
  if (streamed) cpu::vector_kernels().finish_streams();
}

}  // namespace

TORCH_LIBRARY_IMPL(mimo_ext, CPU, m) {
  m.impl("pack_into", pack_into_cpu);
  m.impl("unpack_", unpack_cpu);
}

}  // namespace mimo_ext::ops
