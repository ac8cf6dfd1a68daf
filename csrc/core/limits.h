// How large things may be, and arithmetic that does not overflow. Sizes come from users and from peers: what is larger
// is refused by name, so that no product in a plan overflows and no array grows without bound.
#pragma once

#include <cstdint>
#include <limits>

namespace mimo_ext::core {

inline constexpr std::int64_t kMaxRanks = std::int64_t{1} << 20;      ///< of a layout
inline constexpr std::int64_t kMaxSamples = std::int64_t{1} << 40;    ///< of a global microbatch
inline constexpr std::int64_t kMaxRowCounts = std::int64_t{1} << 24;  ///< samples that have row counts of their own
inline constexpr std::int64_t kMaxElements = std::int64_t{1} << 48;   ///< of a tensor, all lanes together
inline constexpr std::int64_t kMaxElementSize = 64;                   ///< bytes
inline constexpr std::int64_t kMaxLinkValue = std::int64_t{1} << 50;  ///< bytes per second, or nanoseconds
inline constexpr std::int64_t kMaxStages = std::int64_t{1} << 32;     ///< of a module
inline constexpr int kMaxChunks = 4096;

/// floor(extent * index / parts) for extent >= 0, 0 <= index <= parts and parts of up to 2^31.
constexpr std::int64_t share(std::int64_t extent, std::int64_t index, std::int64_t parts) {
  return extent / parts * index + extent % parts * index / parts;
}

/// A sum or a product of values >= 0 that stops at the largest one.
constexpr std::int64_t saturating_add(std::int64_t a, std::int64_t b) {
  std::int64_t sum = 0;
  return __builtin_add_overflow(a, b, &sum) ? std::numeric_limits<std::int64_t>::max() : sum;
}
constexpr std::int64_t saturating_mul(std::int64_t a, std::int64_t b) {
  std::int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? std::numeric_limits<std::int64_t>::max() : product;
}

}  // namespace mimo_ext::core
