#pragma once

// What one thread of the rescale kernels does. Compiled for the device by rescale.cu, and for the host by the tests,
// which run all threads one after another.

#include <cstdint>

#include "ops/cuda/numbers.h"
#include "ops/cuda/rescale_table.h"

namespace mimo_ext::ops::cuda {

/// What a thread, a chunk or everything adds to the results.
struct Found {
  double squares = 0;
  bool inf = false;
};

/// The factor as the kernels find it: a number on the device.
struct Factor {
  const void* value;
  bool is_double;
};

template <typename Wide>
MIMO_EXT_HOST_DEVICE inline Wide read_factor(Factor factor) {
  return factor.is_double ? static_cast<Wide>(*static_cast<const double*>(factor.value))
                          : static_cast<Wide>(*static_cast<const float*>(factor.value));
}

/// Position in the table of the buffer that chunk `chunk` of the launch belongs to.
MIMO_EXT_HOST_DEVICE inline int buffer_of_chunk(const RescaleTable& table, int64_t chunk) {
  int low = 0;
  int high = table.num_buffers;  // low's buffer begins at or before the chunk, high's after it
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (table.first_chunk[middle] <= chunk ? low : high) = middle;
  }
  return low;
}

/// Scales one number in place, and adds to what was found. Two running sums, by `parity`.
template <typename T, bool kLook, typename Wide>
MIMO_EXT_HOST_DEVICE inline void scale_number(T& number, Wide factor, double (&squares)[2], int parity, bool& inf) {
  store_number(number, load_number(number) * factor);
  if constexpr (kLook) {
    const Wide scaled = load_number(number);
    squares[parity] += static_cast<double>(scaled) * static_cast<double>(scaled);
    inf = inf || !is_finite(scaled);
  }
}

/// One thread's part of a chunk of `count` numbers at `data`: vectors of 16 bytes, each kRescaleThreads vectors after
/// the one before, whatever the alignment: the sum does not depend on where memory begins.
template <typename T, bool kLook>
MIMO_EXT_HOST_DEVICE inline Found scale_numbers(T* data, int64_t count, Factor factor, int thread) {
  using Wide = typename Arithmetic<T>::type;
  constexpr int kVector = static_cast<int>(16 / sizeof(T));
  constexpr int kBatch = 4;  // vectors on the way at a time
  constexpr int64_t kStep = static_cast<int64_t>(kRescaleThreads) * kVector;
  using Vector = Together<T, kVector>;
  const Wide wide_factor = read_factor<Wide>(factor);
  double squares[2] = {};
  Found found;
  int64_t first = static_cast<int64_t>(thread) * kVector;
  if (is_aligned(data, alignof(Vector))) {
    for (; first + (kBatch - 1) * kStep + kVector <= count; first += kBatch * kStep) {
      Vector batch[kBatch];
      MIMO_EXT_UNROLL
      for (int b = 0; b < kBatch; ++b) batch[b] = *reinterpret_cast<const Vector*>(data + first + b * kStep);
      MIMO_EXT_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        MIMO_EXT_UNROLL
        for (int i = 0; i < kVector; ++i) {
          scale_number<T, kLook>(batch[b].each[i], wide_factor, squares, i % 2, found.inf);
        }
        *reinterpret_cast<Vector*>(data + first + b * kStep) = batch[b];
      }
    }
  }
  for (; first < count; first += kStep) {
    const auto rest = static_cast<int>(count - first < kVector ? count - first : kVector);
    for (int i = 0; i < rest; ++i) {
      scale_number<T, kLook>(data[first + i], wide_factor, squares, i % 2, found.inf);
    }
  }
  found.squares = squares[0] + squares[1];
  return found;
}

/// One thread's part of chunk `chunk` of the launch. kLook: also sums squares and looks for infinities and NaNs.
template <bool kLook>
MIMO_EXT_HOST_DEVICE inline Found scale_chunk(const RescaleTable& table, int64_t chunk, Factor factor, int thread) {
  const int buffer = buffer_of_chunk(table, chunk);
  const int64_t begin = (chunk - table.first_chunk[buffer]) * kRescaleChunk;
  const int64_t left = table.numel[buffer] - begin;
  const int64_t count = left < kRescaleChunk ? left : kRescaleChunk;
  void* data = table.data[buffer];
  switch (table.dtype[buffer]) {
    case Number::kFloat32:
      return scale_numbers<float, kLook>(static_cast<float*>(data) + begin, count, factor, thread);
    case Number::kFloat64:
      return scale_numbers<double, kLook>(static_cast<double*>(data) + begin, count, factor, thread);
    case Number::kBFloat16:
      return scale_numbers<BFloat16, kLook>(static_cast<BFloat16*>(data) + begin, count, factor, thread);
    case Number::kFloat16:
      return scale_numbers<Float16, kLook>(static_cast<Float16*>(data) + begin, count, factor, thread);
  }
  return {};
}

/// One thread's part of the chunks' results.
MIMO_EXT_HOST_DEVICE inline Found sum_chunks(const double* squares, const bool* inf, int64_t num_chunks, int thread) {
  Found found;
  for (int64_t chunk = thread; chunk < num_chunks; chunk += kReduceThreads) {
    found.squares += squares[chunk];
    found.inf = found.inf || inf[chunk];
  }
  return found;
}

/// One step of a sum over the threads of a block, a power of two: every thread below `width` adds its partner's part.
/// All threads have to reach the end of a step before the next, which halves `width`, down to 1.
MIMO_EXT_HOST_DEVICE inline void add_partner(double* parts, int thread, int width) {
  if (thread < width) parts[thread] += parts[thread + width];
}

}  // namespace mimo_ext::ops::cuda
