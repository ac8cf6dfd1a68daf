#pragma once

// A part of vector_kernels_impl.h: vectors, how they are loaded, fetched ahead and stored.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "ops/cpu/vector_kernels.h"

namespace mimo_ext::ops::cpu {
namespace {

constexpr size_t kWidth = MIMO_EXT_WIDTH;
constexpr size_t kParts = kLanes / kWidth;  // vectors of one step
static_assert(kLanes % kWidth == 0);

/// kWidth elements, whatever their size, and half as many.
template <typename T>
struct VectorOf {
  typedef T Whole __attribute__((vector_size(kWidth * sizeof(T))));
  typedef T Half __attribute__((vector_size(kWidth / 2 * sizeof(T))));
};
template <typename T>
using Vector = typename VectorOf<T>::Whole;
template <typename T>
using Half = typename VectorOf<T>::Half;

#define MIMO_EXT_INLINE MIMO_EXT_TARGET inline __attribute__((always_inline))

#ifdef MIMO_EXT_AVX
constexpr int64_t kLine = 64;           // of the caches
constexpr uintptr_t kReadOn = 4 << 10;  // bytes; farther ahead than the processor fetches by itself
// Bytes that large moves fetch at once, and then read. With less, or with much more, memory changes between reads and
// writes at a pace that costs up to a tenth.
constexpr int64_t kFetchStep = 256;

/// Of elements or bytes of `size` bytes, those before the first that begins a line; -1 where none does.
inline int64_t before_line(const void* data, size_t size) {
  const size_t past = reinterpret_cast<uintptr_t>(data) % kLine;
  if (past % size != 0) return -1;
  return static_cast<int64_t>((kLine - past) % kLine / size);
}

/// Lines at `at`, which may be any address, into the second level of the caches.
template <int64_t kBytes>
MIMO_EXT_INLINE void fetch(uintptr_t at) {
  for (uintptr_t part = 0; part < kBytes; part += kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(at + part), _MM_HINT_T1);
  }
}

/// Lines that are read once, into the first level of the caches, and on their way out of it into none.
template <int64_t kBytes>
MIMO_EXT_INLINE void fetch_once(uintptr_t at) {
  for (uintptr_t part = 0; part < kBytes; part += kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(at + part), _MM_HINT_NTA);
  }
}

/// Where a run of `bytes` bytes, after which `next` is read, has what is read kFetchAhead bytes after its byte i: at
/// in_run + i before the turn, at in_next + i from there on. A loop for each is faster than one that chooses. Without a
/// `next` it is byte i itself, and fetching it does nothing.
struct ReadAhead {
  ReadAhead(const void* run, int64_t bytes, const void* next)
      : turn(next == nullptr ? bytes : std::max(int64_t{0}, bytes - kFetchAhead)),
        in_run(reinterpret_cast<uintptr_t>(run) + (next == nullptr ? 0 : kFetchAhead)),
        in_next(reinterpret_cast<uintptr_t>(next) - static_cast<uintptr_t>(turn)) {}

  int64_t turn;
  uintptr_t in_run;
  uintptr_t in_next;
};
#endif

template <typename V>
MIMO_EXT_INLINE void load(V& vector, const void* from) {
  std::memcpy(&vector, from, sizeof vector);
}

/// kPast: past the caches; `to` is aligned to the vector then, or to a line.
template <bool kPast = false, typename V>
MIMO_EXT_INLINE void store(void* to, const V& vector) {
#ifdef MIMO_EXT_AVX
  if constexpr (kPast && sizeof vector == 16) {
    __m128i part;
    std::memcpy(&part, &vector, sizeof part);
    _mm_stream_si128(static_cast<__m128i*>(to), part);
    return;
#if MIMO_EXT_WIDTH == 16
  } else if constexpr (kPast && sizeof vector % kLine == 0) {
    __m512i parts[sizeof vector / kLine];
    std::memcpy(&parts, &vector, sizeof parts);
    for (size_t i = 0; i < sizeof vector / kLine; ++i) _mm512_stream_si512(static_cast<__m512i*>(to) + i, parts[i]);
    return;
#endif
  } else if constexpr (kPast) {
    __m256i parts[sizeof vector / 32];
    std::memcpy(&parts, &vector, sizeof parts);
    for (size_t i = 0; i < sizeof vector / 32; ++i) _mm256_stream_si256(static_cast<__m256i*>(to) + i, parts[i]);
    return;
  }
#endif
  std::memcpy(to, &vector, sizeof vector);
}

template <typename To, typename From>
MIMO_EXT_INLINE void reinterpret(To& to, const From& from) {
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
}

}  // namespace
}  // namespace mimo_ext::ops::cpu
