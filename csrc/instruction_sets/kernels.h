// What the files of one instruction set each provide (one copy of kernels.inl.h each) and what the shared
// ones (vocab/, listwise/, gather/, ..) ask of them. Plain structs and pointers only.
#pragma once

#include <cstdint>

namespace alro {

enum class DType { f32, bf16 };

struct Matrix {  // strides in elements
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
  DType dtype;
};

// Rows of `hidden` are handled in panels: one row per vector lane, 2 vectors wide (1 for a last narrow panel). All
// arrays of a panel are [lanes] or [.., lanes], aligned to 64 bytes.
struct Panel {
  const float* hidden;   // [depth, lanes]
  const float* slack;    // [lanes] 0, or a huge number on lanes that hold no row
  const float* granted;  // [lanes] logarithm of mass known from elsewhere, counted like `total` in what may be dropped
  // running statistics, relative to `highest`
  float* highest;     // [lanes] largest logit so far
  float* total;       // [lanes] sum exp(z - highest)
  float* total_rest;  // [lanes] what rounding has kept out of it
  float* dropped;     // [lanes] the part of `total` left out of `expected`
  float* cross;       // [lanes] sum exp(z - highest) (z - z_other) or (-z_other); null: not wanted
  float* cross_rest;  // [lanes]
  // weighted sums of columns, relative to `reference`
  float* reference;  // [lanes]
  float* expected;   // [H, lanes] or null
  float* mixed;      // [H, lanes] or null
  float* spread;     // [H, lanes] or null
};

// One panel, or two whose lanes hold the rows of pairs.
struct Unit {
  int vectors;  // per panel: 1 or 2
  int panels;   // 1 or 2
  Panel panel[2];
};

// A word is what a product multiplies at a time: a float, or two values of bfloat16 that are summed. The latter lie
// along H for the logits and along V for the weighted sums.
struct Tile {
  const float* weight;  // [rows, depth] words
  int64_t stride;
  const float* columns;  // [rows, H] words, or [rows / 2, H] pairs; the same memory as `weight` for floats
  int64_t columns_stride;
  int rows;
  const float* bias;  // [rows] or null
  float progress;     // share of the vocabulary seen once this tile is done
};

struct Head {
  int64_t hidden_size;
  int64_t depth;  // words in a row of W
  float scale;
  float softcap;  // 0: none
  bool entropy;
};

struct Scratch {
  float* weights[2];  // [tile rows, lanes] logits, then exp(z - highest) times the softcap's slope
  float* mixed[2];
  float* spread[2];
  int32_t* index[2];  // [tile rows] columns that are not dropped
};

// Per-lane inputs of the gradient of a trainable head; the pair arrays are null for a single panel.
struct GradLanes {
  const float* lse;
  const float* grad_lse;
  const float* cross;        // of the pair in which this panel's row is the teacher
  const float* grad_first;   // upstream gradient of that cross for this row,
  const float* grad_second;  // and for the other panel's row
};

struct AttentionKernels;
struct ListwiseArgs;
struct LayerKernels;

struct Kernels {
  const char* name;
  int lanes;       // floats per vector
  int block_rows;  // rows of W the micro-kernel takes at a time: tiles are best a multiple of it
  // Statistics and weighted column sums of one tile for one unit -> number of columns multiplied, summed over panels.
  int64_t (*vocab_tile)(const Unit&, const Tile&, const Head&, const Scratch&, float mass_bound);
  // The same for pairs of bfloat16, an even number of tile rows allotted; null: not on this processor.
  int64_t (*vocab_tile_bf16)(const Unit&, const Tile&, const Head&, const Scratch&, float mass_bound);
  // dL/dz times the softcap's slope, [tile rows, lanes] for each panel of the unit.
  void (*grad_tile)(const Unit&, const GradLanes*, const Tile&, const Head&, float* const* out);
  // out [rows, H] = sum over panels and lanes of grad [panel][rows, lanes] * rows_of [panel * lanes, padded H]
  void (*grad_product)(const float* grad, int64_t panels, int lanes, int rows, const float* hidden, int64_t padded,
                       int64_t hidden_size, float* out, int64_t out_stride, float* spare);
  void (*widen)(const uint16_t* in, float* out, int64_t n);                         // bfloat16 -> float32
  void (*interleave)(const uint16_t* a, const uint16_t* b, float* out, int64_t n);  // [n] pairs (a, b)
  float (*dot)(const float* a, const float* b, int64_t n);
  void (*axpy)(float a, const float* x, float* y, int64_t n);
  void (*listwise)(const ListwiseArgs&, int64_t begin, int64_t end, float* scratch);
  const AttentionKernels* attention;
  const LayerKernels* layers;
};

const Kernels* kernels_generic();
const Kernels* kernels_avx2();  // null where not compiled in or not supported by this processor
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();

const Kernels& active_kernels();
bool select_kernels(const char* name);  // false: no such instruction set here

}  // namespace alro
