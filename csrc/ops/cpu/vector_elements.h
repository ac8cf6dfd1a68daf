#pragma once

// A part of vector_kernels_impl.h: the element types.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "ops/cpu/vector_memory.h"

namespace mimo_ext::ops::cpu {
namespace {

// An element type: how a vector is loaded as float32 (float64 for float64) and stored, rounded once; it then holds what
// was stored. Vectors go by reference: by value, their calling convention would depend on the level.

/// float or double: stored as it is.
template <typename T>
struct AsItIs {
  using Wide = T;
  using Stored = T;
  MIMO_EXT_INLINE static void load_wide(Vector<T>& wide, const T* from) { load(wide, from); }
  template <bool kPast = false>
  MIMO_EXT_INLINE static void store_wide(T* to, Vector<T>& wide) {
    store<kPast>(to, wide);
  }
};
using Float32 = AsItIs<float>;
using Float64 = AsItIs<double>;

/// Rounds to bfloat16, in the upper halves; the lower ones become zero. NaNs are chosen last: before the sums, as
/// store_pair does it, they would be waited for, and rescaling takes a seventh longer.
MIMO_EXT_INLINE void round_upper(Vector<uint32_t>& bits, const Vector<float>& wide) {
  Vector<uint32_t> number;
  reinterpret(number, wide);
  const Vector<uint32_t> quiet_nan = number - number + 0x7FC00000U;
  const Vector<uint32_t> nearest = number + 0x7FFFU + ((number >> 16U) & 1U);
  bits = (wide == wide ? nearest : quiet_nan) & 0xFFFF0000U;
}

struct BFloat16 {
  using Wide = float;
  using Stored = uint16_t;
  MIMO_EXT_INLINE static void load_wide(Vector<float>& wide, const uint16_t* from) {
    Vector<uint16_t> stored;
    load(stored, from);
    const Vector<uint32_t> bits = __builtin_convertvector(stored, Vector<uint32_t>) << 16U;
    reinterpret(wide, bits);
  }
  template <bool kPast = false>
  MIMO_EXT_INLINE static void store_wide(uint16_t* to, Vector<float>& wide) {
    Vector<uint32_t> rounded;
    round_upper(rounded, wide);
    reinterpret(wide, rounded);
    store<kPast>(to, __builtin_convertvector(rounded >> 16U, Vector<uint16_t>));
  }
#ifdef MIMO_EXT_AVX
  /// Two vectors, which keep their values. Taken apart into the upper and the lower halves of all bits, they are
  /// rounded in half as many steps.
  template <bool kPast>
  MIMO_EXT_INLINE static void store_pair(uint16_t* to, const Vector<float> (&wide)[2]) {
    Bits bits[2];
    for (size_t i = 0; i < 2; ++i) {
      Vector<uint32_t> number;
      reinterpret(number, wide[i]);
      const Vector<uint32_t> quiet_nan = number - number + 0x7FC00000U;
      const Vector<uint32_t> chosen = wide[i] == wide[i] ? number : quiet_nan;
      reinterpret(bits[i], chosen);
    }
    Bits upper;
    Bits lower;
    take_apart(upper, lower, bits);
    Pair kept;
    reinterpret(kept, upper);
    // lower + 0x7FFF + the last bit kept, halved: its first bit is what the sum carries.
    const Pair added = (kept & 1U) | 0x7FFEU;
    Bits half;
    reinterpret(half, added);
    half = average(lower, half);
    Pair carried;
    reinterpret(carried, half);
    carried = kept + (carried >> 15U);
    in_order(carried);
    store<kPast>(to, carried);
  }

 private:
  typedef uint16_t Pair __attribute__((vector_size(2 * kWidth * sizeof(uint16_t))));
#if MIMO_EXT_WIDTH == 16
  using Bits = __m512i;
  MIMO_EXT_INLINE static void take_apart(Bits& upper, Bits& lower, const Bits (&bits)[2]) {
    Pair second;
    for (size_t i = 0; i < 2 * kWidth; ++i) second[i] = static_cast<uint16_t>(2 * i);
    Bits evens;
    reinterpret(evens, second);
    second += 1U;
    Bits odds;
    reinterpret(odds, second);
    upper = _mm512_permutex2var_epi16(bits[0], odds, bits[1]);
    lower = _mm512_permutex2var_epi16(bits[0], evens, bits[1]);
  }
  MIMO_EXT_INLINE static Bits average(const Bits& a, const Bits& b) { return _mm512_avg_epu16(a, b); }
  MIMO_EXT_INLINE static void in_order(Pair&) {}
#else
  using Bits = __m256i;
  /// Within the halves of a register: of the first vector, of the second, of the first, of the second.
  MIMO_EXT_INLINE static void take_apart(Bits& upper, Bits& lower, const Bits (&bits)[2]) {
    const Bits mask = _mm256_set1_epi32(0xFFFF);
    upper = _mm256_packus_epi32(_mm256_srli_epi32(bits[0], 16), _mm256_srli_epi32(bits[1], 16));
    lower = _mm256_packus_epi32(_mm256_and_si256(bits[0], mask), _mm256_and_si256(bits[1], mask));
  }
  MIMO_EXT_INLINE static Bits average(const Bits& a, const Bits& b) { return _mm256_avg_epu16(a, b); }
  MIMO_EXT_INLINE static void in_order(Pair& pair) {
    Bits bits;
    reinterpret(bits, pair);
    bits = _mm256_permute4x64_epi64(bits, 0xD8);
    reinterpret(pair, bits);
  }
#endif
#endif
};

struct Float16 {
  using Wide = float;
  using Stored = uint16_t;
#ifdef MIMO_EXT_AVX
  // In one piece: parts that are put together in memory are not forwarded to a wider load.
#if MIMO_EXT_WIDTH == 16
  static constexpr __mmask16 kAll = 0xFFFF;  // without a mask, GCC 12 warns of its own header
  using Values = __m512;
  MIMO_EXT_INLINE static void widen(__m512& values, const __m256i& stored) {
    values = _mm512_maskz_cvtph_ps(kAll, stored);
  }
  MIMO_EXT_INLINE static void narrow(__m256i& stored, const __m512& values) {
    stored = _mm512_maskz_cvtps_ph(kAll, values, _MM_FROUND_TO_NEAREST_INT);
  }
  using Narrow = __m256i;
#else
  using Values = __m256;
  MIMO_EXT_INLINE static void widen(__m256& values, const __m128i& stored) { values = _mm256_cvtph_ps(stored); }
  MIMO_EXT_INLINE static void narrow(__m128i& stored, const __m256& values) {
    stored = _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
  }
  using Narrow = __m128i;
#endif
  MIMO_EXT_INLINE static void load_wide(Vector<float>& wide, const uint16_t* from) {
    Narrow stored;
    load(stored, from);
    Values values;
    widen(values, stored);
    reinterpret(wide, values);
  }
  template <bool kPast = false>
  MIMO_EXT_INLINE static void store_wide(uint16_t* to, Vector<float>& wide) {
    Values values;
    reinterpret(values, wide);
    Narrow stored;
    narrow(stored, values);
    store<kPast>(to, stored);
    widen(values, stored);
    reinterpret(wide, values);
  }
#else
  // As in ops/narrow.h, with both sides of each condition computed.
  MIMO_EXT_INLINE static void widen(Vector<float>& wide, const Vector<uint32_t>& stored) {
    const Vector<uint32_t> sign = (stored & 0x8000U) << 16U;
    const Vector<uint32_t> rest = (stored & 0x7FFFU) << 13U;
    Vector<float> scaled;
    reinterpret(scaled, rest);
    scaled *= 0x1p112F;
    Vector<uint32_t> finite;
    reinterpret(finite, scaled);
    const Vector<uint32_t> is_finite = reinterpret_cast<Vector<uint32_t> >(rest < 0x0F800000U);
    const Vector<uint32_t> bits = sign | (finite & is_finite) | ((rest + 0x70000000U) & ~is_finite);
    reinterpret(wide, bits);
  }
  MIMO_EXT_INLINE static void load_wide(Vector<float>& wide, const uint16_t* from) {
    Vector<uint16_t> stored;
    load(stored, from);
    widen(wide, __builtin_convertvector(stored, Vector<uint32_t>));
  }
  template <bool kPast = false>
  MIMO_EXT_INLINE static void store_wide(uint16_t* to, Vector<float>& wide) {
    Vector<uint32_t> bits;
    reinterpret(bits, wide);
    const Vector<uint32_t> sign = (bits >> 16U) & 0x8000U;
    const Vector<uint32_t> magnitude = bits & 0x7FFFFFFFU;
    Vector<float> with_half;
    reinterpret(with_half, magnitude);
    with_half += 0.5F;
    Vector<uint32_t> small;
    reinterpret(small, with_half);
    small -= 0x3F000000U;
    const Vector<uint32_t> normal = (magnitude - 0x38000000U + 0xFFFU + ((magnitude >> 13U) & 1U)) >> 13U;
    const Vector<uint32_t> is_small = reinterpret_cast<Vector<uint32_t> >(magnitude < 0x38800000U);
    const Vector<uint32_t> is_large = reinterpret_cast<Vector<uint32_t> >(magnitude >= 0x47800000U);
    const Vector<uint32_t> is_nan = reinterpret_cast<Vector<uint32_t> >(magnitude > 0x7F800000U);
    const Vector<uint32_t> rounded =
        sign | (small & is_small) | (normal & ~is_small & ~is_large) | (0x7C00U & is_large) | (0x0200U & is_nan);
    widen(wide, rounded);
    store<kPast>(to, __builtin_convertvector(rounded, Vector<uint16_t>));
  }
#endif
};

}  // namespace
}  // namespace mimo_ext::ops::cpu
