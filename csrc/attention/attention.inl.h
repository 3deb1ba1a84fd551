// Tree attention of one tree and one key head. Lanes are queries (and the query heads that share the key head), so the
// softmax is vertical and the micro-kernels are those of the vocabulary pass: keys take the place of W's rows.
#pragma once

#include "attention/attention.h"
#include "common/simd.h"
#include "vocab/vocab.inl.h"

namespace alro::ALRO_ISA {

constexpr int kKeys = 112 / kBlock * kBlock;  // of a tile
constexpr int64_t kListed = (kKeys + 15) / 16 * 16;
constexpr float kHidden = -1e30f;  // score of a key that may not be seen

ALRO_INLINE Tile key_tile(const HeadRows& from, int64_t row, int64_t head, int keys) {
  return {from.at(row, head), from.row_stride, from.at(row, head), from.row_stride, keys, nullptr, 0};
}

ALRO_INLINE int64_t padded_width(int64_t width) { return (width + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }

// to [width, lanes] = factor * transposed rows; lanes without a row get 0
template <int V>
static void pack_rows(const HeadRows& from, const int64_t* query, const int64_t* head, int64_t width, float factor,
                      float* to) {
  constexpr int lanes = V * kLanes;
  for (int lane = 0; lane < lanes; ++lane) {
    if (query[lane] < 0) {
      for (int64_t d = 0; d < width; ++d) to[d * lanes + lane] = 0;
      continue;
    }
    const float* row = from.at(query[lane], head[lane]);
    for (int64_t d = 0; d < width; ++d) to[d * lanes + lane] = factor * row[d];
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

// The queries in the lanes of one panel, and which keys they see.
template <int V>
struct Queries {
  int64_t query[V * kLanes], head[V * kLanes];  // -1: an empty lane
  vi row[V], branch[V];                         // of the stream; an empty lane sees nothing
  int32_t first_row, last_row, first_branch, last_branch;
  bool whole;  // no lane is empty

  Queries(const AttentionArgs& args, const TreeRows& tree, int64_t kv_head, int64_t first_lane, int64_t lane_count) {
    const int64_t group = args.heads / args.kv_heads;
    first_row = first_branch = INT32_MAX;
    last_row = last_branch = -1;
    for (int lane = 0; lane < V * kLanes; ++lane) {
      const int64_t at = first_lane + lane;
      vi& rows = row[lane / kLanes];
      vi& branches = branch[lane / kLanes];
      if (at >= lane_count) {
        query[lane] = head[lane] = -1;
        rows[lane % kLanes] = -1;
        branches[lane % kLanes] = INT32_MAX;
        continue;
      }
      query[lane] = tree.first_query + at / group;
      head[lane] = kv_head * group + at % group;
      const int32_t r = args.query_row[query[lane]], b = args.branch_row[r];
      rows[lane % kLanes] = r;
      branches[lane % kLanes] = b;
      if (r < first_row) first_row = r;
      if (r > last_row) last_row = r;
      if (b < first_branch) first_branch = b;
      if (b > last_branch) last_branch = b;
    }
    whole = lane_count - first_lane >= V * kLanes;
  }
};

// f(first key, number of keys, all lanes see all of them, keys are of the prefix) over every key some lane may see
template <int V, class F>
ALRO_INLINE void tiles(const TreeRows& tree, const Queries<V>& panel, F f) {
  const int64_t prefix_end = panel.last_row < tree.prefix_end ? panel.last_row + 1 : tree.prefix_end;
  for (int64_t k = tree.start; k < prefix_end; k += kKeys) {
    const int64_t end = k + kKeys < prefix_end ? k + kKeys : prefix_end;
    f(k, int(end - k), panel.whole && end - 1 <= panel.first_row, true);
  }
  for (int64_t k = panel.first_branch; k <= panel.last_row; k += kKeys) {
    const int64_t end = k + kKeys <= panel.last_row ? k + kKeys : panel.last_row + 1;
    f(k, int(end - k), panel.whole && end - 1 <= panel.first_row && panel.last_branch <= k, false);
  }
}

template <int V>
ALRO_INLINE vi sees(const Queries<V>& panel, int64_t key, bool prefix, int j) {
  const vi at = vi{} + int32_t(key);
  return prefix ? at <= panel.row[j] : (at <= panel.row[j]) & (at >= panel.branch[j]);
}

template <int V>
static void attend_panel(const AttentionArgs& args, const TreeRows& tree, int64_t kv_head, int64_t first_lane,
                         int64_t lane_count, const int32_t* every, float* scratch) {
  constexpr int lanes = V * kLanes;
  const int64_t width = args.width;
  const Queries<V> panel(args, tree, kv_head, first_lane, lane_count);
  float* packed = scratch;
  float* sums = packed + width * lanes;
  float* p = sums + width * lanes;
  pack_rows<V>(args.query, panel.query, panel.head, width, args.scale, packed);
  memset(sums, 0, sizeof(float) * width * lanes);
  vf highest[V], total[V];
  ALRO_UNROLL for (int j = 0; j < V; ++j) highest[j] = splat(kHidden), total[j] = vf{};

  tiles(tree, panel, [&](int64_t k, int keys, bool all, bool prefix) {
    tile_logits<V>(key_tile(args.key, k, kv_head, keys), width, packed, p);
    vf before[V], decay[V];
    ALRO_UNROLL for (int j = 0; j < V; ++j) before[j] = highest[j];
    for (int i = 0; i < keys; ++i) ALRO_UNROLL for (int j = 0; j < V; ++j) {
      float* at = p + (i * V + j) * kLanes;
      vf s = load(at);
      if (!all) store(at, s = sees(panel, k + i, prefix, j) ? s : splat(kHidden));
      highest[j] = maximum(s, highest[j]);
    }
    ALRO_UNROLL for (int j = 0; j < V; ++j) {
      decay[j] = exponential(before[j] - highest[j]);
      total[j] *= decay[j];
    }
    for (int i = 0; i < keys; ++i) ALRO_UNROLL for (int j = 0; j < V; ++j) {
      float* at = p + (i * V + j) * kLanes;
      vf s = load(at), x = exponential(s - highest[j]);
      if (!all) x = s <= splat(kHidden) ? vf{} : x;
      total[j] += x;
      store(at, x);
    }
    add_columns<V>(key_tile(args.value, k, kv_head, keys), width, p, every, keys, decay,
                   sums);
  });

  float last[2][lanes] __attribute__((aligned(64)));
  ALRO_UNROLL for (int j = 0; j < V; ++j) {
    store(last[0] + j * kLanes, splat(1.0f) / total[j]);
    store(last[1] + j * kLanes, highest[j] + logarithm(total[j]));
  }
  for (int lane = 0; lane < lanes && panel.query[lane] >= 0; ++lane) {
    float* out = args.out.at(panel.query[lane], panel.head[lane]);
    for (int64_t d = 0; d < width; ++d) out[d] = sums[d * lanes + lane] * last[0][lane];
    args.lse[panel.query[lane] * args.heads + panel.head[lane]] = last[1][lane];
  }
}

// d_key, d_value [rows of the tree, padded]
template <int V>
static void attend_panel_backward(const AttentionArgs& args, const TreeRows& tree, int64_t kv_head, int64_t first_lane,
                                  int64_t lane_count, const int32_t* every, float* d_key, float* d_value,
                                  float* scratch) {
  constexpr int lanes = V * kLanes;
  const int64_t width = args.width, padded = padded_width(width);
  const Queries<V> panel(args, tree, kv_head, first_lane, lane_count);
  float* packed_query = scratch;
  float* packed_grad = packed_query + width * lanes;
  float* d_query = packed_grad + width * lanes;
  float* query = d_query + width * lanes;  // [lanes, padded], times scale
  float* grad = query + padded * lanes;
  float* p = grad + padded * lanes;
  float* d_score = p + kKeys * lanes;
  pack_rows<V>(args.query, panel.query, panel.head, width, args.scale, packed_query);
  pack_rows<V>(args.grad, panel.query, panel.head, width, 1.0f, packed_grad);
  copy_rows<V>(args.query, panel.query, panel.head, width, padded, args.scale, query);
  copy_rows<V>(args.grad, panel.query, panel.head, width, padded, 1.0f, grad);
  memset(d_query, 0, sizeof(float) * width * lanes);
  vf lse[V], delta[V], one[V];
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t n = panel.query[lane], h = panel.head[lane];
    lse[lane / kLanes][lane % kLanes] = n < 0 ? -kHidden : args.lse[n * args.heads + h];
    delta[lane / kLanes][lane % kLanes] = n < 0 ? 0.0f : dot(args.grad.at(n, h), args.out.at(n, h), width);
  }
  ALRO_UNROLL for (int j = 0; j < V; ++j) one[j] = splat(1.0f);

  tiles(tree, panel, [&](int64_t k, int keys, bool all, bool prefix) {
    const Tile key = key_tile(args.key, k, kv_head, keys);
    const Tile value = key_tile(args.value, k, kv_head, keys);
    tile_logits<V>(key, width, packed_query, p);
    tile_logits<V>(value, width, packed_grad, d_score);
    for (int i = 0; i < keys; ++i) ALRO_UNROLL for (int j = 0; j < V; ++j) {
      const int at = (i * V + j) * kLanes;
      vf x = load(p + at) - lse[j];
      if (!all) x = sees(panel, k + i, prefix, j) ? x : splat(kHidden);
      x = exponential(x);
      store(p + at, x);
      store(d_score + at, x * (load(d_score + at) - delta[j]));
    }
    add_outer(p, lanes, keys, grad, padded, d_value + (k - tree.start) * padded);
    add_outer(d_score, lanes, keys, query, padded, d_key + (k - tree.start) * padded);
    add_columns<V>(key, width, d_score, every, keys, one, d_query);
  });

  for (int lane = 0; lane < lanes && panel.query[lane] >= 0; ++lane) {
    float* to = args.d_query.at(panel.query[lane], panel.head[lane]);
    for (int64_t d = 0; d < width; ++d) to[d] = args.scale * d_query[d * lanes + lane];
  }
}

static int64_t attention_scratch(int64_t width, int64_t tree_rows, bool backward) {
  constexpr int64_t lanes = 2 * kLanes;
  const int64_t padded = padded_width(width);
  if (!backward) return kListed + 2 * width * lanes + kKeys * lanes;
  return kListed + 3 * width * lanes + 2 * padded * lanes + 2 * kKeys * lanes + 2 * tree_rows * padded;
}

template <int V>
struct Vectors {
  static constexpr int vectors = V;
};

// f(V as a constant, first lane, number of lanes) over panels of 2 vectors, a narrow one last
template <class F>
ALRO_INLINE void panels(const AttentionArgs& args, const TreeRows& tree, F f) {
  const int64_t count = (tree.last_query - tree.first_query) * (args.heads / args.kv_heads);
  int64_t lane = 0;
  for (; count - lane > kLanes; lane += 2 * kLanes) f(Vectors<2>{}, lane, count);
  if (lane < count) f(Vectors<1>{}, lane, count);
}

static int32_t* all_keys(float* scratch) {
  int32_t* every = reinterpret_cast<int32_t*>(scratch);
  for (int i = 0; i < kKeys; ++i) every[i] = i;
  return every;
}

static void attend(const AttentionArgs& args, int64_t t, int64_t kv_head, float* scratch) {
  const TreeRows& tree = args.tree[t];
  const int32_t* every = all_keys(scratch);
  panels(args, tree, [&](auto wide, int64_t lane, int64_t count) {
    attend_panel<decltype(wide)::vectors>(args, tree, kv_head, lane, count, every, scratch + kListed);
  });
}

static void attend_backward(const AttentionArgs& args, int64_t t, int64_t kv_head, float* scratch) {
  const TreeRows& tree = args.tree[t];
  const int32_t* every = all_keys(scratch);
  const int64_t rows = tree.end - tree.start, padded = padded_width(args.width);
  float* d_key = scratch + kListed;
  float* d_value = d_key + rows * padded;
  memset(d_key, 0, sizeof(float) * 2 * rows * padded);
  panels(args, tree, [&](auto wide, int64_t lane, int64_t count) {
    attend_panel_backward<decltype(wide)::vectors>(args, tree, kv_head, lane, count, every, d_key, d_value,
                                                  d_value + rows * padded);
  });
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(args.d_key.at(tree.start + r, kv_head), d_key + r * padded, sizeof(float) * args.width);
    memcpy(args.d_value.at(tree.start + r, kv_head), d_value + r * padded, sizeof(float) * args.width);
  }
}

static const AttentionKernels attention_table = {attend, attend_backward, attention_scratch};

}  // namespace alro::ALRO_ISA
