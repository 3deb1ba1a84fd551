// Layers between the matrix products of a decoder: RMS norm and gated activation, forward and backward, one visit of
// memory each. Contract: alro_fast/layers.py. Sums and products are float32, storage is float32 or bfloat16.
#pragma once

#include "kernels.h"

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

struct LayerKernels {  // rows begin .. end - 1
  void (*norm)(const NormArgs&, int64_t begin, int64_t end);
  void (*norm_backward)(const NormArgs&, int64_t begin, int64_t end, float* d_weight);  // adds to d_weight, if not null
  void (*gated)(const GatedArgs&, int64_t begin, int64_t end);
  void (*gated_backward)(const GatedArgs&, int64_t begin, int64_t end);
};

void norm(const NormArgs&, int threads);
void norm_backward(const NormArgs&, int threads);
void gated(const GatedArgs&, int threads);
void gated_backward(const GatedArgs&, int threads);

}  // namespace alro
