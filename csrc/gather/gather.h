// Logits of a few columns per row, and their gradients. Contract: alro_fast/ops/backends/eager.py, gather_logits.
#pragma once

#include "instruction_sets/kernels.h"

namespace alro {

struct GatherArgs {
  Matrix hidden, weight;
  const float* bias;  // [V] or null
  float softcap, scale;
  int64_t groups, slots, columns;
  const int64_t* rows;  // [groups, slots], negative: pad
  const int64_t* ids;   // [groups, columns], negative: pad
  int threads;
};

void gather_logits(const GatherArgs&, float* logits);  // [groups, slots, columns]
// Adds to d_hidden [N, H], d_weight [V, H], d_bias [V]; null: not wanted.
void gather_backward(const GatherArgs&, const float* logits, const float* grad, float* d_hidden, float* d_weight,
                     float* d_bias);

}  // namespace alro
