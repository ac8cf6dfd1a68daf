// The loops of VectorKernels. Included once by each vector_kernels_<level>.cpp, which first defines
//     MIMO_EXT_LEVEL       name of the version
//     MIMO_EXT_TARGET      attribute that lets a function use the level's instructions
//     MIMO_EXT_WIDTH       float32 numbers in a register
//     MIMO_EXT_AVX         if the level has 256-bit vectors and converts float16 with an instruction
// Everything here has internal linkage: a function compiled for one level must never be merged with another's.
//
// Vectors are those of the compiler (GCC and clang).

#include <array>

#include "ops/cpu/vector_kernels.h"
#include "ops/cpu/vector_move.h"
#include "ops/cpu/vector_scale.h"

namespace mimo_ext::ops::cpu {
namespace {

template <typename Dst, bool kAdd>
constexpr std::array<Convert, kNumNumbers> convert_to() {
  return {convert<Dst, Float32, kAdd>, convert<Dst, Float64, kAdd>, convert<Dst, BFloat16, kAdd>,
          convert<Dst, Float16, kAdd>};
}

template <typename Dst, bool kAdd>
constexpr std::array<ConvertLarge, kNumNumbers> convert_large_to() {
  return {convert_large<Dst, Float32, kAdd>, convert_large<Dst, Float64, kAdd>, convert_large<Dst, BFloat16, kAdd>,
          convert_large<Dst, Float16, kAdd>};
}

constexpr VectorKernels kKernels{
    MIMO_EXT_LEVEL,
    stream,
    finish_streams,
    {scale<Float32>, scale<Float64>, scale<BFloat16>, scale<Float16>},
    {scale_squares<Float32>, scale_squares<Float64>, scale_squares<BFloat16>, scale_squares<Float16>},
    {convert_to<Float32, false>(), convert_to<Float64, false>(), convert_to<BFloat16, false>(),
     convert_to<Float16, false>()},
    {convert_to<Float32, true>(), convert_to<Float64, true>(), convert_to<BFloat16, true>(),
     convert_to<Float16, true>()},
    {convert_large_to<Float32, false>(), convert_large_to<Float64, false>(), convert_large_to<BFloat16, false>(),
     convert_large_to<Float16, false>()},
    {convert_large_to<Float32, true>(), convert_large_to<Float64, true>(), convert_large_to<BFloat16, true>(),
     convert_large_to<Float16, true>()},
};

}  // namespace
}  // namespace mimo_ext::ops::cpu
