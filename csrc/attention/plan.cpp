#include "attention/plan.h"

#include <algorithm>
#include <stdexcept>

namespace alro {
namespace {

constexpr int64_t kUnitPanels = 8;  // at least: what a unit adds up of its own must be little beside its products
constexpr int64_t kTasks = 256;     // of a call, about: pairs of a unit and a key head

class Planner {
 public:
  Planner(const AttentionArgs& args, int64_t lanes, int64_t tile_keys)
      : args_(args), group_(args.heads / args.kv_heads), lanes_(lanes), tile_keys_(tile_keys) {}

  AttentionPlan run() {
    place_rows();
    cut_panels();
    cut_units();
    for (const QueryUnit& unit : plan_.units) {
      for (int64_t p = unit.first_panel; p < unit.last_panel; ++p) add_tiles(unit, p);
    }
    return std::move(plan_);
  }

 private:
  int64_t end(int64_t node) const { return args_.node_start[node + 1]; }
  int64_t row(int64_t query) const { return args_.query_row[query]; }

  // The node and position of every row, and where the subtree of its node ends.
  void place_rows() {
    node_.resize(args_.rows);
    depth_.resize(args_.nodes);
    plan_.until.resize(args_.rows);
    plan_.position.resize(args_.rows);
    const int64_t* start = args_.node_start;
    auto close = [&](int64_t node, int64_t until) {
      std::fill(plan_.until.begin() + start[node], plan_.until.begin() + end(node), int32_t(until));
    };
    int64_t open = -1;  // the node whose path to its root is open
    for (int64_t g = 0; g < args_.nodes; ++g) {
      const int64_t parent = args_.node_parent[g];
      for (; open >= 0 && open != parent; open = args_.node_parent[open]) close(open, start[g]);
      if (open != parent) throw std::invalid_argument("node_parent: expected nodes depth first, -1 for a root");
      depth_[g] = parent < 0 ? 0 : depth_[parent] + end(parent) - start[parent];
      for (int64_t r = start[g]; r < end(g); ++r) {
        node_[r] = int32_t(g);
        plan_.position[r] = int32_t(depth_[g] + r - start[g]);
      }
      open = g;
    }
    for (; open >= 0; open = args_.node_parent[open]) close(open, args_.rows);
  }

  // How many keys both of two rows see, a <= b.
  int64_t common(int64_t a, int64_t b) const {
    int64_t g = node_[b];
    while (g >= 0 && args_.node_start[g] > a) g = args_.node_parent[g];
    return g < 0 ? 0 : depth_[g] + std::min(a + 1, end(g)) - args_.node_start[g];
  }

  // Neighbours share a panel unless the second leaves most of what the first sees.
  void cut_panels() {
    const int64_t count = args_.queries * group_;
    for (int64_t lane = 0; lane < count;) {
      int64_t last = std::min(lane + 2 * lanes_, count);
      for (int64_t q = lane / group_ + 1; q * group_ < last; ++q) {
        const int64_t before = row(q - 1), here = row(q);
        if (node_[before] != node_[here] && 2 * common(before, here) <= plan_.position[before]) last = q * group_;
      }
      plan_.panels.push_back({lane, last - lane, 0, 0});
      lane = last;
    }
  }

  // Runs of the keys that queries of [first_lane, last_lane) see, at positions from `lowest` on -> their number.
  int64_t add_runs(int64_t first_lane, int64_t last_lane, int64_t lowest, std::vector<KeyRun>& runs) {
    const size_t before = runs.size();
    int64_t seen = -1, keys = 0;  // what a row sees up to another, that one sees as well
    for (int64_t q = first_lane / group_; q * group_ < last_lane; ++q) {
      const int64_t here = row(q);
      if (seen >= 0 && node_[seen] == node_[here]) {
        runs.back().count += int32_t(here - seen);
        keys += here - seen;
        seen = here;
        continue;
      }
      path_.clear();
      for (int64_t g = node_[here]; g >= 0; g = args_.node_parent[g]) {
        const int64_t start = args_.node_start[g], last = std::min(here + 1, end(g));
        const int64_t first = std::max({start, seen + 1, start + lowest - depth_[g]});
        if (first < last) path_.push_back({int32_t(first), int32_t(last - first), 0});
        if (start <= seen) break;
      }
      for (auto part = path_.rbegin(); part != path_.rend(); ++part) {
        if (runs.size() > before && runs.back().row + runs.back().count == part->row) {
          runs.back().count += part->count;
        } else {
          runs.push_back({part->row, part->count, int32_t(keys)});
        }
        keys += part->count;
      }
      seen = here;
    }
    return keys;
  }

  struct Window {
    int64_t lowest, highest;  // the first position that the earliest of the queries sees, and the last of them
  };
  Window window(int64_t first_lane, int64_t last_lane) const {
    if (args_.window == 0) return {0, 0};
    Window found{INT32_MAX, 0};
    for (int64_t q = first_lane / group_; q * group_ < last_lane; ++q) {
      const int64_t first = std::max<int64_t>(0, plan_.position[row(q)] - int64_t(args_.window) + 1);
      found = {std::min(found.lowest, first), std::max(found.highest, first)};
    }
    return found;
  }

  void cut_units() {
    std::vector<int64_t> pairs;
    for (const QueryPanel& panel : plan_.panels) {
      const int64_t last = panel.first_lane + panel.lanes;
      const int64_t keys = add_runs(panel.first_lane, last, window(panel.first_lane, last).lowest, of_panels_);
      ends_.push_back(of_panels_.size());
      pairs.push_back(keys * (panel.lanes > lanes_ ? 2 : 1) * lanes_);
      plan_.pairs += pairs.back();
    }
    const int64_t panels = int64_t(pairs.size());
    int64_t first = 0, row_of_first = 0;
    do {
      int64_t last = first, work = 0, end = 0;
      while (last < panels && (last - first < kUnitPanels || work * kTasks < plan_.pairs * args_.kv_heads)) {
        end = plan_.panels[last].first_lane + plan_.panels[last].lanes;
        work += pairs[last++];
      }
      QueryUnit unit{first, last, int64_t(plan_.runs.size()), 0, 0, row_of_first, args_.rows};
      if (last > first) {
        const int64_t begin = plan_.panels[first].first_lane;
        unit.keys = add_runs(begin, end, window(begin, end).lowest, plan_.runs);
      }
      unit.last_run = int64_t(plan_.runs.size());
      if (last < panels) unit.last_row = row_of_first = row((end - 1) / group_) + 1;
      plan_.units.push_back(unit);
      plan_.most_keys = std::max(plan_.most_keys, unit.keys);
      first = last;
    } while (first < panels);
  }

  void add_tiles(const QueryUnit& unit, int64_t number) {
    QueryPanel& panel = plan_.panels[number];
    const int64_t last_lane = panel.first_lane + panel.lanes;
    const auto [lowest, highest] = window(panel.first_lane, last_lane);
    // The panel's first keys are those of its first row, by position.
    const int64_t free_from = highest - lowest;
    const int64_t free_to = common(row(panel.first_lane / group_), row((last_lane - 1) / group_)) - lowest;
    panel.first_tile = int64_t(plan_.tiles.size());
    int64_t at = unit.first_run, done = 0;
    KeyTile tile{int64_t(plan_.runs.size()), 0, 0, 0, 0};
    auto finish = [&] {
      tile.last_run = int64_t(plan_.runs.size());
      tile.free_from = int32_t(std::clamp<int64_t>(free_from - done, 0, tile.keys));
      tile.free_to = int32_t(std::clamp<int64_t>(free_to - done, tile.free_from, tile.keys));
      plan_.tiles.push_back(tile);
      done += tile.keys;
      tile = {tile.last_run, 0, 0, 0, 0};
    };
    for (size_t r = number ? ends_[number - 1] : 0; r < ends_[number]; ++r) {
      KeyRun left = of_panels_[r];
      while (plan_.runs[at].row + plan_.runs[at].count <= left.row) ++at;
      left.place = plan_.runs[at].place + left.row - plan_.runs[at].row;
      while (left.count > 0) {
        const int32_t count = int32_t(std::min<int64_t>(left.count, tile_keys_ - tile.keys));
        plan_.runs.push_back({left.row, count, left.place});
        tile.keys += count;
        left = {left.row + count, left.count - count, left.place + count};
        if (tile.keys == tile_keys_) finish();
      }
    }
    if (tile.keys > 0) finish();
    panel.last_tile = int64_t(plan_.tiles.size());
  }

  const AttentionArgs& args_;
  const int64_t group_, lanes_, tile_keys_;
  AttentionPlan plan_;
  std::vector<int32_t> node_;   // [rows]
  std::vector<int64_t> depth_;  // [nodes] position of the node's first row
  std::vector<KeyRun> path_, of_panels_;
  std::vector<size_t> ends_;  // [panels] of its keys in of_panels_
};

}  // namespace

AttentionPlan plan_attention(const AttentionArgs& args, int64_t lanes, int64_t tile_keys) {
  return Planner(args, lanes, tile_keys).run();
}

}  // namespace alro
