#pragma once

// What one thread of the pack kernels does. Compiled for the device by pack.cu and convert.cu, and for the host by the
// tests, which run all threads one after another.

#include <cstdint>

#include "ops/cuda/box_table.h"
#include "ops/cuda/numbers.h"

namespace mimo_ext::ops::cuda {

MIMO_EXT_HOST_DEVICE inline int64_t divide(int64_t n, Divisor by) {
  if (by.magic == 0) return n;
#ifdef __CUDA_ARCH__
  const uint64_t high = __umul64hi(static_cast<uint64_t>(n), by.magic);
#else
  __extension__ typedef unsigned __int128 Wide;
  const auto high = static_cast<uint64_t>((static_cast<Wide>(n) * by.magic) >> 64);
#endif
  return static_cast<int64_t>(high >> by.shift);
}

/// Where unit `index` of a box lies in the tensor, in units.
MIMO_EXT_HOST_DEVICE inline int64_t offset_of_unit(const Box& box, int64_t index) {
  int64_t offset = box.offset;
  for (int d = box.num_dims - 1; d > 0; --d) {
    const int64_t rows = divide(index, box.divisor[d]);
    offset += (index - rows * box.size[d]) * box.stride[d];
    index = rows;
  }
  return offset + index * box.stride[0];
}

/// The units of one thread: up to kUnitsPerThread of one box, each kMoveThreads after the one before.
struct ThreadUnits {
  int64_t strided[kUnitsPerThread];
  int64_t dense[kUnitsPerThread];
  int count;
};

MIMO_EXT_HOST_DEVICE inline ThreadUnits units_of_thread(const BoxTable& table, int64_t block, int thread) {
  int low = 0;
  int high = table.num_boxes;  // low's box begins at or before the block, high's after it
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (table.first_block[middle] <= block ? low : high) = middle;
  }
  const Box& box = table.box[low];
  const int64_t first = (block - table.first_block[low]) * kUnitsPerBlock + thread;
  ThreadUnits units;
  units.count = 0;
  MIMO_EXT_UNROLL
  for (int k = 0; k < kUnitsPerThread; ++k) {
    const int64_t index = first + static_cast<int64_t>(k) * kMoveThreads;
    if (index < box.count) {
      units.strided[k] = offset_of_unit(box, index);
      units.dense[k] = box.first + index;
      units.count = k + 1;
    }
  }
  return units;
}

/// Moves units as bytes.
template <typename Unit>
MIMO_EXT_HOST_DEVICE inline void move_units(const BoxTable& table, Unit* strided, Unit* dense, bool to_dense,
                                            int64_t block, int thread) {
  const ThreadUnits units = units_of_thread(table, block, thread);
  Unit values[kUnitsPerThread];
  MIMO_EXT_UNROLL
  for (int k = 0; k < kUnitsPerThread; ++k) {
    if (k < units.count) values[k] = to_dense ? strided[units.strided[k]] : dense[units.dense[k]];
  }
  MIMO_EXT_UNROLL
  for (int k = 0; k < kUnitsPerThread; ++k) {
    if (k < units.count) (to_dense ? dense[units.dense[k]] : strided[units.strided[k]]) = values[k];
  }
}

/// Adds unsigned integers, of which signed ones are another reading.
template <typename Integer>
MIMO_EXT_HOST_DEVICE inline void add_integers(const BoxTable& table, Integer* strided, const Integer* dense,
                                              int64_t block, int thread) {
  const ThreadUnits units = units_of_thread(table, block, thread);
  MIMO_EXT_UNROLL
  for (int k = 0; k < kUnitsPerThread; ++k) {
    if (k >= units.count) continue;
    Integer& to = strided[units.strided[k]];
    to = static_cast<Integer>(to + dense[units.dense[k]]);
  }
}

template <typename T, typename Wide, int kCount>
MIMO_EXT_HOST_DEVICE inline void load_typed(Together<Wide, kCount>& wide, const void* data, int64_t unit) {
  const auto stored = static_cast<const Together<T, kCount>*>(data)[unit];
  for (int i = 0; i < kCount; ++i) wide.each[i] = static_cast<Wide>(load_number(stored.each[i]));
}

template <typename T, typename Wide, int kCount>
MIMO_EXT_HOST_DEVICE inline void store_typed(void* data, int64_t unit, const Together<Wide, kCount>& wide) {
  Together<T, kCount> stored;
  for (int i = 0; i < kCount; ++i) {
    store_number(stored.each[i], static_cast<typename Arithmetic<T>::type>(wide.each[i]));
  }
  static_cast<Together<T, kCount>*>(data)[unit] = stored;
}

/// kCount numbers of `type` at position `unit` of `data`.
template <typename Wide, int kCount>
MIMO_EXT_HOST_DEVICE inline Together<Wide, kCount> load_unit(const void* data, Number type, int64_t unit) {
  Together<Wide, kCount> wide{};
  switch (type) {
    case Number::kFloat32:
      load_typed<float>(wide, data, unit);
      break;
    case Number::kFloat64:
      load_typed<double>(wide, data, unit);
      break;
    case Number::kBFloat16:
      load_typed<BFloat16>(wide, data, unit);
      break;
    case Number::kFloat16:
      load_typed<Float16>(wide, data, unit);
      break;
  }
  return wide;
}

template <typename Wide, int kCount>
MIMO_EXT_HOST_DEVICE inline void store_unit(void* data, Number type, int64_t unit, const Together<Wide, kCount>& wide) {
  switch (type) {
    case Number::kFloat32:
      return store_typed<float>(data, unit, wide);
    case Number::kFloat64:
      return store_typed<double>(data, unit, wide);
    case Number::kBFloat16:
      return store_typed<BFloat16>(data, unit, wide);
    case Number::kFloat16:
      return store_typed<Float16>(data, unit, wide);
  }
}

/// One side of a conversion.
struct Numbers {
  void* data;
  Number type;
};

/// Converts units of kCount numbers, or adds them. Wide: the arithmetic, that of the type written (float32, or float64
/// for float64); what is read is rounded to it first.
template <typename Wide, int kCount>
MIMO_EXT_HOST_DEVICE inline void convert_units(const BoxTable& table, Numbers strided, Numbers dense,
                                               Direction direction, int64_t block, int thread) {
  const ThreadUnits units = units_of_thread(table, block, thread);
  const bool to_dense = direction == Direction::kToDense;
  Together<Wide, kCount> values[kUnitsPerThread];
  MIMO_EXT_UNROLL
  for (int k = 0; k < kUnitsPerThread; ++k) {
    if (k >= units.count) continue;
    values[k] = to_dense ? load_unit<Wide, kCount>(strided.data, strided.type, units.strided[k])
                         : load_unit<Wide, kCount>(dense.data, dense.type, units.dense[k]);
    if (direction == Direction::kAddToBoxes) {
      const auto before = load_unit<Wide, kCount>(strided.data, strided.type, units.strided[k]);
      for (int i = 0; i < kCount; ++i) values[k].each[i] = before.each[i] + values[k].each[i];
    }
  }
  MIMO_EXT_UNROLL
  for (int k = 0; k < kUnitsPerThread; ++k) {
    if (k >= units.count) continue;
    if (to_dense) {
      store_unit(dense.data, dense.type, units.dense[k], values[k]);
    } else {
      store_unit(strided.data, strided.type, units.strided[k], values[k]);
    }
  }
}

}  // namespace mimo_ext::ops::cuda
