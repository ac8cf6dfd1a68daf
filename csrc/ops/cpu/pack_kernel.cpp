#include <ATen/OpMathType.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>

#include "ops/cpu/matrices.h"
#include "ops/cpu/move.h"
#include "ops/cpu/numbers.h"
#include "ops/cpu/transpose.h"
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

// Where more than this moves, in bytes of the buffer, runs that are long enough go past the caches.
constexpr int64_t kLarge = int64_t{8} << 20;
constexpr int64_t kLargeRun = 1024;

bool is_large(const at::Tensor& buffer) {
  return static_cast<int64_t>(buffer.nbytes()) >= kLarge;
}

/// Calls `run(box, next, n)` for the runs of a region of a tensor whose memory begins at `boxes`: `n` elements at
/// `box`. next: what to fetch along with them, since it is their turn by the time that it has arrived.
template <typename Byte, typename Run>
void for_each_large_run(const Strided& region, Byte* boxes, int64_t itemsize, Run&& run) {
  const int64_t n = region.sizes.back();
  const int64_t bytes = n * itemsize;
  const int64_t ahead = (cpu::kFetchAhead + bytes - 1) / bytes;
  for_each_row(region, ahead, [&](int64_t offset, int64_t later) {
    Byte* box = boxes + offset * itemsize;
    run(box, boxes + later * itemsize, n);
  });
}

/// Whether the runs of a region are contiguous and long enough to go past the caches.
bool has_large_runs(const Strided& region, int64_t itemsize) {
  return region.strides.back() == 1 && region.sizes.back() * itemsize >= kLargeRun;
}

/// Moves the elements of a box between the tensor, whose memory begins at `boxes`, and their place in the buffer.
void move_box(const Strided& region, int64_t count, std::byte* boxes, std::byte* piece, int64_t itemsize,
              bool to_buffer, bool large) {
  const int64_t step = region.strides.back() * itemsize;
  if (is_transposed(region)) {
    const int64_t rows = region.sizes[region.sizes.size() - 2];
    const int64_t columns = region.sizes.back();
    for_each_matrix(region, [&](int64_t offset, int64_t first) {
      const RowsAt<std::byte> in_box{boxes + offset * itemsize, step};
      const RowsAt<std::byte> in_piece{piece + first * itemsize, columns * itemsize};
      if (to_buffer) {
        transpose(itemsize, in_box, in_piece, columns, rows, large);
      } else {
        transpose(itemsize, in_piece, in_box, rows, columns, large);
      }
    });
    return;
  }
  if (large && has_large_runs(region, itemsize)) {
    const cpu::Stream stream = cpu::vector_kernels().stream;
    for_each_large_run(region, boxes, itemsize, [&](std::byte* box, const std::byte* next, int64_t n) {
      if (to_buffer) {
        stream(piece, box, n * itemsize, next);
      } else {
        stream(box, piece, n * itemsize, nullptr);
      }
      piece += n * itemsize;
    });
    return;
  }
  for_each_run(region, 0, count, [&](int64_t offset, int64_t n) {
    std::byte* box = boxes + offset * itemsize;
    if (to_buffer) {
      move_run(itemsize, box, step, piece, itemsize, n);
    } else {
      move_run(itemsize, piece, itemsize, box, step, n);
    }
    piece += n * itemsize;
  });
}

/// Boxes into a buffer of another dtype.
void convert_from_boxes(const at::Tensor& x, std::byte* to, size_t to_type, int64_t to_size, at::IntArrayRef starts,
                        at::IntArrayRef sizes, bool large) {
  const size_t from_type = *number_of(x.scalar_type());
  const cpu::Convert convert = cpu::vector_kernels().convert[to_type][from_type];
  const cpu::ConvertLarge convert_large = cpu::vector_kernels().convert_large[to_type][from_type];
  const auto itemsize = static_cast<int64_t>(x.element_size());
  const auto* from = static_cast<const std::byte*>(x.const_data_ptr());
  for_each_box(x, starts, sizes, [&](const Strided& region, int64_t first, int64_t count) {
    std::byte* piece = to + first * to_size;
    const int64_t step = region.strides.back() * itemsize;
    if (is_transposed(region)) {
      const auto block = std::make_unique_for_overwrite<Block>();
      const RowsAt<std::byte> turned{block->data, kBlockColumns * itemsize};
      for_each_block(region, [&](int64_t offset, int64_t at, int64_t rows, int64_t columns) {
        transpose(itemsize, {from + offset * itemsize, step}, turned, columns, rows, /*past_caches=*/false);
        for (int64_t row = 0; row < rows; ++row, at += region.sizes.back()) {
          if (large) {
            convert_large(piece + at * to_size, turned.at(row, 0).data, columns, nullptr);
          } else {
            convert(piece + at * to_size, turned.at(row, 0).data, columns);
          }
        }
      });
      return;
    }
    if (large && has_large_runs(region, itemsize)) {
      for_each_large_run(region, from, itemsize, [&](const std::byte* run, const std::byte* next, int64_t n) {
        convert_large(piece, run, n, next);
        piece += n * to_size;
      });
      return;
    }
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
                      at::IntArrayRef starts, at::IntArrayRef sizes, bool add, bool large) {
  const cpu::VectorKernels& kernels = cpu::vector_kernels();
  const size_t to_type = *number_of(out.scalar_type());
  const cpu::Convert convert = (add ? kernels.add : kernels.convert)[to_type][from_type];
  const cpu::ConvertLarge convert_large = (add ? kernels.add_large : kernels.convert_large)[to_type][from_type];
  const auto itemsize = static_cast<int64_t>(out.element_size());
  auto* to = static_cast<std::byte*>(out.mutable_data_ptr());
  for_each_box(out, starts, sizes, [&](const Strided& region, int64_t first, int64_t count) {
    const std::byte* piece = from + first * from_size;
    const int64_t step = region.strides.back() * itemsize;
    if (is_transposed(region)) {
      const auto block = std::make_unique_for_overwrite<Block>();
      const RowsAt<std::byte> turned{block->data, kBlockColumns * itemsize};
      for_each_block(region, [&](int64_t offset, int64_t at, int64_t rows, int64_t columns) {
        const RowsAt<std::byte> in_box{to + offset * itemsize, step};
        if (add) transpose(itemsize, in_box, turned, columns, rows, /*past_caches=*/false);
        for (int64_t row = 0; row < rows; ++row, at += region.sizes.back()) {
          convert(turned.at(row, 0).data, piece + at * from_size, columns);
        }
        transpose(itemsize, turned, in_box, rows, columns, large && !add);
      });
      return;
    }
    if (large && has_large_runs(region, itemsize)) {
      for_each_large_run(region, to, itemsize, [&](std::byte* run, const std::byte* next, int64_t n) {
        convert_large(run, piece, n, add ? next : piece + n * from_size);
        piece += n * from_size;
      });
      return;
    }
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
  const bool large = is_large(buffer);
  const auto itemsize = static_cast<int64_t>(x.element_size());
  auto* to = static_cast<std::byte*>(buffer.mutable_data_ptr());
  auto* from = static_cast<std::byte*>(const_cast<void*>(x.const_data_ptr()));  // read only
  if (buffer.scalar_type() != x.scalar_type()) {
    convert_from_boxes(x, to, *number_of(buffer.scalar_type()), static_cast<int64_t>(buffer.element_size()), starts,
                       sizes, large);
  } else {
    for_each_box(x, starts, sizes, [&](const Strided& region, int64_t first, int64_t count) {
      move_box(region, count, from, to + first * itemsize, itemsize, /*to_buffer=*/true, large);
    });
  }
  if (large) cpu::vector_kernels().finish_streams();
}

void unpack_cpu(const at::Tensor& out, const at::Tensor& buffer, at::IntArrayRef starts, at::IntArrayRef sizes,
                bool accumulate) {
  check_unpack_(out, buffer, starts, sizes, accumulate);
  const at::Tensor pieces = buffer.contiguous();  // an incoming gradient may be expanded
  const bool large = is_large(pieces);
  const auto itemsize = static_cast<int64_t>(out.element_size());
  auto* to = static_cast<std::byte*>(out.mutable_data_ptr());
  auto* from = static_cast<std::byte*>(const_cast<void*>(pieces.const_data_ptr()));  // read only
  const std::optional<size_t> number = number_of(pieces.scalar_type());
  if (!accumulate && out.scalar_type() == pieces.scalar_type()) {
    for_each_box(out, starts, sizes, [&](const Strided& region, int64_t first, int64_t count) {
      move_box(region, count, to, from + first * itemsize, itemsize, /*to_buffer=*/false, large);
    });
  } else if (number) {
    convert_to_boxes(out, from, *number, static_cast<int64_t>(pieces.element_size()), starts, sizes, accumulate, large);
  } else {
    add_boxes_of_other_dtypes(out, pieces, starts, sizes);
  }
  if (large) cpu::vector_kernels().finish_streams();
}

}  // namespace

TORCH_LIBRARY_IMPL(mimo_ext, CPU, m) {
  m.impl("pack_into", pack_into_cpu);
  m.impl("unpack_", unpack_cpu);
}

}  // namespace mimo_ext::ops
