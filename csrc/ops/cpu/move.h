#pragma once

// Moves elements as bytes, between memory of any steps and any alignment. C++ standard library only.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace mimo_ext::ops {

/// `count` elements of `kBytes` bytes; steps are in bytes. memcpy of a constant size is one move.
template <size_t kBytes>
void move_elements(const std::byte* src, int64_t src_step, std::byte* dst, int64_t dst_step, int64_t count) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(dst + i * dst_step, src + i * src_step, kBytes);
}

/// A run of `count` elements of `itemsize` bytes (1, 2, 4, 8 or 16); steps are in bytes.
inline void move_run(int64_t itemsize, const std::byte* src, int64_t src_step, std::byte* dst, int64_t dst_step,
                     int64_t count) {
  if (src_step == itemsize && dst_step == itemsize) {
    std::memcpy(dst, src, static_cast<size_t>(count * itemsize));
    return;
  }
  switch (itemsize) {
    case 1:
      return move_elements<1>(src, src_step, dst, dst_step, count);
    case 2:
      return move_elements<2>(src, src_step, dst, dst_step, count);
    case 4:
      return move_elements<4>(src, src_step, dst, dst_step, count);
    case 8:
      return move_elements<8>(src, src_step, dst, dst_step, count);
    case 16:
      return move_elements<16>(src, src_step, dst, dst_step, count);
    default:
      throw std::invalid_argument("expected elements of 1, 2, 4, 8 or 16 bytes, got " + std::to_string(itemsize));
  }
}

/// A matrix of `rows` x `columns` elements of kBytes bytes, of which the source has its columns together and the
/// destination its rows, or the other way round: in blocks that stay in the cache. Steps are in bytes.
template <size_t kBytes>
void move_matrix(const std::byte* src, int64_t src_row, int64_t src_column, std::byte* dst, int64_t dst_row,
                 int64_t dst_column, int64_t rows, int64_t columns) {
  constexpr int64_t kBlock = 64;
  for (int64_t row = 0; row < rows; row += kBlock) {
    const int64_t last_row = std::min(rows, row + kBlock);
    for (int64_t column = 0; column < columns; column += kBlock) {
      const int64_t last_column = std::min(columns, column + kBlock);
      for (int64_t r = row; r < last_row; ++r) {
        for (int64_t c = column; c < last_column; ++c) {
          std::memcpy(dst + r * dst_row + c * dst_column, src + r * src_row + c * src_column, kBytes);
        }
      }
    }
  }
}

/// For elements of `itemsize` bytes (1, 2, 4, 8 or 16).
inline void move_matrix(int64_t itemsize, const std::byte* src, int64_t src_row, int64_t src_column, std::byte* dst,
                        int64_t dst_row, int64_t dst_column, int64_t rows, int64_t columns) {
  const auto move = itemsize == 1   ? move_matrix<1>
                    : itemsize == 2 ? move_matrix<2>
                    : itemsize == 4 ? move_matrix<4>
                    : itemsize == 8 ? move_matrix<8>
                                    : move_matrix<16>;
  move(src, src_row, src_column, dst, dst_row, dst_column, rows, columns);
}

}  // namespace mimo_ext::ops
