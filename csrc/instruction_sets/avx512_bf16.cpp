#define ALRO_ISA avx512_bf16
#define ALRO_LANES 16
#define ALRO_NAME "avx512_bf16"
#include "instruction_sets/kernels.inl.h"

const alro::Kernels* alro::kernels_avx512_bf16() {
  return kernels_avx512() && __builtin_cpu_supports("avx512bf16") ? &avx512_bf16::table : nullptr;
}
