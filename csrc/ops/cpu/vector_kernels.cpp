#include "ops/cpu/vector_kernels.h"

#include "ops/cpu/vector_levels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mimo_ext::ops::cpu {
namespace {

#if defined(__x86_64__)
/// __builtin_cpu_supports does not know this one in clang.
bool has_f16c() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

std::vector<const VectorKernels*> find_usable() {
  std::vector<const VectorKernels*> usable{&baseline_kernels()};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
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
