// x86-64 with AVX2, FMA and F16C (2013 and later).
#if defined(__x86_64__)
#include <immintrin.h>

#define MIMO_EXT_LEVEL "avx2"
#define MIMO_EXT_TARGET __attribute__((target("avx2,fma,f16c")))
#define MIMO_EXT_WIDTH 8
#define MIMO_EXT_AVX

#include "ops/cpu/vector_kernels_impl.h"
#include "ops/cpu/vector_levels.h"

namespace mimo_ext::ops::cpu {

const VectorKernels& avx2_kernels() {
  return kKernels;
}

}  // namespace mimo_ext::ops::cpu
#endif
