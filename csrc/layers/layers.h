// Layers between the matrix products of a decoder: RMS norm, gated activation and rotary position embedding, forward
// and backward, one visit of memory each. Sums and products are float32, storage is float32 or bfloat16. Contract:
// alro_fast/modeling/layers.py.
#pragma once

#include "instruction_sets/kernels.h"

namespace alro {

struct Rows {  // [rows, columns], columns next to each other
  void* data;
  int64_t stride;  // from row to row, in elements
};

// y = x / sqrt(mean(x^2) + eps) * (weight + offset)
struct NormArgs {
  int64_t rows, columns;
  DType dtype;
  Rows x, y;
  const void* weight;  // [columns]
  float eps, offset;
  float* scale;  // [rows] 1 / sqrt(mean(x^2) + eps): written forward, read backward
  // backward: y is read as dL/dy
  Rows d_x;
  float* d_weight;  // [columns] or null
};

enum class Activation { silu, gelu_tanh };

// y = activation(gate) * up
struct GatedArgs {
  int64_t rows, columns;
  DType dtype;
  Activation activation;
  Rows gate, up, y;
  // backward: y is read as dL/dy
  Rows d_gate, d_up;
};

// With x = [a, b] in halves of the width:  y = [a cos_a - b sin_a, b cos_b + a sin_b],  or its transpose (the gradient)
struct RotaryArgs {
  int64_t batches, heads, rows, width;  // width is even
  DType dtype;
  bool transpose;
  struct Heads {  // [batches, heads, rows, width], columns next to each other
    void* data;
    int64_t batch_stride, head_stride, row_stride;
  } x, y;
  const void *cos, *sin;  // [batches, rows, width]
  int64_t cos_batch_stride, cos_row_stride, sin_batch_stride, sin_row_stride;
};

struct LayerKernels {  // rows begin .. end - 1
  void (*norm)(const NormArgs&, int64_t begin, int64_t end);
  void (*norm_backward)(const NormArgs&, int64_t begin, int64_t end, float* d_weight);  // adds to d_weight, if not null
  void (*gated)(const GatedArgs&, int64_t begin, int64_t end);
  void (*gated_backward)(const GatedArgs&, int64_t begin, int64_t end);
  void (*rotary)(const RotaryArgs&, int64_t begin, int64_t end);  // of batches * rows
};

void norm(const NormArgs&, int threads);
void norm_backward(const NormArgs&, int threads);
void gated(const GatedArgs&, int threads);
void gated_backward(const GatedArgs&, int threads);
void rotary(const RotaryArgs&, int threads);

}  // namespace alro
