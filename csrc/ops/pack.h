#pragma once

// Adapters between tensors of any strides and the flat buffers that travel between ranks.
//
// A box is a rectangular range of an n-D tensor: start[n] and size[n]. Every function takes k boxes as two flat lists
// of k * n numbers. A buffer is 1-D and holds the elements of the boxes one box after another, each in row-major order.
//
// The functions run on the device of their tensors, through the dispatcher and below autograd: they neither record
// gradients nor count tensor versions (Python gets both, see bindings/ops.cpp and mimo_ext/ops.py).
//
// Thread safety: no state; safe from any thread, with or without the GIL, on distinct outputs.
//
// The two sides may have different dtypes of `can_convert`: elements are converted on the way, without a pass of their
// own.
//
// Errors: ValueError for boxes outside the tensor and wrong lengths, TypeError for dtypes, NotImplementedError for a
// device without a kernel. Each message names what was expected and what came.

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <optional>

namespace mimo_ext::ops {

/// A new buffer with the boxes of `x`, in the dtype of `x` or another. Boxes may overlap; `x` may be expanded.
at::Tensor pack(const at::Tensor& x, at::IntArrayRef starts, at::IntArrayRef sizes,
                std::optional<at::ScalarType> dtype = std::nullopt);

/// Writes the boxes of `x` into `buffer`: 1-D, contiguous, on the device of `x`, exactly as long as the boxes.
void pack_into(const at::Tensor& buffer, const at::Tensor& x, at::IntArrayRef starts, at::IntArrayRef sizes);

/// Writes the pieces of `buffer` into the boxes of `out`, or adds them (boxes that overlap then sum, in their order).
/// `out` may have any strides that keep its elements apart. Adding needs a dtype of `can_accumulate`; a sum is formed
/// in the dtype of `out`, or in float32 if that is narrower, and rounded once.
void unpack_(const at::Tensor& out, const at::Tensor& buffer, at::IntArrayRef starts, at::IntArrayRef sizes,
             bool accumulate);

/// Zeros of `shape` with the pieces of `buffer` added into the boxes, in the dtype of `buffer` or another: the adjoint
/// of `pack`.
at::Tensor unpack(const at::Tensor& buffer, at::IntArrayRef shape, at::IntArrayRef starts, at::IntArrayRef sizes,
                  std::optional<at::ScalarType> dtype = std::nullopt);

// For the kernels of a device.

/// Whether elements of `dtype` can be added: integers, floating point (float8_e8m0fnu and float4 have no sums) and
/// complex, not bool.
bool can_accumulate(at::ScalarType dtype);

/// Whether elements of one dtype can become elements of the other: equal ones, and any two of float32, float64,
/// bfloat16 and float16.
bool can_convert(at::ScalarType from, at::ScalarType to);

/// Number of elements in the boxes, after checking that each lies in a tensor of `shape`. `op` begins the messages.
int64_t check_boxes(const char* op, at::IntArrayRef shape, at::IntArrayRef starts, at::IntArrayRef sizes);

/// All checks of `pack_into`.
void check_pack_into(const at::Tensor& buffer, const at::Tensor& x, at::IntArrayRef starts, at::IntArrayRef sizes);

/// All checks of `unpack_`.
void check_unpack_(const at::Tensor& out, const at::Tensor& buffer, at::IntArrayRef starts, at::IntArrayRef sizes,
                   bool accumulate);

}  // namespace mimo_ext::ops
