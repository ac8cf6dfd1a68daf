#pragma once

// A part of vector_kernels_impl.h: Convert, ConvertLarge and Stream.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ops/cpu/vector_elements.h"

namespace mimo_ext::ops::cpu {
namespace {

/// A vector of what is to be stored at `to`.
template <typename Dst, typename Src, bool kAdd>
MIMO_EXT_INLINE void load_converted(Vector<typename Dst::Wide>& wide, const typename Dst::Stored* to,
                                    const typename Src::Stored* from) {
  Vector<typename Src::Wide> loaded;
  Src::load_wide(loaded, from);
  wide = __builtin_convertvector(loaded, Vector<typename Dst::Wide>);
  if constexpr (kAdd) {
    Vector<typename Dst::Wide> before;
    Dst::load_wide(before, to);
    wide = before + wide;
  }
}

template <typename Dst, typename Src, bool kAdd, bool kPast = false>
MIMO_EXT_INLINE void convert_vector(typename Dst::Stored* to, const typename Src::Stored* from) {
  Vector<typename Dst::Wide> wide;
  load_converted<Dst, Src, kAdd>(wide, to, from);
  Dst::template store_wide<kPast>(to, wide);
}

/// Two vectors.
template <typename Dst, typename Src, bool kAdd, bool kPast = false>
MIMO_EXT_INLINE void convert_pair(typename Dst::Stored* to, const typename Src::Stored* from) {
#ifdef MIMO_EXT_AVX
  if constexpr (std::is_same_v<Dst, BFloat16>) {
    Vector<float> wide[2];
    for (size_t i = 0; i < 2; ++i) load_converted<Dst, Src, kAdd>(wide[i], to + i * kWidth, from + i * kWidth);
    return Dst::template store_pair<kPast>(to, wide);
  }
#endif
  convert_vector<Dst, Src, kAdd, kPast>(to, from);
  convert_vector<Dst, Src, kAdd, kPast>(to + kWidth, from + kWidth);
}

template <typename Dst, typename Src, bool kAdd>
MIMO_EXT_TARGET void convert(void* dst, const void* src, int64_t count) {
  auto* to = static_cast<typename Dst::Stored*>(dst);
  const auto* from = static_cast<const typename Src::Stored*>(src);
  int64_t i = 0;
  constexpr auto kVector = static_cast<int64_t>(kWidth);
  for (; i + 2 * kVector <= count; i += 2 * kVector) convert_pair<Dst, Src, kAdd>(to + i, from + i);
  for (; i + kVector <= count; i += kVector) convert_vector<Dst, Src, kAdd>(to + i, from + i);
  if (i == count) return;
  const auto rest = static_cast<size_t>(count - i);
  typename Dst::Stored rest_to[kWidth] = {};
  typename Src::Stored rest_from[kWidth] = {};
  if constexpr (kAdd) std::memcpy(rest_to, to + i, rest * sizeof rest_to[0]);
  std::memcpy(rest_from, from + i, rest * sizeof rest_from[0]);
  convert_vector<Dst, Src, kAdd>(rest_to, rest_from);
  std::memcpy(to + i, rest_to, rest * sizeof rest_to[0]);
}

#ifdef MIMO_EXT_AVX
/// The whole steps of kStep elements of [i, end) of a large conversion; returns where the rest begins. Dst is written
/// past the caches, but for sums. ahead: of ReadAhead.
template <typename Dst, typename Src, bool kAdd, int64_t kStep>
MIMO_EXT_INLINE int64_t convert_steps(typename Dst::Stored* to, const typename Src::Stored* from, int64_t i,
                                      int64_t end, uintptr_t ahead) {
  constexpr int64_t kPair = 2 * kWidth;
  constexpr int64_t kFrom = sizeof(typename Src::Stored);
  constexpr int64_t kRead = kAdd ? sizeof(typename Dst::Stored) : kFrom;
  for (; i + kStep <= end; i += kStep) {
    fetch_once<kStep * kRead>(ahead + static_cast<uintptr_t>(i * kRead));
    if constexpr (kAdd) fetch_once<kStep * kFrom>(reinterpret_cast<uintptr_t>(from + i) + kFetchAhead);
#pragma GCC unroll 8
    for (int64_t part = i; part < i + kStep; part += kPair) {
      convert_pair<Dst, Src, kAdd, !kAdd>(to + part, from + part);
    }
  }
  return i;
}
#endif

template <typename Dst, typename Src, bool kAdd>
MIMO_EXT_TARGET void convert_large(void* dst, const void* src, int64_t count, const void* next) {
#ifdef MIMO_EXT_AVX
  using To = typename Dst::Stored;
  using From = typename Src::Stored;
  constexpr int64_t kRead = kAdd ? sizeof(To) : sizeof(From);
  auto* to = static_cast<To*>(dst);
  const auto* from = static_cast<const From*>(src);
  const ReadAhead ahead(kAdd ? dst : src, count * kRead, next);
  int64_t i = 0;
  if constexpr (!kAdd) {
    i = before_line(dst, sizeof(To));
    if (i < 0 || i >= count) return convert<Dst, Src, kAdd>(dst, src, count);
    if (i > 0) convert<Dst, Src, kAdd>(dst, src, i);
  }
  i = convert_steps<Dst, Src, kAdd, kFetchStep / kRead>(to, from, i, ahead.turn / kRead, ahead.in_run);
  i = convert_steps<Dst, Src, kAdd, kFetchStep / kRead>(to, from, i, count, ahead.in_next);
  i = convert_steps<Dst, Src, kAdd, 2 * kWidth>(to, from, i, count, ahead.in_next);
  if (i < count) convert<Dst, Src, kAdd>(to + i, from + i, count - i);
#else
  static_cast<void>(next);
  convert<Dst, Src, kAdd>(dst, src, count);
#endif
}

#ifdef MIMO_EXT_AVX
template <int64_t kStep>
MIMO_EXT_INLINE int64_t stream_steps(unsigned char* to, const unsigned char* from, int64_t i, int64_t end,
                                     uintptr_t ahead) {
  constexpr int64_t kVector = 32;
  for (; i + kStep <= end; i += kStep) {
    fetch_once<kStep>(ahead + static_cast<uintptr_t>(i));
#pragma GCC unroll 8
    for (int64_t part = i; part < i + kStep; part += kVector) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + part),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + part)));
    }
  }
  return i;
}
#endif

MIMO_EXT_TARGET void stream(void* dst, const void* src, int64_t bytes, const void* next) {
#ifdef MIMO_EXT_AVX
  auto* to = static_cast<unsigned char*>(dst);
  const auto* from = static_cast<const unsigned char*>(src);
  const ReadAhead ahead(src, bytes, next);
  int64_t i = std::min(bytes, before_line(to, 1));
  std::memcpy(to, from, static_cast<size_t>(i));
  i = stream_steps<kFetchStep>(to, from, i, ahead.turn, ahead.in_run);
  i = stream_steps<kFetchStep>(to, from, i, bytes, ahead.in_next);
  i = stream_steps<kLine>(to, from, i, bytes, ahead.in_next);
  std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
#else
  static_cast<void>(next);
  std::memcpy(dst, src, static_cast<size_t>(bytes));
#endif
}

MIMO_EXT_TARGET void finish_streams() {
#ifdef MIMO_EXT_AVX
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace mimo_ext::ops::cpu
