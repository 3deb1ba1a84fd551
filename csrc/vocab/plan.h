// Which row lies in which lane, and which thread takes which rows and which share of the vocabulary.
#pragma once

#include <cstdint>
#include <vector>

#include "vocab/vocab.h"

namespace alro {

constexpr float kLowest = -1e30f;  // below any logit, finite so that differences stay numbers

struct PairLane {
  int64_t row[2];
  std::vector<int64_t> pairs[2];  // [0]: pairs whose first is row[0] and second row[1]; [1]: the other way round
};

struct Group {  // what becomes a Unit
  int vectors;  // per panel
  int panels;
  std::vector<int64_t> row[2];     // [lanes] row of hidden, or -1
  std::vector<bool> primary[2];    // [lanes] this lane gives the row's own outputs; others are copies made for a pair
  std::vector<int64_t> pair_lane;  // [lanes] index into Plan::pair_lanes, or -1
  bool directed[2] = {false, false};  // some pair has its first row in panel q
  int64_t cost() const { return int64_t(vectors) * panels; }
};

struct Plan {
  std::vector<PairLane> pair_lanes;
  std::vector<Group> groups;
};

// Rows of pairs side by side in two panels, all others in one. narrow_tail: a last group of few rows is one vector
// wide.
Plan make_plan(const HeadArgs&, int lanes_per_vector, bool narrow_tail);

struct Grid {  // of threads: row shares x vocabulary shares
  int row_shares, vocab_shares;
};

Grid make_grid(const std::vector<Group>&, int threads);

// Contiguous shares of about equal cost: groups [bounds[i], bounds[i + 1]) for share i.
std::vector<int64_t> share_bounds(const std::vector<Group>&, int shares);

}  // namespace alro
