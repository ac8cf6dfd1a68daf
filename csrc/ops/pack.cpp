#include "ops/pack.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <c10/util/safe_numerics.h>

#include "ops/strided.h"

namespace mimo_ext::ops {
namespace {

/// Floating point types of arithmetic.
bool is_floating(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

void check_buffer(const char* op, const at::Tensor& buffer, const at::Tensor& tensor, int64_t numel) {
  TORCH_CHECK_VALUE(buffer.dim() == 1, op, ": expected a 1-D buffer, got shape ", buffer.sizes());
  TORCH_CHECK_VALUE(buffer.numel() == numel, op, ": expected a buffer of ", numel,
                    " elements (the boxes together), got ", buffer.numel());
  TORCH_CHECK_TYPE(can_convert(buffer.scalar_type(), tensor.scalar_type()), op, ": expected a buffer of dtype ",
                   tensor.scalar_type(), " (that of the tensor)",
                   is_floating(tensor.scalar_type()) ? ", or Float, Double, BFloat16 or Half" : "", ", got ",
                   buffer.scalar_type());
  TORCH_CHECK_VALUE(buffer.device() == tensor.device(), op, ": expected a buffer on device ", tensor.device(),
                    " (that of the tensor), got ", buffer.device());
  at::assert_no_overlap(buffer, tensor);
}

}  // namespace

bool can_accumulate(at::ScalarType dtype) {
  return dtype != at::kFloat8_e8m0fnu && dtype != at::kFloat4_e2m1fn_x2 &&
         (c10::isIntegralType(dtype, /*includeBool=*/false) || c10::isFloatingType(dtype) || c10::isComplexType(dtype));
}

bool can_convert(at::ScalarType from, at::ScalarType to) {
  return from == to || (is_floating(from) && is_floating(to));
}

int64_t check_boxes(const char* op, at::IntArrayRef shape, at::IntArrayRef starts, at::IntArrayRef sizes) {
  const size_t ndim = shape.size();
  TORCH_CHECK_VALUE(ndim > 0, op, ": expected a tensor of 1 or more dimensions, got a 0-d tensor");
  TORCH_CHECK_VALUE(starts.size() == sizes.size() && starts.size() % ndim == 0, op, ": expected ", ndim,
                    " starts and sizes for each box of a ", ndim, "-D tensor, got ", starts.size(), " starts and ",
                    sizes.size(), " sizes");
  int64_t total = 0;
  for (size_t box = 0; box < starts.size(); box += ndim) {
    int64_t numel = 1;
    bool overflow = false;
    for (size_t d = 0; d < ndim; ++d) {
      const int64_t start = starts[box + d];
      const int64_t size = sizes[box + d];
      TORCH_CHECK_VALUE(start >= 0 && size >= 0 && start <= shape[d] && size <= shape[d] - start, op, ": box ",
                        box / ndim, " leaves the tensor: expected start and size within 0..", shape[d],
                        " in dimension ", d, ", got start ", start, " and size ", size, " (tensor of shape ", shape,
                        ")");
      overflow = c10::mul_overflows(numel, size, &numel) || overflow;
    }
    // Boxes of an expanded tensor can hold more elements than any memory.
    overflow = overflow || c10::add_overflows(total, numel, &total);
    TORCH_CHECK_VALUE(!overflow, op, ": expected fewer than 2^63 elements in the boxes, got more (box ", box / ndim,
                      ")");
  }
  return total;
}

void check_pack_into(const at::Tensor& buffer, const at::Tensor& x, at::IntArrayRef starts, at::IntArrayRef sizes) {
  check_buffer("pack_into", buffer, x, check_boxes("pack_into", x.sizes(), starts, sizes));
  TORCH_CHECK_VALUE(buffer.is_contiguous(), "pack_into: expected a contiguous buffer, got stride ", buffer.stride(0));
}

void check_unpack_(const at::Tensor& out, const at::Tensor& buffer, at::IntArrayRef starts, at::IntArrayRef sizes,
                   bool accumulate) {
  check_buffer("unpack_", buffer, out, check_boxes("unpack_", out.sizes(), starts, sizes));
  TORCH_CHECK_TYPE(!accumulate || can_accumulate(out.scalar_type()),
                   "unpack_: expected an integer, floating point or complex dtype to add to, got ", out.scalar_type());
  TORCH_CHECK_VALUE(!may_overlap_itself(out),
                    "unpack_: expected a tensor whose elements do not share memory, got shape ", out.sizes(),
                    " with strides ", out.strides(), " (an expanded tensor?)");
}

at::Tensor pack(const at::Tensor& x, at::IntArrayRef starts, at::IntArrayRef sizes,
                std::optional<at::ScalarType> dtype) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  at::Tensor buffer =
      at::empty({check_boxes("pack", x.sizes(), starts, sizes)}, x.options().dtype(dtype.value_or(x.scalar_type())));
  pack_into(buffer, x, starts, sizes);
  return buffer;
}

void pack_into(const at::Tensor& buffer, const at::Tensor& x, at::IntArrayRef starts, at::IntArrayRef sizes) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mimo_ext::pack_into", "").typed<decltype(pack_into)>();
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.call(buffer, x, starts, sizes);
}

void unpack_(const at::Tensor& out, const at::Tensor& buffer, at::IntArrayRef starts, at::IntArrayRef sizes,
             bool accumulate) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mimo_ext::unpack_", "").typed<decltype(unpack_)>();
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.call(out, buffer, starts, sizes, accumulate);
}

at::Tensor unpack(const at::Tensor& buffer, at::IntArrayRef shape, at::IntArrayRef starts, at::IntArrayRef sizes,
                  std::optional<at::ScalarType> dtype) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  check_boxes("unpack", shape, starts, sizes);
  at::Tensor out = at::zeros(shape, buffer.options().dtype(dtype.value_or(buffer.scalar_type())));
  unpack_(out, buffer, starts, sizes, /*accumulate=*/true);
  return out;
}

}  // namespace mimo_ext::ops
