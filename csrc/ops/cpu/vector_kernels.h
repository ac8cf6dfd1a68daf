#pragma once

// Loops over contiguous memory, in a version for each level of the processor's vector instructions. C++ standard
// library only: the versions are tested without torch (tests/cpp/test_vector_kernels.cpp).
//
// All versions give the same bits (but for the payload of NaNs): a result never depends on the machine's age.
// Pointers need no alignment beyond that of their elements.

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace mimo_ext::ops::cpu {

/// Floating point types that the loops know; the numbers index the tables below.
enum class Number : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
inline constexpr size_t kNumNumbers = 4;

/// Interleaved partial sums: element i of a run adds to part i % kLanes.
inline constexpr size_t kLanes = 16;
using Lanes = std::array<double, kLanes>;

/// Multiplies `count` elements in place: float32 and narrower types in float32, by the factor rounded to float32, and
/// rounded once.
using Scale = void (*)(void* data, int64_t count, double factor);
/// The same, and adds the squares of the results to `squares`.
using ScaleSquares = void (*)(void* data, int64_t count, double factor, Lanes& squares);
/// Writes `count` elements of one type as another: dst[i] = src[i], or dst[i] += src[i]. The arithmetic is float32,
/// with one rounding; float64 where dst has that type; a float64 src is rounded to float32 first, otherwise.
using Convert = void (*)(void* dst, const void* src, int64_t count);

/// Bytes by which large moves fetch ahead of their reads. Not a whole page: the same lines of a cache would have to
/// hold what is read now and what is read then.
inline constexpr int64_t kFetchAhead = 7 << 9;

/// Copies `bytes` bytes past the caches: faster than memcpy where more is written than they hold. What was written is
/// ordered with later stores, and so with other threads, by one call of `finish_streams`.
/// next: what is read when `src` has been, or, where `src` is shorter than kFetchAhead, as many bytes later; any
/// address, for it is not read here. Its beginning is fetched along with the end of `src`: left to itself the processor
/// begins anew at every run of a tensor, having fetched in vain what follows the last one. nullptr: `src` is one of
/// many pieces of contiguous memory, and nothing need be fetched.
using Stream = void (*)(void* dst, const void* src, int64_t bytes, const void* next);
/// Convert for more than the caches hold: it writes past them, as Stream does; a sum does not, since it has read dst.
/// next: as in Stream; of a sum, where a later call will have its dst. A sum's later calls read on after `src`.
using ConvertLarge = void (*)(void* dst, const void* src, int64_t count, const void* next);

struct VectorKernels {
  const char* level;
  Stream stream;
  void (*finish_streams)();
  std::array<Scale, kNumNumbers> scale;
  std::array<ScaleSquares, kNumNumbers> scale_squares;
  std::array<std::array<Convert, kNumNumbers>, kNumNumbers> convert;  // [dst][src]
  std::array<std::array<Convert, kNumNumbers>, kNumNumbers> add;      // [dst][src]
  std::array<std::array<ConvertLarge, kNumNumbers>, kNumNumbers> convert_large;
  std::array<std::array<ConvertLarge, kNumNumbers>, kNumNumbers> add_large;
};

/// The widest version that this processor can run.
const VectorKernels& vector_kernels();

/// All that it can run, from the plainest to the widest.
const std::vector<const VectorKernels*>& usable_vector_kernels();

}  // namespace mimo_ext::ops::cpu
