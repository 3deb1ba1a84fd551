// Tiles of W and panels of hidden, brought into the form the kernels read.
#pragma once

#include <cstdint>
#include <vector>

#include "vocab/vocab.h"

namespace alro {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of W in a tile: it shall stay in the second-level cache, its logits in the first.
int64_t tile_rows(const Kernels&, int64_t hidden_size, int64_t columns);

// A stride near the golden section that visits every tile: a run of tiles that holds most of the mass is met early,
// wherever it lies, and what comes after can be dropped.
int64_t visiting_stride(int64_t tiles);

// ---- float32 ----

// Whether tiles of W are read where they lie; else they need room for [rows, columns].
bool direct(const Matrix&);

// Tile of W as float32 rows, in place where it can be, else copied into `room`.
Tile open_tile(const Kernels&, const HeadArgs&, int64_t start, int64_t rows, float* room);

// rows of hidden, one per lane: [H, lanes]
void pack(const Matrix& hidden, const std::vector<int64_t>& rows, float* to);

// ---- pairs of bfloat16: along H for the logits, along V for the weighted sums ----

int64_t pair_depth(int64_t hidden_size);  // words in a row

int64_t pair_room(int64_t rows, int64_t hidden_size);  // floats a tile takes

Tile open_pairs(const Kernels&, const HeadArgs&, int64_t start, int64_t rows, float* room);

// rows of hidden, one per lane, as pairs along H: [pair_depth, lanes]
void pack_pairs(const Matrix& hidden, const std::vector<int64_t>& rows, float* to);

}  // namespace alro
