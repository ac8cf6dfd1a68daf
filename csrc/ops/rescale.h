#pragma once

// The fused gradient rescale: one pass over many buffers.

#include <ATen/core/Tensor.h>

#include <tuple>

namespace mimo_ext::ops {

/// Multiplies every buffer in place by `factor`.
///
/// buffers: float32, float64, bfloat16 or float16 tensors of any size and any strides that keep their elements apart;
/// no two may
///     share memory. float16 and bfloat16 are multiplied in float32 and rounded once.
/// factor: 0-d float32 or float64, on the device of the buffers; never read by the host on CUDA.
/// Returns (sumsq, found_inf), 0-d, on the device of `factor`, zero where not asked for:
///     sumsq, float64: sum of squares of the *scaled* values. A function of the input alone: partial sums cover fixed
///         blocks in the order of memory and are added in that order, whatever the number of threads.
///     found_inf, float32: 1 if any scaled value is infinite or NaN, else 0.
///
/// Runs on the device of its tensors, through the dispatcher and below autograd.
/// Thread safety: no state; safe from any thread on distinct buffers.
/// Errors: TypeError for dtypes, ValueError for shape, device and shared memory, NotImplementedError for a device
/// without a kernel.
std::tuple<at::Tensor, at::Tensor> rescale_(at::TensorList buffers, const at::Tensor& factor, bool with_sumsq,
                                            bool with_found_inf);

/// All checks of `rescale_`, for the kernels of a device.
void check_rescale_(at::TensorList buffers, const at::Tensor& factor);

}  // namespace mimo_ext::ops
