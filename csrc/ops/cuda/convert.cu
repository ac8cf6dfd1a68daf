// Boxes to and from a dense buffer of another floating point type, and sums.

#include <cuda_runtime_api.h>

#include "ops/cuda/launch.h"
#include "ops/cuda/pack_thread.h"

namespace mimo_ext::ops::cuda {
namespace {

template <typename Wide, int kCount>
__global__ void __launch_bounds__(kMoveThreads)
    convert_kernel(const __grid_constant__ BoxTable table, Numbers strided, Numbers dense, Direction direction) {
  convert_units<Wide, kCount>(table, strided, dense, direction, blockIdx.x, static_cast<int>(threadIdx.x));
}

template <typename Wide, int kCount>
const char* convert(const BoxTable& table, Numbers strided, Numbers dense, Direction direction, void* stream) {
  const auto blocks = static_cast<unsigned>(table.first_block[table.num_boxes]);
  convert_kernel<Wide, kCount>
      <<<blocks, kMoveThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, strided, dense, direction);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_convert(const BoxTable& table, Number strided_type, void* strided, Number dense_type, void* dense,
                           Direction direction, void* stream) {
  const Numbers boxes{strided, strided_type};
  const Numbers buffer{dense, dense_type};
  const Number written = direction == Direction::kToDense ? dense_type : strided_type;
  if (written == Number::kFloat64) {
    return table.unit == 4 ? convert<double, 4>(table, boxes, buffer, direction, stream)
                           : convert<double, 1>(table, boxes, buffer, direction, stream);
  }
  return table.unit == 4 ? convert<float, 4>(table, boxes, buffer, direction, stream)
                         : convert<float, 1>(table, boxes, buffer, direction, stream);
}

}  // namespace mimo_ext::ops::cuda
