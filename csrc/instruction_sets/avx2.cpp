#define ALRO_ISA avx2
#define ALRO_LANES 8
#define ALRO_NAME "avx2"
#include "instruction_sets/kernels.inl.h"

const alro::Kernels* alro::kernels_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &avx2::table : nullptr;
}
