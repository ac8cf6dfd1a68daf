#pragma once

// float16 and bfloat16 as bits: conversions that are the same on every processor, host or device. No torch, no CUDA
// headers.

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MIMO_EXT_HOST_DEVICE __host__ __device__
#else
#define MIMO_EXT_HOST_DEVICE
#endif

namespace mimo_ext::ops {

MIMO_EXT_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

MIMO_EXT_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

MIMO_EXT_HOST_DEVICE inline float widen(BFloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16U);
}

/// Rounds to the nearest, ties to even; any NaN becomes the quiet NaN.
MIMO_EXT_HOST_DEVICE inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return {0x7FC0};
  return {static_cast<uint16_t>((bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U)};
}

MIMO_EXT_HOST_DEVICE inline float widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000U) << 16U;
  const uint32_t rest = static_cast<uint32_t>(value.bits & 0x7FFFU) << 13U;  // exponent and mantissa in their places
  if (rest >= 0x0F800000U) return float_of(sign | (rest + 0x70000000U));     // infinity, NaN
  // The exponent's bias is 112 larger. Multiplying by 2^112 does it, for subnormal numbers too, and is exact.
  return float_of(sign | bits_of(float_of(rest) * 0x1p112F));
}

/// Rounds to the nearest, ties to even; too large becomes infinity, any NaN the quiet NaN of its sign.
MIMO_EXT_HOST_DEVICE inline Float16 to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16U) & 0x8000U;
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  uint32_t rounded;
  if (magnitude > 0x7F800000U) {
    rounded = 0x7E00U;
  } else if (magnitude >= 0x47800000U) {  // 2^16 and above
    rounded = 0x7C00U;
  } else if (magnitude < 0x38800000U) {  // below 2^-14: the sum with 0.5 has steps of 2^-24, those of subnormal numbers
    rounded = bits_of(float_of(magnitude) + 0.5F) - 0x3F000000U;
  } else {
    rounded = (magnitude - 0x38000000U + 0xFFFU + ((magnitude >> 13U) & 1U)) >> 13U;
  }
  return {static_cast<uint16_t>(sign | rounded)};
}

}  // namespace mimo_ext::ops
