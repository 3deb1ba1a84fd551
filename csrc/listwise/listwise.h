// Soft lambda loss, permutation divergence and their gradients. Formulas: alro_fast/ops/backends/eager.py.
#pragma once

#include <cstdint>

namespace alro {

enum class Divergence { none, kl, ce, symmetric };

struct ListwiseArgs {
  int64_t lists, rows, columns, width;  // logits [lists, rows, columns]; ratings, ranks [lists, width]
  const float* logits;
  const float* ratings;
  const int64_t* ranks;
  const int64_t* sizes;
  const int64_t* twin;
  const float* values;  // [columns] grades of the `ratings` form; null: the `ranking` form
  float gamma, sigma;
  bool normalise, mask_emitted;
  Divergence divergence;
  const float* discount;  // [width + 1, at least 32] 1 / log2(1 + k); [0] is 0
  const float* delta;     // the same shape: discount[d] - discount[d + 1]; d = 0 counts as 1
  float *soft_lambda, *permutation, *expected, *d_soft_lambda, *d_student;
  float* d_teacher;  // or null
};

int64_t listwise_scratch(const ListwiseArgs&);  // floats that one thread needs
void listwise(ListwiseArgs, int threads);

}  // namespace alro
