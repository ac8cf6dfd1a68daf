#pragma once

// What the rescale kernels are told: which memory, cut into which chunks. Small enough for the arguments of a kernel,
// so that a launch needs no copy to the device and can be captured in a graph. C++ standard library only.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mimo_ext::ops::cuda {

enum class Number : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

inline constexpr int kRescaleThreads = 256;
/// Elements of one thread block; a chunk has one partial sum. Part of the definition of the sum of squares.
inline constexpr int64_t kRescaleChunk = 16384;
inline constexpr int kRescaleBuffers = 128;
inline constexpr int kReduceThreads = 1024;

/// Contiguous memory.
struct RescaleBuffer {
  void* data;
  int64_t numel;
  Number dtype;
};

/// Buffers of one launch, their chunks counted one buffer after another.
struct RescaleTable {
  void* data[kRescaleBuffers];
  int64_t numel[kRescaleBuffers];
  int64_t first_chunk[kRescaleBuffers + 1];  // of each buffer, within this launch
  Number dtype[kRescaleBuffers];
  int num_buffers;
  int64_t num_chunks;      // thread blocks of this launch
  int64_t earlier_chunks;  // of the launches before this one: where its partial results begin
};

/// Launches for all buffers, in their order; empty buffers are left out.
std::vector<RescaleTable> rescale_tables(const std::vector<RescaleBuffer>& buffers);

}  // namespace mimo_ext::ops::cuda
