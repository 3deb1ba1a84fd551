// Attention over packed trees, forward and backward, float32. A row sees the prefix of its tree up to itself and its
// own branch up to itself. Contract: alro_fast/modeling/cpp_attention.py.
#pragma once

#include <cstdint>

namespace alro {

struct HeadRows {  // [rows, heads, width], the last axis dense; strides in elements
  float* data;
  int64_t row_stride, head_stride;
  float* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

struct TreeRows {
  int64_t start, prefix_end, end;   // rows of the stream
  int64_t first_query, last_query;  // its queries are [first_query, last_query)
};

struct AttentionArgs {
  int64_t heads, kv_heads, width, trees;
  HeadRows query, key, value, out;
  float* lse;  // [queries, heads]: written forward, read backward
  const TreeRows* tree;
  const int32_t* query_row;   // [queries] row of the stream each query stands at
  const int32_t* branch_row;  // [rows] first row of the branch a row belongs to; the tree's prefix_end for prefix rows
  float scale;
  int threads;
  HeadRows grad, d_query, d_key, d_value;  // backward
};

void attention(const AttentionArgs&, bool backward);

struct AttentionKernels {  // one tree and one key head; scratch as attention_scratch says
  void (*forward)(const AttentionArgs&, int64_t tree, int64_t kv_head, float* scratch);
  void (*backward)(const AttentionArgs&, int64_t tree, int64_t kv_head, float* scratch);
  int64_t (*scratch)(int64_t width, int64_t tree_rows, bool backward);
};

}  // namespace alro
