#define ALRO_ISA avx512
#define ALRO_LANES 16
#define ALRO_NAME "avx512"
#include "instruction_sets/kernels.inl.h"

const alro::Kernels* alro::kernels_avx512() {
  const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return supported ? &avx512::table : nullptr;
}
