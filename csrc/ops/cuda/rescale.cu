// One pass over many buffers, and a second kernel that sums what the chunks have found. The sums have a fixed shape:
// the same input gives the same bits, always.

#include <cuda_runtime_api.h>

#include "ops/cuda/launch.h"
#include "ops/cuda/rescale_thread.h"

namespace mimo_ext::ops::cuda {
namespace {

/// Sum over the threads of a block; valid in thread 0.
template <int kThreads>
__device__ double sum_of_block(double part) {
  __shared__ double parts[kThreads];
  const auto thread = static_cast<int>(threadIdx.x);
  parts[thread] = part;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    add_partner(parts, thread, width);
  }
  return parts[0];
}

template <bool kLook>
__global__ void __launch_bounds__(kRescaleThreads, 4)
    rescale_kernel(const __grid_constant__ RescaleTable table, Factor factor, double* squares, bool* inf) {
  const int64_t chunk = blockIdx.x;
  const auto found = scale_chunk<kLook>(table, chunk, factor, static_cast<int>(threadIdx.x));
  if constexpr (kLook) {
    const double sum = sum_of_block<kRescaleThreads>(found.squares);
    const bool any = __syncthreads_or(found.inf) != 0;
    if (threadIdx.x == 0) {
      squares[table.earlier_chunks + chunk] = sum;
      inf[table.earlier_chunks + chunk] = any;
    }
  }
}

__global__ void __launch_bounds__(kReduceThreads)
    sum_kernel(const double* squares, const bool* inf, int64_t num_chunks, double* sumsq, float* found_inf) {
  const Found found = sum_chunks(squares, inf, num_chunks, static_cast<int>(threadIdx.x));
  const double sum = sum_of_block<kReduceThreads>(found.squares);
  const bool any = __syncthreads_or(found.inf) != 0;
  if (threadIdx.x == 0) {
    if (sumsq != nullptr) *sumsq = sum;
    if (found_inf != nullptr) *found_inf = any ? 1.0F : 0.0F;
  }
}

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_rescale(const RescaleTable& table, const void* factor, bool factor_is_double, double* squares,
                           bool* inf, void* stream) {
  const auto blocks = static_cast<unsigned>(table.num_chunks);
  const auto on = static_cast<cudaStream_t>(stream);
  const Factor given{factor, factor_is_double};
  if (squares != nullptr) {
    rescale_kernel<true><<<blocks, kRescaleThreads, 0, on>>>(table, given, squares, inf);
  } else {
    rescale_kernel<false><<<blocks, kRescaleThreads, 0, on>>>(table, given, nullptr, nullptr);
  }
  return launch_error();
}

const char* launch_rescale_sum(const double* squares, const bool* inf, int64_t num_chunks, double* sumsq,
                               float* found_inf, void* stream) {
  sum_kernel<<<1, kReduceThreads, 0, static_cast<cudaStream_t>(stream)>>>(squares, inf, num_chunks, sumsq, found_inf);
  return launch_error();
}

}  // namespace mimo_ext::ops::cuda
