#include "vocab/plan.h"

#include <algorithm>
#include <map>
#include <utility>

namespace alro {
namespace {

int64_t largest_share(const std::vector<Group>& groups, int shares) {
  const auto bounds = share_bounds(groups, shares);
  int64_t largest = 0;
  for (int share = 0; share < shares; ++share) {
    int64_t cost = 0;
    for (int64_t g = bounds[share]; g < bounds[share + 1]; ++g) cost += groups[g].cost();
    largest = std::max(largest, cost);
  }
  return largest;
}

}  // namespace

Plan make_plan(const HeadArgs& args, int lanes_per_vector, bool narrow_tail) {
  Plan plan;
  const int64_t n = args.hidden.rows;
  std::map<std::pair<int64_t, int64_t>, int64_t> known;
  for (int64_t p = 0; p < args.pairs; ++p) {
    const int64_t a = args.first[p], b = args.second[p];
    if (a < 0) continue;
    auto [entry, fresh] = known.try_emplace({std::min(a, b), std::max(a, b)}, int64_t(plan.pair_lanes.size()));
    if (fresh) plan.pair_lanes.push_back({{a, b}, {}});
    PairLane& lane = plan.pair_lanes[entry->second];
    lane.pairs[lane.row[0] == a ? 0 : 1].push_back(p);
  }

  std::vector<bool> placed(n, false);
  const int wide = 2 * lanes_per_vector;
  auto width_of = [&](int64_t left) { return narrow_tail && left <= lanes_per_vector ? 1 : 2; };
  for (int64_t start = 0; start < int64_t(plan.pair_lanes.size());) {
    const int64_t left = int64_t(plan.pair_lanes.size()) - start;
    Group group;
    group.vectors = width_of(left);
    group.panels = 2;
    const int64_t lanes = group.vectors * lanes_per_vector;
    group.pair_lane.assign(lanes, -1);
    for (int q = 0; q < 2; ++q) {
      group.row[q].assign(lanes, -1);
      group.primary[q].assign(lanes, false);
    }
    for (int64_t i = 0; i < std::min(left, lanes); ++i) {
      const PairLane& pair = plan.pair_lanes[start + i];
      group.pair_lane[i] = start + i;
      for (int q = 0; q < 2; ++q) {
        group.row[q][i] = pair.row[q];
        group.primary[q][i] = !placed[pair.row[q]];
        placed[pair.row[q]] = true;
        group.directed[q] = group.directed[q] || !pair.pairs[q].empty();
      }
    }
    plan.groups.push_back(std::move(group));
    start += lanes;
  }

  std::vector<int64_t> rest;
  for (int64_t row = 0; row < n; ++row)
    if (!placed[row]) rest.push_back(row);
  for (int64_t start = 0; start < int64_t(rest.size());) {
    const int64_t left = int64_t(rest.size()) - start;
    Group group;
    group.vectors = width_of(left);
    group.panels = 1;
    const int64_t lanes = group.vectors == 2 ? wide : lanes_per_vector;
    group.row[0].assign(lanes, -1);
    group.primary[0].assign(lanes, true);
    group.pair_lane.assign(lanes, -1);
    for (int64_t i = 0; i < std::min(left, lanes); ++i) group.row[0][i] = rest[start + i];
    plan.groups.push_back(std::move(group));
    start += lanes;
  }
  return plan;
}

Grid make_grid(const std::vector<Group>& groups, int threads) {
  int64_t cost = 0;
  for (const Group& group : groups) cost += group.cost();
  Grid best{1, threads};  // always balanced, but each vocabulary share keeps sums of its own
  for (int vocab = 1; vocab < threads; ++vocab) {
    if (threads % vocab) continue;
    const int rows = threads / vocab;
    if (double(largest_share(groups, rows)) * rows <= 1.07 * double(cost)) return {rows, vocab};
  }
  return best;
}

std::vector<int64_t> share_bounds(const std::vector<Group>& groups, int shares) {
  int64_t cost = 0, seen = 0;
  for (const Group& group : groups) cost += group.cost();
  std::vector<int64_t> bounds{0};
  for (int64_t g = 0; g < int64_t(groups.size()); ++g) {
    while (int(bounds.size()) < shares && (2 * seen + groups[g].cost()) * shares > 2 * cost * int64_t(bounds.size()))
      bounds.push_back(g);
    seen += groups[g].cost();
  }
  bounds.resize(shares + 1, int64_t(groups.size()));
  return bounds;
}

}  // namespace alro
