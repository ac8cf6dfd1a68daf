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

/// Calls `visit` with the size of elements, 1, 2, 4, 8 or 16 bytes, as its template argument.
template <typename Visit>
void with_size(int64_t itemsize, Visit&& visit) {
  switch (itemsize) {
    case 1:
      return visit.template operator()<1>();
    case 2:
      return visit.template operator()<2>();
    case 4:
      return visit.template operator()<4>();
    case 8:
      return visit.template operator()<8>();
    case 16:
      return visit.template operator()<16>();
    default:
      throw std::invalid_argument("expected elements of 1, 2, 4, 8 or 16 bytes, got " + std::to_string(itemsize));
  }
}

/// A run of `count` elements of `itemsize` bytes (1, 2, 4, 8 or 16); steps are in bytes.
inline void move_run(int64_t itemsize, const std::byte* src, int64_t src_step, std::byte* dst, int64_t dst_step,
                     int64_t count) {
  if (src_step == itemsize && dst_step == itemsize) {
    std::memcpy(dst, src, static_cast<size_t>(count * itemsize));
    return;
  }
  with_size(itemsize, [&]<size_t kBytes>() { move_elements<kBytes>(src, src_step, dst, dst_step, count); });
}

}  // namespace mimo_ext::ops
