#include "ops/cpu/vector_kernels.h"

#include "ops/cpu/vector_levels.h"

namespace mimo_ext::ops::cpu {
namespace {

std::vector<const VectorKernels*> find_usable() {
  std::vector<const VectorKernels*> usable{&baseline_kernels()};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) usable.push_back(&avx2_kernels());
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    usable.push_back(&avx512_kernels());
  }
#endif
  return usable;
}

}  // namespace

const std::vector<const VectorKernels*>& usable_vector_kernels() {
  static const std::vector<const VectorKernels*> usable = find_usable();
  return usable;
}

const VectorKernels& vector_kernels() {
  return *usable_vector_kernels().back();
}

}  // namespace mimo_ext::ops::cpu
