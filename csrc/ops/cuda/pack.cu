// Boxes to and from a dense buffer, as bytes: units of up to 16 bytes, consecutive threads on consecutive units.

#include <cuda_runtime_api.h>

#include "ops/cuda/launch.h"
#include "ops/cuda/pack_thread.h"

namespace mimo_ext::ops::cuda {
namespace {

template <typename Unit>
__global__ void __launch_bounds__(kMoveThreads)
    move_kernel(const __grid_constant__ BoxTable table, Unit* strided, Unit* dense, bool to_dense) {
  move_units(table, strided, dense, to_dense, blockIdx.x, static_cast<int>(threadIdx.x));
}

template <typename Integer>
__global__ void __launch_bounds__(kMoveThreads)
    add_kernel(const __grid_constant__ BoxTable table, Integer* strided, const Integer* dense) {
  add_integers(table, strided, dense, blockIdx.x, static_cast<int>(threadIdx.x));
}

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename Unit>
const char* move(const BoxTable& table, void* strided, void* dense, bool to_dense, void* stream) {
  const auto blocks = static_cast<unsigned>(table.first_block[table.num_boxes]);
  move_kernel<<<blocks, kMoveThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, static_cast<Unit*>(strided),
                                                                              static_cast<Unit*>(dense), to_dense);
  return launch_error();
}

template <typename Integer>
const char* add(const BoxTable& table, void* strided, const void* dense, void* stream) {
  const auto blocks = static_cast<unsigned>(table.first_block[table.num_boxes]);
  add_kernel<<<blocks, kMoveThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, static_cast<Integer*>(strided),
                                                                             static_cast<const Integer*>(dense));
  return launch_error();
}

}  // namespace

const char* launch_move(const BoxTable& table, int itemsize, void* strided, void* dense, bool to_dense, void* stream) {
  switch (table.unit * itemsize) {
    case 1:
      return move<uint8_t>(table, strided, dense, to_dense, stream);
    case 2:
      return move<uint16_t>(table, strided, dense, to_dense, stream);
    case 4:
      return move<uint32_t>(table, strided, dense, to_dense, stream);
    case 8:
      return move<uint64_t>(table, strided, dense, to_dense, stream);
    case 16:
      return move<Together<uint64_t, 2>>(table, strided, dense, to_dense, stream);
    default:
      return "units are of 1, 2, 4, 8 or 16 bytes";
  }
}

const char* launch_add_integers(const BoxTable& table, int itemsize, void* strided, const void* dense, void* stream) {
  switch (itemsize) {
    case 1:
      return add<uint8_t>(table, strided, dense, stream);
    case 2:
      return add<uint16_t>(table, strided, dense, stream);
    case 4:
      return add<uint32_t>(table, strided, dense, stream);
    case 8:
      return add<uint64_t>(table, strided, dense, stream);
    default:
      return "integers are of 1, 2, 4 or 8 bytes";
  }
}

}  // namespace mimo_ext::ops::cuda
