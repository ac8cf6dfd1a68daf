// x86-64 with the AVX-512 of servers since 2017.
#if defined(__x86_64__)
#include <immintrin.h>

#define MIMO_EXT_LEVEL "avx512"
#define MIMO_EXT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define MIMO_EXT_WIDTH 16
#define MIMO_EXT_AVX

#include "ops/cpu/vector_kernels_impl.h"
#include "ops/cpu/vector_levels.h"

namespace mimo_ext::ops::cpu {

const VectorKernels& avx512_kernels() {
  return kKernels;
}

}  // namespace mimo_ext::ops::cpu
#endif
