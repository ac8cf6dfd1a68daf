// pack_into and unpack_ on CUDA tensors.

#include <ATen/ops/view_as_real.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "ops/cuda/box_table.h"
#include "ops/cuda/launch.h"
#include "ops/cuda/stream.h"
#include "ops/pack.h"

namespace mimo_ext::ops {
namespace {

/// Boxes of one dimension more: all of the last one, which has two elements.
c10::SmallVector<int64_t, 16> with_last_dim(at::IntArrayRef values, size_t ndim, int64_t last) {
  c10::SmallVector<int64_t, 16> result;
  for (size_t i = 0; i < values.size(); ++i) {
    result.push_back(values[i]);
    if (i % ndim == ndim - 1) result.push_back(last);
  }
  return result;
}

/// `box_side` has the boxes, `buffer` is contiguous; both have been checked.
void copy_boxes(const char* op, const at::Tensor& box_side, const at::Tensor& buffer, at::IntArrayRef starts,
                at::IntArrayRef sizes, cuda::Direction direction) {
  if (direction == cuda::Direction::kAddToBoxes && box_side.is_complex()) {
    // Complex numbers are added by their parts.
    const auto ndim = static_cast<size_t>(box_side.dim());
    return copy_boxes(op, at::view_as_real(box_side), at::view_as_real(buffer).view(-1), with_last_dim(starts, ndim, 0),
                      with_last_dim(sizes, ndim, 2), direction);
  }
  const c10::DeviceGuard guard(box_side.device());
  void* stream = cuda::current_stream(box_side.device());
  const bool to_dense = direction == cuda::Direction::kToDense;
  const bool adds = direction == cuda::Direction::kAddToBoxes;
  const at::ScalarType dtype = box_side.scalar_type();
  const bool moves = !adds && dtype == buffer.scalar_type();
  const bool converts = !moves && cuda::is_number(dtype);
  TORCH_CHECK_NOT_IMPLEMENTED(moves || converts || c10::isIntegralType(dtype, /*includeBool=*/false), op,
                              ": adding on a CUDA device is not supported for dtype ", dtype,
                              ": expected an integer, Float, Double, BFloat16, Half or complex");
  const auto itemsize = static_cast<int64_t>(box_side.element_size());
  void* strided = to_dense ? const_cast<void*>(box_side.const_data_ptr()) : box_side.mutable_data_ptr();
  void* dense = to_dense ? buffer.mutable_data_ptr() : const_cast<void*>(buffer.const_data_ptr());
  const cuda::Sides sides{box_side.strides().data(),
                          static_cast<int>(box_side.dim()),
                          itemsize,
                          reinterpret_cast<uintptr_t>(strided),
                          static_cast<int64_t>(buffer.element_size()),
                          reinterpret_cast<uintptr_t>(dense)};
  const int unit = moves ? static_cast<int>(std::max<int64_t>(1, 16 / itemsize)) : converts ? 4 : 1;
  const auto num_boxes = static_cast<int64_t>(starts.size()) / box_side.dim();
  for (const cuda::BoxTable& table : cuda::box_tables(sides, starts.data(), sizes.data(), num_boxes, unit, !to_dense)) {
    const char* error = moves ? cuda::launch_move(table, static_cast<int>(itemsize), strided, dense, to_dense, stream)
                        : converts
                            ? cuda::launch_convert(table, cuda::number_of(dtype), strided,
                                                   cuda::number_of(buffer.scalar_type()), dense, direction, stream)
                            : cuda::launch_add_integers(table, static_cast<int>(itemsize), strided, dense, stream);
    cuda::check_launch(op, error);
  }
}

void pack_into_cuda(const at::Tensor& buffer, const at::Tensor& x, at::IntArrayRef starts, at::IntArrayRef sizes) {
  check_pack_into(buffer, x, starts, sizes);
  copy_boxes("pack_into", x, buffer, starts, sizes, cuda::Direction::kToDense);
}

void unpack_cuda(const at::Tensor& out, const at::Tensor& buffer, at::IntArrayRef starts, at::IntArrayRef sizes,
                 bool accumulate) {
  check_unpack_(out, buffer, starts, sizes, accumulate);
  // An incoming gradient may be expanded.
  copy_boxes("unpack_", out, buffer.contiguous(), starts, sizes,
             accumulate ? cuda::Direction::kAddToBoxes : cuda::Direction::kToBoxes);
}

}  // namespace

TORCH_LIBRARY_IMPL(mimo_ext, CUDA, m) {
  m.impl("pack_into", pack_into_cuda);
  m.impl("unpack_", unpack_cuda);
}

}  // namespace mimo_ext::ops
