// One pass over the vocabulary, and the gradient of a trainable head. Notation: alro_fast/ops/backends/eager.py.
#pragma once

#include "instruction_sets/kernels.h"

namespace alro {

struct HeadArgs {
  Matrix hidden, weight;
  const float* bias;  // [V] or null
  float softcap;      // 0: none
  float scale;
  int64_t pairs;
  const int64_t *first, *second;  // [P], both -1: no pair
  bool entropy;
  int threads;
};

struct VocabOut {   // contiguous float32; null: not wanted
  float* lse;       // [N]
  float* expected;  // [N, H]
  float* cross;     // [P]
  float* mixed;     // [P, H]
  float* spread;    // [P, H]
};

struct WeightGradArgs {
  const float* lse;                               // [N]
  const float* grad_lse;                          // [N]
  const float *cross, *grad_first, *grad_second;  // [P] or null
  float* d_weight;                                // [V, H] or null
  float* d_bias;                                  // [V] or null
};

// -> multiplications of a column with a row done for weighted sums, in units of N * V.
double vocab_pass(const HeadArgs&, float mass_bound, const VocabOut&);
void weight_grad(const HeadArgs&, const WeightGradArgs&);

}  // namespace alro
