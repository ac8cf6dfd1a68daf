#include "ops/rescale.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops/strided.h"

namespace mimo_ext::ops {
namespace {

/// Memory of one buffer: [first, last) in bytes, and its position in the list.
struct Extent {
  const std::byte* first;
  const std::byte* last;
  bool dense;
  size_t buffer;
};

/// Two buffers that share memory would be scaled twice, and by two threads at once. Found are equal first elements, and
/// any overlap of buffers without gaps; strided buffers may interleave (columns of one tensor) and are otherwise
/// trusted.
void check_apart(at::TensorList buffers) {
  std::vector<Extent> extents;
  extents.reserve(buffers.size());
  for (size_t i = 0; i < buffers.size(); ++i) {
    const at::Tensor& t = buffers[i];
    if (t.numel() == 0) continue;
    const auto* first = static_cast<const std::byte*>(t.const_data_ptr());
    const bool dense = t.is_non_overlapping_and_dense();
    extents.push_back({first, dense ? first + t.nbytes() : first + t.element_size(), dense, i});
  }
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.first < b.first; });
  for (size_t i = 1; i < extents.size(); ++i) {
    const Extent& a = extents[i - 1];
    const Extent& b = extents[i];
    TORCH_CHECK_VALUE(a.last <= b.first, "rescale_: expected buffers that do not share memory, got buffers ",
                      std::min(a.buffer, b.buffer), " and ", std::max(a.buffer, b.buffer),
                      " that do: their elements would be scaled twice");
  }
}

}  // namespace

void check_rescale_(at::TensorList buffers, const at::Tensor& factor) {
  TORCH_CHECK_VALUE(factor.dim() == 0, "rescale_: expected a 0-d factor, got shape ", factor.sizes());
  TORCH_CHECK_TYPE(factor.scalar_type() == at::kFloat || factor.scalar_type() == at::kDouble,
                   "rescale_: expected a factor of dtype Float or Double, got ", factor.scalar_type());
  for (size_t i = 0; i < buffers.size(); ++i) {
    const at::Tensor& t = buffers[i];
    const at::ScalarType dtype = t.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                     "rescale_: expected buffers of dtype Float, Double, BFloat16 or Half, got ", dtype, " (buffer ", i,
                     ")");
    TORCH_CHECK_VALUE(t.device() == factor.device(), "rescale_: expected all buffers on device ", factor.device(),
                      " (that of the factor), got ", t.device(), " (buffer ", i, ")");
    TORCH_CHECK_VALUE(!may_overlap_itself(t),
                      "rescale_: expected buffers whose elements do not share memory, got shape ", t.sizes(),
                      " with strides ", t.strides(), " (buffer ", i, ", an expanded tensor?)");
  }
  check_apart(buffers);
}

std::tuple<at::Tensor, at::Tensor> rescale_(at::TensorList buffers, const at::Tensor& factor, bool with_sumsq,
                                            bool with_found_inf) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mimo_ext::rescale_", "").typed<decltype(rescale_)>();
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(buffers, factor, with_sumsq, with_found_inf);
}

}  // namespace mimo_ext::ops
