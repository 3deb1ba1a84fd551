// The vocabulary pass, one tile for one unit of rows. Lanes are rows of `hidden`, so every statistic of the softmax is
// plain vertical arithmetic, W is read where it lies, and logits never leave the first-level cache.
#pragma once

#include "common/simd.h"
#include "instruction_sets/kernels.h"

namespace alro::ALRO_ISA {

// Accumulators of a micro-kernel: kBlock rows x 2 vectors, leaving registers for two loads and a broadcast.
#if defined(__AVX512F__)
constexpr int kBlock = 14;
#elif defined(__aarch64__)
constexpr int kBlock = 12;
#else
constexpr int kBlock = 6;
#endif
constexpr int64_t kDepth = 256;  // of one block of H: keeps [kDepth, lanes] of the rows in the first-level cache

// How a word of W and one of a row are multiplied and added to a float32 sum; how weights of columns become words.
struct Float32 {
  static constexpr int kColumns = 1;  // of W, in a word of the weighted sums
  static constexpr int parts(int, const Head&) { return 1; }
  ALRO_INLINE vf add(vf sum, vf a, vf x) { return sum + a * x; }
  ALRO_INLINE void put(float* at, int64_t, const vf* x, int) { store(at, x[0]); }
};
#if defined(__AVX512BF16__)
struct BFloat16 {
  static constexpr int kColumns = 2;
  // A gradient is a difference of sums: of two panels', or of `expected` and the label's column. It may be small beside
  // them, so what the rounding of weights leaves is a second word, multiplied as well; but for a single panel without a
  // softcap, where the weight of the largest logit is 1 and nothing is left of it.
  static int parts(int panels, const Head& head) { return panels == 2 || head.softcap > 0 ? 2 : 1; }
  ALRO_INLINE vf add(vf sum, vf a, vf x) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)x); }
  ALRO_INLINE vf pair(vf low, vf high) {
    const vi halves = (vi)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (vf)_mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)halves);
  }
  ALRO_INLINE void put(float* at, int64_t next, const vf* x, int parts) {
    const vf word = pair(x[0], x[1]);
    store(at, word);
    if (parts == 2) store(at + next, pair(x[0] - (vf)((vi)word << 16), x[1] - (vf)((vi)word & -65536)));
  }
};
#endif

// z [B, lanes] = (or +=) W [B, depth] * rows [depth, lanes]
template <int B, int V, class M>
static void logits_block(const float* w, int64_t stride, const float* rows, int64_t depth, bool add, float* z) {
  vf sum[B][V];
  ALRO_UNROLL for (int i = 0; i < B; ++i) ALRO_UNROLL for (int j = 0; j < V; ++j) sum[i][j] = vf{};
  for (int64_t k = 0; k < depth; ++k) {
    vf x[V];
    ALRO_UNROLL for (int j = 0; j < V; ++j) x[j] = load(rows + (k * V + j) * kLanes);
    ALRO_UNROLL for (int i = 0; i < B; ++i) {
      vf a = broadcast(w + i * stride + k);
      ALRO_UNROLL for (int j = 0; j < V; ++j) sum[i][j] = M::add(sum[i][j], a, x[j]);
    }
  }
  ALRO_UNROLL for (int i = 0; i < B; ++i) ALRO_UNROLL for (int j = 0; j < V; ++j) {
    float* at = z + (i * V + j) * kLanes;
    store(at, add ? load(at) + sum[i][j] : sum[i][j]);
  }
}

// u [B, lanes] = u * decay + sum over the listed columns v of W[v, B values] * p [v, lanes]; columns that share a word of
// W have two words of p: the second is what rounding has left of the first
template <int B, int V, class M>
static void column_sum_block(const float* w, int64_t stride, const float* p, const int32_t* index, int64_t count,
                             const vf* decay, float* u) {
  vf sum[B][V];
  ALRO_UNROLL for (int i = 0; i < B; ++i) ALRO_UNROLL for (int j = 0; j < V; ++j) sum[i][j] = vf{};
  for (int64_t k = 0; k < count; ++k) {
    const int64_t v = index[k];
    const float* row = w + v / M::kColumns * stride;
    vf x[V];
    ALRO_UNROLL for (int j = 0; j < V; ++j) x[j] = load(p + (v * V + j) * kLanes);
    ALRO_UNROLL for (int i = 0; i < B; ++i) {
      vf a = broadcast(row + i);
      ALRO_UNROLL for (int j = 0; j < V; ++j) sum[i][j] = M::add(sum[i][j], a, x[j]);
    }
  }
  // added to u last: a tile's own sum is small beside the whole and would lose its low bits to it, term by term
  ALRO_UNROLL for (int i = 0; i < B; ++i) ALRO_UNROLL for (int j = 0; j < V; ++j) {
    float* at = u + (i * V + j) * kLanes;
    store(at, load(at) * decay[j] + sum[i][j]);
  }
}

// Calls f(start, size as a constant) over [0, n) in blocks of nearly equal size, at most kBlock.
template <template <int> class F, int B = kBlock>
struct WithBlock {
  template <class... A>
  ALRO_INLINE void run(int size, A... a) {
    if (size == B) F<B>::run(a...);
    else WithBlock<F, B - 1>::run(size, a...);
  }
};
template <template <int> class F>
struct WithBlock<F, 0> {
  template <class... A>
  ALRO_INLINE void run(int, A...) {}
};
template <class F>
ALRO_INLINE void blocks(int64_t n, F f) {
  if (n <= 0) return;
  const int64_t count = (n + kBlock - 1) / kBlock, size = n / count, larger = n % count;
  for (int64_t b = 0, start = 0; b < count; ++b) {
    const int64_t here = size + (b < larger);
    f(start, int(here));
    start += here;
  }
}

template <int V, class M>
struct LogitsBlock {
  template <int B>
  struct F {
    static void run(const float* w, int64_t stride, const float* rows, int64_t depth, bool add, float* z) {
      logits_block<B, V, M>(w, stride, rows, depth, add, z);
    }
  };
};
template <int V, class M>
struct ColumnSumBlock {
  template <int B>
  struct F {
    static void run(const float* w, int64_t stride, const float* p, const int32_t* index, int64_t count,
                    const vf* decay, float* u) {
      column_sum_block<B, V, M>(w, stride, p, index, count, decay, u);
    }
  };
};

// z [tile rows, lanes] = W * rows; done(first row, number of rows) is called while these are in the nearest memory
template <int V, class M, class F>
ALRO_INLINE void tile_products(const Tile& tile, int64_t words, const float* rows, float* z, F done) {
  for (int64_t k = 0; k == 0 || k < words; k += kDepth) {
    const int64_t depth = words - k < kDepth ? words - k : kDepth;
    blocks(tile.rows, [&](int64_t v, int size) {
      WithBlock<LogitsBlock<V, M>::template F>::run(size, tile.weight + v * tile.stride + k, tile.stride,
                                                    rows + k * V * kLanes, depth, k > 0, z + v * V * kLanes);
      if (k + depth == words) done(v, size);
    });
  }
}

template <int V>
static void tile_logits(const Tile& tile, int64_t words, const float* rows, float* z) {
  tile_products<V, Float32>(tile, words, rows, z, [](int64_t, int) {});
}

template <int V, class M = Float32>
static void add_columns(const Tile& tile, int64_t hidden_size, const float* p, const int32_t* index, int64_t count,
                        const vf* decay, float* u) {
  blocks(hidden_size, [&](int64_t h, int size) {
    WithBlock<ColumnSumBlock<V, M>::template F>::run(size, tile.columns + h, tile.columns_stride, p, index, count,
                                                     decay, u + h * V * kLanes);
  });
}

// z = softcap(scale * (z + bias)) in place; largest [V] is raised to the rows' largest logit of each lane
template <int V>
ALRO_INLINE void finish_rows(const Tile& tile, const Head& head, int64_t first, int count, float* z, vf* largest) {
  const bool as_it_is = !tile.bias && head.scale == 1 && head.softcap <= 0;
  const vf scale = splat(head.scale), cap = splat(head.softcap), per_cap = splat(1.0f / head.softcap);
  for (int64_t v = first; v < first + count; ++v) {
    const vf bias = splat(tile.bias ? tile.bias[v] : 0.0f);
    ALRO_UNROLL for (int j = 0; j < V; ++j) {
      float* at = z + (v * V + j) * kLanes;
      vf x = load(at);
      if (!as_it_is) {
        x = scale * (x + bias);
        if (head.softcap > 0) x = cap * hyperbolic_tangent(x * per_cap);
        store(at, x);
      }
      largest[j] = maximum(x, largest[j]);
    }
  }
}

template <int V, class M>
static void head_logits(const Tile& tile, const Head& head, const float* rows, float* z, vf* largest) {
  tile_products<V, M>(tile, head.depth, rows, z,
                      [&](int64_t first, int count) { finish_rows<V>(tile, head, first, count, z, largest); });
}

ALRO_INLINE vf slope_of(const Head& head, vf z) {
  if (head.softcap <= 0) return splat(1.0f);
  vf share = z * splat(1.0f / head.softcap);
  return splat(1.0f) - share * share;
}

// sum = sum * decay + part, and what rounding takes from it is kept in `rest` (Kahan): the many small parts of a long
// tail would else be lost one by one
ALRO_INLINE void add_to(float* sum, float* rest, vf decay, vf part) {
  const vf before = load(sum) * decay, wanted = part + load(rest) * decay, after = before + wanted;
  store(sum, after);
  store(rest, wanted - (after - before));
}

template <int V, int P, class M>
static int64_t vocab_unit(const Unit& unit, const Tile& tile, const Head& head, const Scratch& scratch, float bound) {
  constexpr int panels = P;
  vf highest[2][V], decay[2][V], dropped[2][V], budget[2][V];
  for (int q = 0; q < panels; ++q) {
    const Panel& panel = unit.panel[q];
    ALRO_UNROLL for (int j = 0; j < V; ++j) highest[q][j] = load(panel.highest + j * kLanes);
    head_logits<V, M>(tile, head, panel.hidden, scratch.weights[q], highest[q]);
    ALRO_UNROLL for (int j = 0; j < V; ++j) {
      decay[q][j] = exponential(load(panel.highest + j * kLanes) - highest[q][j]);
      const vf total = load(panel.total + j * kLanes) * decay[q][j];
      dropped[q][j] = load(panel.dropped + j * kLanes) * decay[q][j];
      vf elsewhere = load(panel.granted + j * kLanes) - highest[q][j];
      elsewhere = exponential(elsewhere > splat(80.0f) ? splat(80.0f) : elsewhere);
      budget[q][j] = (total + elsewhere) * splat(bound * tile.progress) + load(panel.slack + j * kLanes);
    }
  }

  int count[2] = {0, 0};
  vf fresh[2][V], moment[2][V];  // this tile's part of total and cross
  for (int q = 0; q < 2; ++q) ALRO_UNROLL for (int j = 0; j < V; ++j) fresh[q][j] = moment[q][j] = vf{};
  constexpr int columns = M::kColumns;
  const int parts = M::parts(panels, head);
  for (int v = 0; v < tile.rows; v += columns) {
    vf z[2][V][columns], p[2][V][columns];
    for (int q = 0; q < panels; ++q) ALRO_UNROLL for (int j = 0; j < V; ++j)
      ALRO_UNROLL for (int c = 0; c < columns; ++c) {
        const bool there = columns == 1 || v + c < tile.rows;
        z[q][j][c] = there ? load(scratch.weights[q] + ((v + c) * V + j) * kLanes) : vf{};
        p[q][j][c] = there ? exponential(z[q][j][c] - highest[q][j]) : vf{};
        fresh[q][j] += p[q][j][c];
      }
    for (int q = 0; q < panels; ++q) {
      const Panel& panel = unit.panel[q];
      auto put = [&](float* to, int j, auto weight) {
        vf x[columns];
        ALRO_UNROLL for (int c = 0; c < columns; ++c) x[c] = weight(c);
        M::put(to + (v * V + j) * kLanes, V * kLanes, x, parts);
      };
      if (panels == 2 && panel.cross) {
        ALRO_UNROLL for (int j = 0; j < V; ++j) {
          vf tilt[columns];
          ALRO_UNROLL for (int c = 0; c < columns; ++c) {
            tilt[c] = p[q][j][c] * (head.entropy ? z[q][j][c] - z[1 - q][j][c] : -z[1 - q][j][c]);
            moment[q][j] += tilt[c];
          }
          if (panel.mixed)
            put(scratch.mixed[q], j, [&](int c) { return p[q][j][c] * slope_of(head, z[1 - q][j][c]); });
          if (panel.spread)
            put(scratch.spread[q], j, [&](int c) { return tilt[c] * slope_of(head, z[q][j][c]); });
        }
      }
      if (!panel.expected && !panel.mixed) continue;
      bool keep = false;
      vf after[V];
      ALRO_UNROLL for (int j = 0; j < V; ++j) {
        after[j] = dropped[q][j];
        ALRO_UNROLL for (int c = 0; c < columns; ++c) after[j] += p[q][j][c];
        keep |= any_above(after[j], budget[q][j]);
        put(scratch.weights[q], j, [&](int c) { return p[q][j][c] * slope_of(head, z[q][j][c]); });
      }
      if (!keep) ALRO_UNROLL for (int j = 0; j < V; ++j) dropped[q][j] = after[j];
      for (int part = 0; part < parts; ++part) scratch.index[q][count[q] + part] = v + part;
      count[q] += keep ? parts : 0;
    }
  }

  int64_t multiplied = 0;
  for (int q = 0; q < panels; ++q) {
    const Panel& panel = unit.panel[q];
    ALRO_UNROLL for (int j = 0; j < V; ++j) {
      store(panel.highest + j * kLanes, highest[q][j]);
      store(panel.dropped + j * kLanes, dropped[q][j]);
      add_to(panel.total + j * kLanes, panel.total_rest + j * kLanes, decay[q][j], fresh[q][j]);
      if (panels == 2 && panel.cross)
        add_to(panel.cross + j * kLanes, panel.cross_rest + j * kLanes, decay[q][j], moment[q][j]);
    }
    vf since[V];  // from the reference of the sums to the present highest logit
    ALRO_UNROLL for (int j = 0; j < V; ++j) since[j] = exponential(load(panel.reference + j * kLanes) - highest[q][j]);
    const bool sums = count[q] > 0 || panel.spread;
    if (!sums) continue;
    ALRO_UNROLL for (int j = 0; j < V; ++j) store(panel.reference + j * kLanes, highest[q][j]);
    const int64_t h = head.hidden_size;
    if (panel.expected) {
      add_columns<V, M>(tile, h, scratch.weights[q], scratch.index[q], count[q], since, panel.expected);
      multiplied += count[q] / parts * columns;
    }
    if (panel.mixed) {
      add_columns<V, M>(tile, h, scratch.mixed[q], scratch.index[q], count[q], since, panel.mixed);
      multiplied += count[q] / parts * columns;
    }
    if (panel.spread) {  // its terms are not bounded by p: nothing is dropped
      const int every = (tile.rows + columns - 1) / columns * columns;
      for (int v = 0; v < every; ++v) scratch.index[q][v] = v;
      add_columns<V, M>(tile, h, scratch.spread[q], scratch.index[q], every, since, panel.spread);
      multiplied += every;
    }
  }
  return multiplied;
}

template <class M>
static int64_t vocab_tile_of(const Unit& unit, const Tile& tile, const Head& head, const Scratch& scratch,
                             float bound) {
  constexpr decltype(&vocab_tile_of<M>) units[2][2] = {{vocab_unit<1, 1, M>, vocab_unit<1, 2, M>},
                                                       {vocab_unit<2, 1, M>, vocab_unit<2, 2, M>}};
  return units[unit.vectors - 1][unit.panels - 1](unit, tile, head, scratch, bound);
}
constexpr auto vocab_tile = vocab_tile_of<Float32>;
#if defined(__AVX512BF16__)
constexpr auto vocab_tile_bf16 = vocab_tile_of<BFloat16>;
#else
constexpr decltype(&vocab_tile_of<Float32>) vocab_tile_bf16 = nullptr;
#endif

// ---- gradient of a trainable head ----

template <int V>
static void grad_unit(const Unit& unit, const GradLanes* lanes, const Tile& tile, const Head& head, float* const* out) {
  for (int q = 0; q < unit.panels; ++q) {
    vf unused[V];
    ALRO_UNROLL for (int j = 0; j < V; ++j) unused[j] = splat(-1e30f);
    head_logits<V, Float32>(tile, head, unit.panel[q].hidden, out[q], unused);
  }
  for (int v = 0; v < tile.rows; ++v) ALRO_UNROLL for (int j = 0; j < V; ++j) {
    const int64_t lane = j * kLanes, at = int64_t(v) * V * kLanes + lane;
    vf z[2], p[2], grad[2];
    for (int q = 0; q < unit.panels; ++q) {
      z[q] = load(out[q] + at);
      p[q] = exponential(z[q] - load(lanes[q].lse + lane));
      grad[q] = p[q] * load(lanes[q].grad_lse + lane);
    }
    for (int q = 0; q < unit.panels; ++q) {
      if (!lanes[q].cross) continue;
      vf moment = (head.entropy ? splat(1.0f) + z[q] - z[1 - q] : -z[1 - q]) - load(lanes[q].cross + lane);
      grad[q] += load(lanes[q].grad_first + lane) * p[q] * moment;
      grad[1 - q] -= load(lanes[q].grad_second + lane) * p[q];
    }
    for (int q = 0; q < unit.panels; ++q) store(out[q] + at, grad[q] * slope_of(head, z[q]));
  }
}

static void grad_tile(const Unit& unit, const GradLanes* lanes, const Tile& tile, const Head& head, float* const* out) {
  if (unit.vectors == 2) grad_unit<2>(unit, lanes, tile, head, out);
  else grad_unit<1>(unit, lanes, tile, head, out);
}

// out [B, 2 vectors] = sum over rows n of grad [B, n] * hidden [n, 2 vectors]; grad lies in panels of `lanes` rows
template <int B>
struct GradBlock {
  static void run(const float* grad, int64_t panels, int lanes, int64_t panel_stride, const float* hidden,
                  int64_t padded, float* out, int64_t out_stride) {
    vf sum[B][2];
    ALRO_UNROLL for (int i = 0; i < B; ++i) sum[i][0] = sum[i][1] = vf{};
    for (int64_t q = 0; q < panels; ++q) {
      const float* g = grad + q * panel_stride;
      for (int n = 0; n < lanes; ++n, hidden += padded) {
        const vf x0 = load(hidden), x1 = load(hidden + kLanes);
        ALRO_UNROLL for (int i = 0; i < B; ++i) {
          vf a = splat(g[i * lanes + n]);
          sum[i][0] += a * x0;
          sum[i][1] += a * x1;
        }
      }
    }
    ALRO_UNROLL for (int i = 0; i < B; ++i) {
      store_any(out + i * out_stride, sum[i][0]);
      store_any(out + i * out_stride + kLanes, sum[i][1]);
    }
  }
};

static void grad_product(const float* grad, int64_t panels, int lanes, int rows, const float* hidden, int64_t padded,
                         int64_t hidden_size, float* out, int64_t out_stride, float* spare) {
  for (int64_t h = 0; h < hidden_size; h += 2 * kLanes) {
    const int64_t width = hidden_size - h < 2 * kLanes ? hidden_size - h : 2 * kLanes;
    const bool whole = width == 2 * kLanes;
    blocks(rows, [&](int64_t v, int size) {
      float* to = whole ? out + v * out_stride + h : spare;
      WithBlock<GradBlock>::run(size, grad + v * lanes, panels, lanes, int64_t(rows) * lanes, hidden + h, padded, to,
                                whole ? out_stride : 2 * kLanes);
      if (!whole)
        for (int i = 0; i < size; ++i)
          memcpy(out + (v + i) * out_stride + h, spare + i * 2 * kLanes, sizeof(float) * width);
    });
  }
}

// ---- small things ----

static void widen(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = uint32_t(in[i]) << 16;
    memcpy(out + i, &bits, sizeof bits);
  }
}

static void interleave(const uint16_t* a, const uint16_t* b, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = a[i] | uint32_t(b[i]) << 16;
    memcpy(out + i, &bits, sizeof bits);
  }
}

static float dot(const float* a, const float* b, int64_t n) {
  vf sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    ALRO_UNROLL for (int j = 0; j < 4; ++j) sum[j] += load_any(a + i + j * kLanes) * load_any(b + i + j * kLanes);
  for (; i + kLanes <= n; i += kLanes) sum[0] += load_any(a + i) * load_any(b + i);
  float rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

static void axpy(float a, const float* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_any(y + i, load_any(y + i) + splat(a) * load_any(x + i));
  for (; i < n; ++i) y[i] += a * x[i];
}

}  // namespace alro::ALRO_ISA
