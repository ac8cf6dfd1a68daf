#pragma once

// The kernels, as plain functions: no torch, no CUDA headers. `stream` is a cudaStream_t of the current device. Nothing
// here waits for the device. Each returns the text of the launch's error, or null.

#include <cstdint>

#include "ops/cuda/box_table.h"
#include "ops/cuda/rescale_table.h"

namespace mimo_ext::ops::cuda {

/// Scales the buffers of one table. `squares` and `inf`, on the device: a number and a flag for each chunk of all
/// tables; both null where neither is wanted.
const char* launch_rescale(const RescaleTable& table, const void* factor, bool factor_is_double, double* squares,
                           bool* inf, void* stream);

/// Results of all chunks: a sum and 0 or 1. Either may be null.
const char* launch_rescale_sum(const double* squares, const bool* inf, int64_t num_chunks, double* sumsq,
                               float* found_inf, void* stream);

/// Copies boxes to (`to_dense`) or from a dense buffer, in units of table.unit elements of `itemsize` bytes; the
/// product is 1, 2, 4, 8 or 16.
const char* launch_move(const BoxTable& table, int itemsize, void* strided, void* dense, bool to_dense, void* stream);

/// Copies with conversion between floating point types, or adds the dense buffer to the boxes; table.unit is 4 or 1.
const char* launch_convert(const BoxTable& table, Number strided_type, void* strided, Number dense_type, void* dense,
                           Direction direction, void* stream);

/// Adds integers of `itemsize` bytes (1, 2, 4 or 8) to the boxes, with wrap-around; table.unit is 1.
const char* launch_add_integers(const BoxTable& table, int itemsize, void* strided, const void* dense, void* stream);

}  // namespace mimo_ext::ops::cuda
