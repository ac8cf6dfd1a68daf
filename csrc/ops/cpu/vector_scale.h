#pragma once

// A part of vector_kernels_impl.h: Scale and ScaleSquares.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ops/cpu/vector_elements.h"

namespace mimo_ext::ops::cpu {
namespace {

/// The two halves of a vector, in float64.
template <typename T>
MIMO_EXT_INLINE void widen_halves(Half<double> (&wide)[2], const Vector<T>& vector) {
#if defined(MIMO_EXT_AVX) && MIMO_EXT_WIDTH == 16
  if constexpr (std::is_same_v<T, float>) {  // one instruction for each, where GCC 12 makes five of it
    __m512 whole;
    reinterpret(whole, vector);
    const __m512d low = _mm512_maskz_cvtps_pd(0xFF, _mm512_maskz_extractf32x8_ps(0xFF, whole, 0));
    const __m512d high = _mm512_maskz_cvtps_pd(0xFF, _mm512_maskz_extractf32x8_ps(0xFF, whole, 1));
    reinterpret(wide[0], low);
    reinterpret(wide[1], high);
    return;
  }
#endif
  Half<T> halves[2];
  reinterpret(halves, vector);
  wide[0] = __builtin_convertvector(halves[0], Half<double>);
  wide[1] = __builtin_convertvector(halves[1], Half<double>);
}

/// Adds squares. Those of float32 are exact in float64, so that fusing product and sum changes nothing; those of
/// float64 are rounded, and no level may fuse them.
template <typename T>
MIMO_EXT_INLINE void add_squares(Half<double> (&squares)[2], const Vector<T>& vector) {
  Half<double> values[2];
  widen_halves<T>(values, vector);
  for (size_t h = 0; h < 2; ++h) {
    Half<double> product = values[h] * values[h];
    if constexpr (sizeof(T) == sizeof(double)) asm("" : "+m"(product));
    squares[h] += product;
  }
}

/// As scale_run, of bfloat16: each place of a vector holds an even element and, above it, an odd one, and nothing has
/// to be moved to another place. Returns how many were scaled; fewer than 2 * kLanes are left.
template <bool kSquares>
MIMO_EXT_INLINE int64_t scale_pairs(uint16_t* data, int64_t count, float factor, Lanes* lanes) {
  constexpr auto kStep = static_cast<int64_t>(2 * kLanes);
  Half<double> squares[2][kParts] = {};  // of even and of odd elements, which have lanes of their own
  double each[2][kLanes / 2];
  if constexpr (kSquares) {
    for (size_t i = 0; i < kLanes; ++i) each[i % 2][i / 2] = (*lanes)[i];
    std::memcpy(&squares, &each, sizeof squares);
  }
  int64_t done = 0;
  for (; done + kStep <= count; done += kStep) {
#ifdef MIMO_EXT_AVX
    fetch<kStep * sizeof(uint16_t)>(reinterpret_cast<uintptr_t>(data + done) + kReadOn);
#endif
#pragma GCC unroll 4
    for (size_t part = 0; part < kParts; ++part) {
      uint16_t* at = data + done + part * 2 * kWidth;
      Vector<uint32_t> pairs;
      load(pairs, at);
      const Vector<uint32_t> bits[2] = {pairs << 16U, pairs & 0xFFFF0000U};
      Vector<uint32_t> rounded[2];
      for (size_t odd = 0; odd < 2; ++odd) {
        Vector<float> wide;
        reinterpret(wide, bits[odd]);
        wide *= factor;
        round_upper(rounded[odd], wide);
        if constexpr (kSquares) {
          reinterpret(wide, rounded[odd]);
          Half<double> values[2];
          widen_halves<float>(values, wide);
          for (size_t h = 0; h < 2; ++h) squares[odd][(2 * part + h) % kParts] += values[h] * values[h];
        }
      }
      store(at, (rounded[0] >> 16U) | rounded[1]);
    }
  }
  if constexpr (kSquares) {
    std::memcpy(&each, &squares, sizeof squares);
    for (size_t i = 0; i < kLanes; ++i) (*lanes)[i] = each[i % 2][i / 2];
  }
  return done;
}

template <typename T, bool kSquares>
MIMO_EXT_INLINE void scale_run(void* data, int64_t count, double factor, Lanes* lanes) {
  constexpr auto kStep = static_cast<int64_t>(kLanes);
  auto* at = static_cast<typename T::Stored*>(data);
  const auto wide_factor = static_cast<typename T::Wide>(factor);
  if constexpr (std::is_same_v<T, BFloat16>) {
    const int64_t done = scale_pairs<kSquares>(at, count, wide_factor, lanes);
    at += done;
    count -= done;
  }
  Half<double> squares[kParts][2] = {};
  if constexpr (kSquares) std::memcpy(&squares, lanes->data(), sizeof squares);
  for (; count >= kStep; count -= kStep, at += kLanes) {
#ifdef MIMO_EXT_AVX
    fetch<kStep * sizeof(typename T::Stored)>(reinterpret_cast<uintptr_t>(at) + kReadOn);
#endif
#pragma GCC unroll 4
    for (size_t part = 0; part < kParts; ++part) {
      Vector<typename T::Wide> wide;
      T::load_wide(wide, at + part * kWidth);
      wide *= wide_factor;
      T::store_wide(at + part * kWidth, wide);
      if constexpr (kSquares) add_squares<typename T::Wide>(squares[part], wide);
    }
  }
  if constexpr (kSquares) std::memcpy(lanes->data(), &squares, sizeof squares);
  // The rest, in vectors that end in zeros; what these would add (NaN if the factor is infinite) is left out.
  for (size_t part = 0; count > 0; ++part) {
    const auto rest = std::min(static_cast<size_t>(count), kWidth);
    typename T::Stored stored[kWidth] = {};
    std::memcpy(stored, at, rest * sizeof stored[0]);
    Vector<typename T::Wide> wide;
    T::load_wide(wide, stored);
    wide *= wide_factor;
    T::store_wide(stored, wide);
    std::memcpy(at, stored, rest * sizeof stored[0]);
    if constexpr (kSquares) {
      Half<double> added[2] = {};
      add_squares<typename T::Wide>(added, wide);
      double each[kWidth];
      std::memcpy(each, &added, sizeof each);
      for (size_t i = 0; i < rest; ++i) (*lanes)[part * kWidth + i] += each[i];
    }
    at += rest;
    count -= static_cast<int64_t>(rest);
  }
}

template <typename T>
MIMO_EXT_TARGET void scale(void* data, int64_t count, double factor) {
  scale_run<T, false>(data, count, factor, nullptr);
}

template <typename T>
MIMO_EXT_TARGET void scale_squares(void* data, int64_t count, double factor, Lanes& squares) {
  scale_run<T, true>(data, count, factor, &squares);
}

}  // namespace
}  // namespace mimo_ext::ops::cpu
