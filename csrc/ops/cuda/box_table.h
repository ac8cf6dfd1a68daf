#pragma once

// What the pack kernels are told: boxes of a strided tensor, cut into units that a thread moves at once. Small enough
// for the arguments of a kernel. C++ standard library only.

#include <cstdint>
#include <vector>

namespace mimo_ext::ops::cuda {

inline constexpr int kBoxDims = 4;
inline constexpr int kBoxes = 20;
inline constexpr int kMoveThreads = 256;
inline constexpr int kUnitsPerThread = 4;
inline constexpr int64_t kUnitsPerBlock = static_cast<int64_t>(kMoveThreads) * kUnitsPerThread;

/// What happens between the boxes and the dense buffer.
enum class Direction : uint8_t { kToDense, kToBoxes, kAddToBoxes };

/// Division of numbers below 2^63 by a constant of 1 or more: a multiplication and a shift.
struct Divisor {
  uint64_t magic = 0;  // 0: the constant is 1
  int shift = 0;
};

Divisor divisor_of(int64_t constant);

/// A box with at most kBoxDims dimensions, the innermost last. Everything counts units.
struct Box {
  int64_t size[kBoxDims];
  int64_t stride[kBoxDims];
  Divisor divisor[kBoxDims];  // by size
  int64_t offset;             // of the first unit, in the tensor
  int64_t first;              // of the first unit, in the dense buffer
  int64_t count;
  int num_dims;
};

/// Boxes of one launch.
struct BoxTable {
  Box box[kBoxes];
  int32_t first_block[kBoxes + 1];  // thread blocks of each box
  int num_boxes;
  int unit;  // elements
};

/// The two sides of a copy.
struct Sides {
  const int64_t* strides;  // of the tensor, in elements
  int num_dims;
  int64_t strided_itemsize;
  uintptr_t strided_address;
  int64_t dense_itemsize;
  uintptr_t dense_address;
};

/// Launches for `num_boxes` boxes (starts and sizes: num_dims numbers for each), in their order.
///
/// unit: largest number of elements to be moved at once, a power of two; a launch has that many if all addresses,
/// strides and sizes allow it, else one. writes_boxes: boxes that share elements go to different launches, so that the
/// later one is written (or added) later.
std::vector<BoxTable> box_tables(const Sides& sides, const int64_t* starts, const int64_t* sizes, int64_t num_boxes,
                                 int unit, bool writes_boxes);

}  // namespace mimo_ext::ops::cuda
