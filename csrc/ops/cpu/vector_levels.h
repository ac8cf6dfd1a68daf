#pragma once

// The versions, one file each; vector_kernels.cpp chooses.

#include "ops/cpu/vector_kernels.h"

namespace mimo_ext::ops::cpu {

const VectorKernels& baseline_kernels();
#if defined(__x86_64__)
const VectorKernels& avx2_kernels();
const VectorKernels& avx512_kernels();
#endif

}  // namespace mimo_ext::ops::cpu
