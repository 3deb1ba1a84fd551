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
      for (int64_t p = unit.first_panel; p < unit.last_panel; ++p) add_tiles(unit, plan_.panels[p]);
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
      for (int64_t q = lane / group_ + 1; q * group_ < last; ++q)
        if (2 * common(row(q - 1), row(q)) <= plan_.position[row(q - 1)]) last = q * group_;
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

  struct Span {
    int64_t lowest, highest;  // positions of queries
  };
  Span positions(int64_t first_lane, int64_t last_lane) const {
    Span span{INT32_MAX, -1};
    for (int64_t q = first_lane / group_; q * group_ < last_lane; ++q) {
      const int64_t at = plan_.position[row(q)];
      span = {std::min(span.lowest, at), std::max(span.highest, at)};
    }
    return span;
  }
  int64_t first_visible(int64_t position) const {
    return args_.window > 0 ? std::max<int64_t>(0, position - args_.window + 1) : 0;
  }

  void cut_units() {
    std::vector<int64_t> pairs;
    for (const QueryPanel& panel : plan_.panels) {
      spare_.clear();
      const int64_t last = panel.first_lane + panel.lanes;
      const int64_t keys = add_runs(panel.first_lane, last, first_visible(positions(panel.first_lane, last).lowest), spare_);
      pairs.push_back(keys * (panel.lanes > lanes_ ? 2 : 1) * lanes_);
      plan_.pairs += pairs.back();
    }
    const int64_t panels = int64_t(pairs.size());
    for (int64_t first = 0, last; first < panels; first = last) {
      int64_t work = 0;
      for (last = first; last < panels && (last - first < kUnitPanels || work * kTasks < plan_.pairs * args_.kv_heads);)
        work += pairs[last++];
      const int64_t begin = plan_.panels[first].first_lane;
      const int64_t end = plan_.panels[last - 1].first_lane + plan_.panels[last - 1].lanes;
      QueryUnit unit{first, last, int64_t(plan_.runs.size()), 0, 0};
      unit.keys = add_runs(begin, end, first_visible(positions(begin, end).lowest), plan_.runs);
      unit.last_run = int64_t(plan_.runs.size());
      plan_.units.push_back(unit);
      plan_.most_keys = std::max(plan_.most_keys, unit.keys);
    }
  }

  void add_tiles(const QueryUnit& unit, QueryPanel& panel) {
    const int64_t last_lane = panel.first_lane + panel.lanes;
    const Span span = positions(panel.first_lane, last_lane);
    const int64_t lowest = first_visible(span.lowest);
    spare_.clear();
    add_runs(panel.first_lane, last_lane, lowest, spare_);
    // The panel's first keys are those of its first row, by position.
    const int64_t free_from = first_visible(span.highest) - lowest;
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
    for (KeyRun left : spare_) {
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
  std::vector<KeyRun> spare_, path_;
};

}  // namespace

AttentionPlan plan_attention(const AttentionArgs& args, int64_t lanes, int64_t tile_keys) {
  return Planner(args, lanes, tile_keys).run();
}

}  // namespace alro
