#pragma once

// Regions whose matrices, the last two dimensions, are transposed: elements of a row lie apart in the tensor and those
// of a column together.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ops/strided.h"

namespace mimo_ext::ops {

inline bool is_transposed(const Strided& region) {
  const size_t ndim = region.sizes.size();
  return ndim > 1 && region.strides[ndim - 1] != 1 && region.strides[ndim - 2] == 1;
}

/// Calls `visit(offset, first)` for each matrix: its first element lies at `offset` of the tensor, and is element
/// `first` of the region.
template <typename Visit>
void for_each_matrix(const Strided& region, Visit&& visit) {
  Strided outer = region;
  outer.sizes.pop_back();
  outer.strides.pop_back();
  outer.sizes.back() = 1;
  outer.strides.back() = 1;
  const int64_t count = region.sizes.back() * region.sizes[region.sizes.size() - 2];
  int64_t first = 0;
  for_each_run(outer, 0, outer.numel(), [&](int64_t offset, int64_t) {
    visit(offset, first);
    first += count;
  });
}

// A block has two lines or more of each column, and rows long enough to be worth a call.
inline constexpr int64_t kBlockRows = 64;
inline constexpr int64_t kBlockColumns = 256;

/// Room for a block of any dtype, contiguous but that its rows are kBlockColumns elements apart.
struct alignas(64) Block {
  std::byte data[kBlockRows * kBlockColumns * sizeof(double)];
};

/// Calls `visit(offset, first, rows, columns)` for the blocks of all matrices, as for_each_matrix does.
template <typename Visit>
void for_each_block(const Strided& region, Visit&& visit) {
  const int64_t rows = region.sizes[region.sizes.size() - 2];
  const int64_t columns = region.sizes.back();
  const int64_t stride = region.strides.back();
  for_each_matrix(region, [&](int64_t offset, int64_t first) {
    for (int64_t row = 0; row < rows; row += kBlockRows) {
      for (int64_t column = 0; column < columns; column += kBlockColumns) {
        visit(offset + row + column * stride, first + row * columns + column, std::min(kBlockRows, rows - row),
              std::min(kBlockColumns, columns - column));
      }
    }
  });
}

}  // namespace mimo_ext::ops
