// For every processor that the extension was compiled for.
#define MIMO_EXT_LEVEL "baseline"
#define MIMO_EXT_TARGET
#define MIMO_EXT_WIDTH 4

#include "ops/cpu/vector_kernels_impl.h"
#include "ops/cpu/vector_levels.h"

namespace mimo_ext::ops::cpu {

const VectorKernels& baseline_kernels() {
  return kKernels;
}

}  // namespace mimo_ext::ops::cpu
