#pragma once

#include <c10/core/ScalarType.h>

#include <cstddef>
#include <optional>

#include "ops/cpu/vector_kernels.h"

namespace mimo_ext::ops {

/// Index of a dtype in the tables of cpu::VectorKernels, which know floating point types of arithmetic.
inline std::optional<size_t> number_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return static_cast<size_t>(cpu::Number::kFloat32);
    case at::kDouble:
      return static_cast<size_t>(cpu::Number::kFloat64);
    case at::kBFloat16:
      return static_cast<size_t>(cpu::Number::kBFloat16);
    case at::kHalf:
      return static_cast<size_t>(cpu::Number::kFloat16);
    default:
      return std::nullopt;
  }
}

}  // namespace mimo_ext::ops
