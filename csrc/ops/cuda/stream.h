#pragma once

// The device side of torch without torch's CUDA headers: the same sources compile and link beside any build of torch.

#include <ATen/core/Tensor.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include "ops/cuda/numbers.h"

namespace mimo_ext::ops::cuda {

/// The current stream of a CUDA device, as a cudaStream_t.
inline void* current_stream(at::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

/// Raises RuntimeError for the text of a launch's error.
inline void check_launch(const char* op, const char* error) {
  TORCH_CHECK(error == nullptr, op, ": the kernel was not launched: ", error);
}

/// Whether the kernels do arithmetic in this dtype.
inline bool is_number(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

/// For dtypes of `is_number`.
inline Number number_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Number::kFloat32;
    case at::kDouble:
      return Number::kFloat64;
    case at::kBFloat16:
      return Number::kBFloat16;
    default:
      return Number::kFloat16;
  }
}

}  // namespace mimo_ext::ops::cuda
