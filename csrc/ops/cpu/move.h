#pragma once

// Moves elements as bytes, between memory of any steps and any alignment. C++ standard library only.

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

}  // namespace mimo_ext::ops
