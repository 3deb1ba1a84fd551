#include "vocab/tiles.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace alro {
namespace {

const char* element(const Matrix& m, int64_t row, int64_t column) {
  const int64_t size = m.dtype == DType::f32 ? 4 : 2;
  return static_cast<const char*>(m.data) + (row * m.row_stride + column * m.column_stride) * size;
}

// Values [begin, end) of a row of a bfloat16 matrix.
void copy_bits(const Matrix& m, int64_t row, int64_t begin, int64_t end, uint16_t* to) {
  if (m.column_stride == 1) {
    std::memcpy(to, element(m, row, begin), sizeof(uint16_t) * size_t(end - begin));
  } else {
    for (int64_t h = begin; h < end; ++h) std::memcpy(to + (h - begin), element(m, row, h), sizeof(uint16_t));
  }
}

float value(const Matrix& m, int64_t row, int64_t column) {
  const char* at = element(m, row, column);
  float x;
  if (m.dtype == DType::f32) {
    std::memcpy(&x, at, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, at, 2);
    const uint32_t bits = uint32_t(half) << 16;
    std::memcpy(&x, &bits, 4);
  }
  return x;
}

// An odd number of cache lines, lest the rows of a block meet in one set of the first-level cache.
int64_t pair_stride(int64_t words) { return ceil_div(words, 16) / 2 * 32 + 16; }

}  // namespace

int64_t tile_rows(const Kernels& kernels, int64_t hidden_size, int64_t columns) {
  static const int64_t cache = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return size;
#endif
    return int64_t(512) << 10;
  }();
  const int64_t fit = cache / 2 / int64_t(sizeof(float)) / std::max<int64_t>(hidden_size, 1);
  int64_t blocks = std::clamp<int64_t>(fit / kernels.block_rows, 2, 112 / kernels.block_rows);
  return std::max<int64_t>(std::min(blocks * kernels.block_rows, columns), 1);
}

int64_t visiting_stride(int64_t tiles) {
  auto divisor = [](int64_t a, int64_t b) {
    while (b) std::swap(a %= b, b);
    return a;
  };
  int64_t stride = std::max<int64_t>(int64_t(double(tiles) * 0.6180339887), 1);
  while (divisor(stride, tiles) != 1) ++stride;
  return stride;
}

bool direct(const Matrix& m) { return m.dtype == DType::f32 && (m.column_stride == 1 || m.columns == 1); }

Tile open_tile(const Kernels& kernels, const HeadArgs& args, int64_t start, int64_t rows, float* room) {
  const Matrix& w = args.weight;
  auto tile = [&](const float* weight, int64_t stride) {
    return Tile{weight, stride, weight, stride, int(rows), args.bias ? args.bias + start : nullptr, 1.0f};
  };
  if (direct(w)) return tile(reinterpret_cast<const float*>(element(w, start, 0)), w.row_stride);
  for (int64_t v = 0; v < rows; ++v) {
    float* to = room + v * w.columns;
    if (w.dtype == DType::bf16 && w.column_stride == 1) {
      kernels.widen(reinterpret_cast<const uint16_t*>(element(w, start + v, 0)), to, w.columns);
    } else {
      for (int64_t h = 0; h < w.columns; ++h) to[h] = value(w, start + v, h);
    }
  }
  return tile(room, w.columns);
}

void pack(const Matrix& hidden, const std::vector<int64_t>& rows, float* to) {
  const int64_t lanes = int64_t(rows.size());
  for (int64_t h0 = 0; h0 < hidden.columns; h0 += 16) {
    const int64_t h1 = std::min(h0 + 16, hidden.columns);
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t h = h0; h < h1; ++h) to[h * lanes + lane] = rows[lane] < 0 ? 0.0f : value(hidden, rows[lane], h);
  }
}

int64_t pair_depth(int64_t hidden_size) { return (hidden_size + 1) / 2; }

int64_t pair_room(int64_t rows, int64_t hidden_size) {
  return (rows + 1) / 2 * (2 * pair_stride(pair_depth(hidden_size)) + pair_stride(hidden_size));
}

Tile open_pairs(const Kernels& kernels, const HeadArgs& args, int64_t start, int64_t rows, float* room) {
  const Matrix& w = args.weight;
  const int64_t depth = pair_depth(w.columns), stride = pair_stride(depth), columns_stride = pair_stride(w.columns);
  float* columns = room + (rows + 1) / 2 * 2 * stride;
  auto bits = [&](int64_t v) { return reinterpret_cast<uint16_t*>(room + v * stride); };
  for (int64_t v = 0; v < rows; ++v) {
    room[v * stride + depth - 1] = 0;
    copy_bits(w, start + v, 0, w.columns, bits(v));
  }
  if (rows % 2) std::memset(bits(rows), 0, sizeof(float) * depth);
  for (int64_t v = 0; v < rows; v += 2)
    kernels.interleave(bits(v), bits(v + 1), columns + v / 2 * columns_stride, w.columns);
  return {room, stride, columns, columns_stride, int(rows), args.bias ? args.bias + start : nullptr, 1.0f};
}

void pack_pairs(const Matrix& hidden, const std::vector<int64_t>& rows, float* to) {
  const int64_t lanes = int64_t(rows.size());
  std::memset(to, 0, sizeof(float) * size_t(pair_depth(hidden.columns) * lanes));
  for (int64_t h0 = 0; h0 < hidden.columns; h0 += 32) {
    const int64_t h1 = std::min(h0 + 32, hidden.columns);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      if (rows[lane] < 0) continue;
      uint16_t bits[32] = {};
      copy_bits(hidden, rows[lane], h0, h1, bits);
      for (int64_t h = h0; h < h1; h += 2) std::memcpy(to + h / 2 * lanes + lane, bits + (h - h0), sizeof(float));
    }
  }
}

}  // namespace alro
