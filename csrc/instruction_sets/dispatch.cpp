// The widest instruction set that was compiled in and that this processor has.
#include <atomic>
#include <cstring>

#include "instruction_sets/kernels.h"

namespace alro {
namespace {

using Find = const Kernels* (*)();
constexpr Find kFinders[] = {
#ifdef ALRO_AVX512_BF16
    kernels_avx512_bf16,
#endif
#ifdef ALRO_AVX512
    kernels_avx512,
#endif
#ifdef ALRO_AVX2
    kernels_avx2,
#endif
    kernels_generic,
};

const Kernels* widest() {
  for (Find find : kFinders)
    if (const Kernels* kernels = find()) return kernels;
  return nullptr;  // not reached: generic is always there
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& active_kernels() {
  const Kernels* kernels = chosen.load();
  if (!kernels) chosen.store(kernels = widest());
  return *kernels;
}

bool select_kernels(const char* name) {
  for (Find find : kFinders) {
    const Kernels* kernels = find();
    if (kernels && !std::strcmp(kernels->name, name)) {
      chosen.store(kernels);
      return true;
    }
  }
  return false;
}

}  // namespace alro
