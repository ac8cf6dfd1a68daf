#pragma once

// Loads and stores of the kernels' threads. Compiled for the device and, in the tests, for the host.

#include <cstdint>

#include "ops/cuda/rescale_table.h"
#include "ops/narrow.h"

#ifdef __CUDA_ARCH__
#define MIMO_EXT_UNROLL _Pragma("unroll")
#else
#define MIMO_EXT_UNROLL
#endif

namespace mimo_ext::ops::cuda {

MIMO_EXT_HOST_DEVICE inline float load_number(float value) {
  return value;
}
MIMO_EXT_HOST_DEVICE inline double load_number(double value) {
  return value;
}
MIMO_EXT_HOST_DEVICE inline float load_number(BFloat16 value) {
  return widen(value);
}
MIMO_EXT_HOST_DEVICE inline float load_number(Float16 value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return widen(value);
#endif
}

MIMO_EXT_HOST_DEVICE inline void store_number(float& to, float value) {
  to = value;
}
MIMO_EXT_HOST_DEVICE inline void store_number(double& to, double value) {
  to = value;
}
MIMO_EXT_HOST_DEVICE inline void store_number(BFloat16& to, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#else
  to = to_bfloat16(value);
#endif
}
MIMO_EXT_HOST_DEVICE inline void store_number(Float16& to, float value) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#else
  to = to_float16(value);
#endif
}

/// The type of the arithmetic: float32, for float64 float64.
template <typename T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

MIMO_EXT_HOST_DEVICE inline bool is_finite(float value) {
  return (bits_of(value) & 0x7F800000U) != 0x7F800000U;
}
MIMO_EXT_HOST_DEVICE inline bool is_finite(double value) {
  return value - value == 0.0;
}

/// Numbers that are loaded and stored at once.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount > 16 ? 16 : sizeof(T) * kCount) Together {
  T each[kCount];
};

MIMO_EXT_HOST_DEVICE inline bool is_aligned(const void* address, uintptr_t alignment) {
  return reinterpret_cast<uintptr_t>(address) % alignment == 0;
}

}  // namespace mimo_ext::ops::cuda
