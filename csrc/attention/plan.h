// The keys of every panel of queries, as tiles. A panel looks at the rows that one of its queries sees, each once and
// where it lies: the ancestors of its first row, then what its other rows have beside them.
#pragma once

#include <vector>

#include "attention/attention.h"

namespace alro {

struct AttentionPlan {
  std::vector<int32_t> until, position;  // [rows]
  std::vector<KeyRun> runs;
  std::vector<KeyTile> tiles;
  std::vector<QueryPanel> panels;
  std::vector<QueryUnit> units;
  int64_t most_keys = 0;  // of a unit
  int64_t pairs = 0;      // of a lane and a key that are multiplied
};

AttentionPlan plan_attention(const AttentionArgs&, int64_t lanes, int64_t tile_keys);

}  // namespace alro
