// Attention over packed tries, forward and backward, float32. Row r sees key k where k <= r < until[k], `until` being
// the row at which the subtree of k's node ends. Contract: alro_fast/modeling/cpp_attention.py.
#pragma once

#include <cstdint>

namespace alro {

struct HeadRows {  // [rows, heads, width], the last axis dense; strides in elements
  float* data;
  int64_t row_stride, head_stride;
  float* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

// ---- the plan: which keys which queries look at (plan.cpp), the same for every head and any number of threads ----

struct KeyRun {
  int32_t row, count;  // rows of the stream that lie side by side
  int32_t place;       // of the first in its unit's sums
};

struct KeyTile {
  int64_t first_run, last_run;
  int32_t keys;
  int32_t free_from, free_to;  // of its keys, which every query of the panel sees
};

struct QueryPanel {  // lanes count (query, head of the group), heads fastest
  int64_t first_lane, lanes, first_tile, last_tile;
};

struct QueryUnit {
  int64_t first_panel, last_panel;
  int64_t first_run, last_run, keys;  // every key that one of its panels looks at
  int64_t first_row, last_row;        // rows of the stream after the last query before it, up to its own last one
};

struct AttentionArgs {
  int64_t heads, kv_heads, width, rows, queries, nodes;
  HeadRows query, key, value, out;
  float* lse;                  // [queries, heads]: written forward, read backward
  const int64_t* node_start;   // [nodes + 1] nodes tile the rows, depth first
  const int32_t* node_parent;  // [nodes] -1: a root
  const int32_t* query_row;    // [queries] ascending: the row of the stream each query stands at
  float scale, softcap;        // softcap 0: none
  int32_t window;              // a query sees the last `window` positions of its branch; 0: all
  int threads;
  HeadRows grad, d_query, d_key, d_value;  // backward
  // of the plan
  const int32_t* until;     // [rows]
  const int32_t* position;  // [rows] in the branch
  const KeyRun* run;
  const KeyTile* tile;
  const QueryPanel* panel;
  const QueryUnit* unit;
};

// Throws std::invalid_argument where the nodes are not in depth-first order or the queries not in that of the rows.
void attention(AttentionArgs, bool backward);

struct AttentionKernels {
  int lanes, tile_keys;  // of a vector; of a tile at most
  // One unit and one key head. `sums` has room for the unit's keys: backward leaves what it has for d_key and d_value
  // there, and add_sums, called unit after unit, adds it to them.
  void (*forward)(const AttentionArgs&, int64_t unit, int64_t kv_head, float* scratch);
  void (*backward)(const AttentionArgs&, int64_t unit, int64_t kv_head, float* sums, float* scratch);
  void (*add_sums)(const AttentionArgs&, int64_t unit, int64_t kv_head, const float* sums);
  int64_t (*scratch)(int64_t width, bool backward);
  int64_t (*sums)(int64_t width, int64_t keys);
};

}  // namespace alro
