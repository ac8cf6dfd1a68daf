// rescale_ on CUDA tensors: nothing waits for the device, and everything can be captured in a CUDA graph.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/cuda/launch.h"
#include "ops/cuda/rescale_table.h"
#include "ops/cuda/stream.h"
#include "ops/rescale.h"

namespace mimo_ext::ops {
namespace {

std::tuple<at::Tensor, at::Tensor> rescale_cuda(at::TensorList buffers, const at::Tensor& factor, bool with_sumsq,
                                                bool with_found_inf) {
  check_rescale_(buffers, factor);
  const c10::DeviceGuard guard(factor.device());
  void* stream = cuda::current_stream(factor.device());
  std::vector<cuda::RescaleBuffer> memory;
  std::vector<std::pair<at::Tensor, at::Tensor>> with_gaps;  // a buffer, and its elements without the gaps
  for (const at::Tensor& buffer : buffers) {
    at::Tensor dense = buffer;
    if (!buffer.is_non_overlapping_and_dense()) {
      dense = buffer.contiguous();
      with_gaps.emplace_back(buffer, dense);
    }
    memory.push_back({dense.mutable_data_ptr(), dense.numel(), cuda::number_of(dense.scalar_type())});
  }
  const std::vector<cuda::RescaleTable> tables = cuda::rescale_tables(memory);
  const int64_t num_chunks = tables.empty() ? 0 : tables.back().earlier_chunks + tables.back().num_chunks;
  const bool look = (with_sumsq || with_found_inf) && num_chunks > 0;
  const at::TensorOptions options = factor.options();
  at::Tensor squares;
  at::Tensor inf;
  if (look) {
    squares = at::empty({num_chunks}, options.dtype(at::kDouble));
    inf = at::empty({num_chunks}, options.dtype(at::kBool));
  }
  for (const cuda::RescaleTable& table : tables) {
    cuda::check_launch("rescale_",
                       cuda::launch_rescale(table, factor.const_data_ptr(), factor.scalar_type() == at::kDouble,
                                            look ? squares.mutable_data_ptr<double>() : nullptr,
                                            look ? inf.mutable_data_ptr<bool>() : nullptr, stream));
  }
  for (const auto& [buffer, dense] : with_gaps) buffer.copy_(dense);
  at::Tensor sumsq =
      look && with_sumsq ? at::empty({}, options.dtype(at::kDouble)) : at::zeros({}, options.dtype(at::kDouble));
  at::Tensor found_inf =
      look && with_found_inf ? at::empty({}, options.dtype(at::kFloat)) : at::zeros({}, options.dtype(at::kFloat));
  if (look) {
    cuda::check_launch(
        "rescale_", cuda::launch_rescale_sum(squares.const_data_ptr<double>(), inf.const_data_ptr<bool>(), num_chunks,
                                             with_sumsq ? sumsq.mutable_data_ptr<double>() : nullptr,
                                             with_found_inf ? found_inf.mutable_data_ptr<float>() : nullptr, stream));
  }
  return {sumsq, found_inf};
}

}  // namespace

TORCH_LIBRARY_IMPL(mimo_ext, CUDA, m) {
  m.impl("rescale_", rescale_cuda);
}

}  // namespace mimo_ext::ops
