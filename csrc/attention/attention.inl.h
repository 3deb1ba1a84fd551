// Attention of one unit of queries and one key head. Lanes are queries (and the query heads that share the key head),
// so the softmax is vertical and the micro-kernels are those of the vocabulary pass: keys take the place of W's rows.
#pragma once

#include "attention/attention.h"
#include "common/simd.h"
#include "vocab/vocab.inl.h"

namespace alro::ALRO_ISA {

constexpr int kKeys = 112 / kBlock * kBlock;  // of a tile
constexpr float kLowest = -1e30f;             // below any score
constexpr float kHidden = -3e38f;             // score of a key that may not be seen: nothing even beside the lowest

ALRO_INLINE int64_t padded_width(int64_t width) { return (width + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }

// to [width, lanes] = factor * transposed rows; lanes without a row get 0
template <int V>
static void pack_rows(const HeadRows& from, const int64_t* query, const int64_t* head, int64_t width, float factor,
                      float* to) {
  constexpr int lanes = V * kLanes;
  for (int first = 0; first < lanes; first += kLanes)
    for (int64_t d = 0; d < width; d += kLanes) {
      vf block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = query[first + i];
        block[i] = row < 0 ? vf{} : load_some(from.at(row, head[first + i]) + d, width - d, vf{});
      }
      transpose(block);
      for (int i = 0; i < kLanes && d + i < width; ++i) store(to + (d + i) * lanes + first, splat(factor) * block[i]);
    }
}

// rows = factor [lanes] * transposed from [width, lanes]; lanes without a row are passed over
template <int V>
static void unpack_rows(const float* from, const float* factor, const int64_t* query, const int64_t* head,
                        int64_t width, const HeadRows& to) {
  constexpr int lanes = V * kLanes;
  for (int first = 0; first < lanes; first += kLanes)
    for (int64_t d = 0; d < width; d += kLanes) {
      vf block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = d + i < width ? load(from + (d + i) * lanes + first) : vf{};
      transpose(block);
      for (int i = 0; i < kLanes && query[first + i] >= 0; ++i)
        store_some(to.at(query[first + i], head[first + i]) + d, splat(factor[first + i]) * block[i], width - d);
    }
}

// to [lanes, padded] = factor * rows, zeros behind and for lanes without a row
template <int V>
static void copy_rows(const HeadRows& from, const int64_t* query, const int64_t* head, int64_t width, int64_t padded,
                      float factor, float* to) {
  for (int lane = 0; lane < V * kLanes; ++lane) {
    const float* row = query[lane] < 0 ? nullptr : from.at(query[lane], head[lane]);
    for (int64_t d = 0; d < padded; d += kLanes) {
      vf x = row && d < width ? load_some(row + d, width - d, vf{}) : vf{};
      store(to + lane * padded + d, splat(factor) * x);
    }
  }
}

// out [B keys, 2 vectors] += sum over lanes of p [B, lanes] * rows [lanes, 2 vectors]
template <int B>
struct OuterBlock {
  static void run(const float* p, int lanes, const float* rows, int64_t padded, float* out) {
    vf sum[B][2];
    ALRO_UNROLL for (int i = 0; i < B; ++i) sum[i][0] = sum[i][1] = vf{};
    for (int n = 0; n < lanes; ++n, rows += padded) {
      const vf x0 = load(rows), x1 = load(rows + kLanes);
      ALRO_UNROLL for (int i = 0; i < B; ++i) {
        vf a = splat(p[i * lanes + n]);
        sum[i][0] += a * x0;
        sum[i][1] += a * x1;
      }
    }
    ALRO_UNROLL for (int i = 0; i < B; ++i) {
      float* at = out + i * padded;
      store(at, load(at) + sum[i][0]);
      store(at + kLanes, load(at + kLanes) + sum[i][1]);
    }
  }
};

static void add_outer(const float* p, int lanes, int keys, const float* rows, int64_t padded, float* out) {
  for (int64_t d = 0; d < padded; d += 2 * kLanes)
    blocks(keys, [&](int64_t k, int size) {
      WithBlock<OuterBlock>::run(size, p + k * lanes, lanes, rows + d, padded, out + k * padded + d);
    });
}

// u [B, lanes] = u * decay + sum over the keys of a tile of rows[key, B values] * p [key, lanes]
template <int V>
struct KeySumBlock {
  template <int B>
  struct F {
    static void run(const float* rows, int64_t stride, const KeyRun* run, const KeyRun* end, const float* p,
                    const vf* decay, float* u) {
      vf sum[B][V];
      ALRO_UNROLL for (int i = 0; i < B; ++i) ALRO_UNROLL for (int j = 0; j < V; ++j) sum[i][j] = vf{};
      for (; run < end; ++run) {
        const float* row = rows + run->row * stride;
        for (int k = 0; k < run->count; ++k, row += stride, p += V * kLanes) {
          vf x[V];
          ALRO_UNROLL for (int j = 0; j < V; ++j) x[j] = load(p + j * kLanes);
          ALRO_UNROLL for (int i = 0; i < B; ++i) {
            vf a = broadcast(row + i);
            ALRO_UNROLL for (int j = 0; j < V; ++j) sum[i][j] += a * x[j];
          }
        }
      }
      ALRO_UNROLL for (int i = 0; i < B; ++i) ALRO_UNROLL for (int j = 0; j < V; ++j) {
        float* at = u + (i * V + j) * kLanes;
        store(at, load(at) * decay[j] + sum[i][j]);
      }
    }
  };
};

// The keys of a tile, where they lie.
struct Keys {
  const KeyRun *first, *last;
  int count, free_from, free_to;
  int32_t row[kKeys];

  Keys(const AttentionArgs& args, const KeyTile& tile)
      : first(args.run + tile.first_run), last(args.run + tile.last_run), count(tile.keys), free_from(tile.free_from),
        free_to(tile.free_to) {
    int32_t* to = row;
    for (const KeyRun* run = first; run < last; ++run)
      for (int32_t r = run->row; r < run->row + run->count; ++r) *to++ = r;
  }

  // z [keys, lanes] = rows of keys * packed [width, lanes]
  template <int V>
  void products(const HeadRows& from, int64_t head, int64_t width, const float* packed, float* z) const {
    for (const KeyRun* run = first; run < last; z += run->count * V * kLanes, ++run) {
      const float* at = from.at(run->row, head);
      tile_logits<V>({at, from.row_stride, at, from.row_stride, run->count, nullptr, 0}, width, packed, z);
    }
  }

  // u [width, lanes] = u * decay + sum over keys of their rows * p [keys, lanes]
  template <int V>
  void add_weighted(const HeadRows& from, int64_t head, int64_t width, const float* p, const vf* decay,
                    float* u) const {
    blocks(width, [&](int64_t d, int size) {
      WithBlock<KeySumBlock<V>::template F>::run(size, from.at(0, head) + d, from.row_stride, first, last, p, decay,
                                                 u + d * V * kLanes);
    });
  }

  // sums [keys of the unit, padded] += p [keys, lanes] * rows [lanes, padded]
  void add_products(const float* p, int lanes, const float* rows, int64_t padded, float* sums) const {
    for (const KeyRun* run = first; run < last; p += run->count * lanes, ++run)
      add_outer(p, lanes, run->count, rows, padded, sums + run->place * padded);
  }
};

// f(number of the key, whether some lanes may not see it)
template <class F>
ALRO_INLINE void each_key(const Keys& keys, F f) {
  for (int i = 0; i < keys.free_from; ++i) f(i, true);
  for (int i = keys.free_from; i < keys.free_to; ++i) f(i, false);
  for (int i = keys.free_to; i < keys.count; ++i) f(i, true);
}

// The queries in the lanes of one panel. An empty lane holds zeros, and what becomes of it is read by nobody.
template <int V>
struct Queries {
  int64_t query[V * kLanes], head[V * kLanes];  // -1: an empty lane
  vi row[V], lowest[V];                         // of the stream; the first position in the window

  Queries(const AttentionArgs& args, const QueryPanel& panel, int64_t kv_head) {
    const int64_t group = args.heads / args.kv_heads;
    for (int lane = 0; lane < V * kLanes; ++lane) {
      const int64_t at = panel.first_lane + lane;
      int32_t r = -1, first = 0;
      query[lane] = head[lane] = -1;
      if (lane < panel.lanes) {
        query[lane] = at / group;
        head[lane] = kv_head * group + at % group;
        r = args.query_row[query[lane]];
        if (args.window > 0) first = args.position[r] - args.window + 1;
      }
      row[lane / kLanes][lane % kLanes] = r;
      lowest[lane / kLanes][lane % kLanes] = first;
    }
  }
};

template <int V>
ALRO_INLINE vi sees(const AttentionArgs& args, const Queries<V>& queries, int32_t key, int j) {
  const vi k = vi{} + key, until = vi{} + args.until[key], position = vi{} + args.position[key];
  return (k <= queries.row[j]) & (queries.row[j] < until) & (position >= queries.lowest[j]);
}

template <int V>
static void cap_scores(const AttentionArgs& args, int keys, float* z) {
  const vf cap = splat(args.softcap), per_cap = splat(1.0f / args.softcap);
  for (int64_t i = 0; i < int64_t(keys) * V * kLanes; i += kLanes)
    store(z + i, cap * hyperbolic_tangent(load(z + i) * per_cap));
}

template <int V>
static void attend_panel(const AttentionArgs& args, const QueryPanel& panel, int64_t kv_head, float* scratch) {
  constexpr int lanes = V * kLanes;
  const int64_t width = args.width;
  const Queries<V> queries(args, panel, kv_head);
  float* packed = scratch;
  float* sums = packed + width * lanes;
  float* p = sums + width * lanes;
  pack_rows<V>(args.query, queries.query, queries.head, width, args.scale, packed);
  memset(sums, 0, sizeof(float) * width * lanes);
  vf highest[V], total[V];
  ALRO_UNROLL for (int j = 0; j < V; ++j) highest[j] = splat(kLowest), total[j] = vf{};

  for (int64_t t = panel.first_tile; t < panel.last_tile; ++t) {
    const Keys keys(args, args.tile[t]);
    keys.products<V>(args.key, kv_head, width, packed, p);
    if (args.softcap > 0) cap_scores<V>(args, keys.count, p);
    vf before[V], decay[V];
    ALRO_UNROLL for (int j = 0; j < V; ++j) before[j] = highest[j];
    each_key(keys, [&](int i, bool masked) __attribute__((always_inline)) {
      ALRO_UNROLL for (int j = 0; j < V; ++j) {
        float* at = p + (i * V + j) * kLanes;
        vf s = load(at);
        if (masked) store(at, s = sees(args, queries, keys.row[i], j) ? s : splat(kHidden));
        highest[j] = maximum(s, highest[j]);
      }
    });
    ALRO_UNROLL for (int j = 0; j < V; ++j) {
      decay[j] = exponential(before[j] - highest[j]);
      total[j] *= decay[j];
    }
    for (int i = 0; i < keys.count; ++i) ALRO_UNROLL for (int j = 0; j < V; ++j) {
      float* at = p + (i * V + j) * kLanes;
      const vf x = exponential(load(at) - highest[j]);
      total[j] += x;
      store(at, x);
    }
    keys.add_weighted<V>(args.value, kv_head, width, p, decay, sums);
  }

  float last[2][lanes] __attribute__((aligned(64)));
  ALRO_UNROLL for (int j = 0; j < V; ++j) {
    store(last[0] + j * kLanes, splat(1.0f) / total[j]);
    store(last[1] + j * kLanes, highest[j] + logarithm(total[j]));
  }
  unpack_rows<V>(sums, last[0], queries.query, queries.head, width, args.out);
  for (int lane = 0; lane < panel.lanes; ++lane)
    args.lse[queries.query[lane] * args.heads + queries.head[lane]] = last[1][lane];
}

// d_key, d_value [keys of the unit, padded]
template <int V>
static void attend_panel_backward(const AttentionArgs& args, const QueryPanel& panel, int64_t kv_head, float* d_key,
                                  float* d_value, float* scratch) {
  constexpr int lanes = V * kLanes;
  const int64_t width = args.width, padded = padded_width(width);
  const Queries<V> queries(args, panel, kv_head);
  float* packed_query = scratch;
  float* packed_grad = packed_query + width * lanes;
  float* d_query = packed_grad + width * lanes;
  float* query = d_query + width * lanes;  // [lanes, padded], times scale
  float* grad = query + padded * lanes;
  float* p = grad + padded * lanes;
  float* d_score = p + kKeys * lanes;
  pack_rows<V>(args.query, queries.query, queries.head, width, args.scale, packed_query);
  pack_rows<V>(args.grad, queries.query, queries.head, width, 1.0f, packed_grad);
  copy_rows<V>(args.query, queries.query, queries.head, width, padded, args.scale, query);
  copy_rows<V>(args.grad, queries.query, queries.head, width, padded, 1.0f, grad);
  memset(d_query, 0, sizeof(float) * width * lanes);
  vf lse[V], delta[V], one[V];
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t n = queries.query[lane], h = queries.head[lane];
    lse[lane / kLanes][lane % kLanes] = n < 0 ? -kLowest : args.lse[n * args.heads + h];
    delta[lane / kLanes][lane % kLanes] = n < 0 ? 0.0f : dot(args.grad.at(n, h), args.out.at(n, h), width);
  }
  ALRO_UNROLL for (int j = 0; j < V; ++j) one[j] = splat(1.0f);
  const bool capped = args.softcap > 0;
  const vf per_cap = splat(capped ? 1.0f / args.softcap : 0.0f);

  for (int64_t t = panel.first_tile; t < panel.last_tile; ++t) {
    const Keys keys(args, args.tile[t]);
    keys.products<V>(args.key, kv_head, width, packed_query, p);
    keys.products<V>(args.value, kv_head, width, packed_grad, d_score);
    if (capped) cap_scores<V>(args, keys.count, p);
    each_key(keys, [&](int i, bool masked) __attribute__((always_inline)) {
      ALRO_UNROLL for (int j = 0; j < V; ++j) {
        const int at = (i * V + j) * kLanes;
        const vf s = load(p + at);
        vf x = s - lse[j];
        if (masked) x = sees(args, queries, keys.row[i], j) ? x : splat(kHidden);
        x = exponential(x);
        store(p + at, x);
        vf d = x * (load(d_score + at) - delta[j]);
        if (capped) d *= splat(1.0f) - (s * per_cap) * (s * per_cap);
        store(d_score + at, d);
      }
    });
    keys.add_products(p, lanes, grad, padded, d_value);
    keys.add_products(d_score, lanes, query, padded, d_key);
    keys.add_weighted<V>(args.key, kv_head, width, d_score, one, d_query);
  }

  float scale[lanes];
  for (int lane = 0; lane < lanes; ++lane) scale[lane] = args.scale;
  unpack_rows<V>(d_query, scale, queries.query, queries.head, width, args.d_query);
}

static int64_t attention_scratch(int64_t width, bool backward) {
  constexpr int64_t lanes = 2 * kLanes;
  if (!backward) return 2 * width * lanes + kKeys * lanes;
  return 3 * width * lanes + 2 * padded_width(width) * lanes + 2 * kKeys * lanes;
}

static int64_t attention_sums(int64_t width, int64_t keys) { return 2 * keys * padded_width(width); }

static void attend(const AttentionArgs& args, int64_t u, int64_t kv_head, float* scratch) {
  for (int64_t at = args.unit[u].first_panel; at < args.unit[u].last_panel; ++at) {
    const QueryPanel& panel = args.panel[at];
    if (panel.lanes > kLanes) attend_panel<2>(args, panel, kv_head, scratch);
    else attend_panel<1>(args, panel, kv_head, scratch);
  }
}

static void attend_backward(const AttentionArgs& args, int64_t u, int64_t kv_head, float* sums, float* scratch) {
  const QueryUnit& unit = args.unit[u];
  float* d_key = sums;
  float* d_value = d_key + unit.keys * padded_width(args.width);
  memset(sums, 0, sizeof(float) * attention_sums(args.width, unit.keys));
  for (int64_t at = unit.first_panel; at < unit.last_panel; ++at) {
    const QueryPanel& panel = args.panel[at];
    if (panel.lanes > kLanes) attend_panel_backward<2>(args, panel, kv_head, d_key, d_value, scratch);
    else attend_panel_backward<1>(args, panel, kv_head, d_key, d_value, scratch);
  }
}

// Rows that units before this one have looked at are added to, the others written; those between them get 0.
static void add_attention_sums(const AttentionArgs& args, int64_t u, int64_t kv_head, const float* sums) {
  const QueryUnit& unit = args.unit[u];
  const int64_t padded = padded_width(args.width);
  const size_t bytes = sizeof(float) * args.width;
  const HeadRows both[2] = {args.d_key, args.d_value};
  for (const HeadRows& to : both) {
    int64_t next = unit.first_row;
    auto clear = [&](int64_t end) {
      for (; next < end; ++next) memset(to.at(next, kv_head), 0, bytes);
    };
    for (const KeyRun* run = args.run + unit.first_run; run < args.run + unit.last_run; ++run) {
      clear(run->row);
      for (int64_t k = 0; k < run->count; ++k) {
        const float* from = sums + (run->place + k) * padded;
        float* at = to.at(run->row + k, kv_head);
        if (run->row + k < next) {
          axpy(1.0f, from, at, args.width);
        } else {
          memcpy(at, from, bytes);
          ++next;
        }
      }
    }
    clear(unit.last_row);
    sums += unit.keys * padded;
  }
}

static const AttentionKernels attention_table = {kLanes,          kKeys,              attend,
                                                 attend_backward, add_attention_sums, attention_scratch,
                                                 attention_sums};

}  // namespace alro::ALRO_ISA
