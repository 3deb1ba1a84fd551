// Whatever the compiler targets by default: SSE2 on x86-64, NEON on AArch64.
#define ALRO_ISA generic
#define ALRO_LANES 4
#define ALRO_NAME "generic"
#include "instruction_sets/kernels.inl.h"

const alro::Kernels* alro::kernels_generic() { return &generic::table; }
