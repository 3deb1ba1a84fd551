#include "vocab.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "buffer.h"
#include "threads.h"

namespace alro {
namespace {

constexpr float kLowest = -1e30f;  // below any logit, finite so that differences stay numbers
constexpr int kPhases = 32;        // vocabulary shares meet after 1, 2, 4, .. of so many parts

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- which row lies in which lane ----

struct PairLane {
  int64_t row[2];
  std::vector<int64_t> pairs[2];  // [0]: pairs whose first is row[0] and second row[1]; [1]: the other way round
};

struct Group {      // what becomes a Unit
  int vectors;      // per panel
  int panels;
  std::vector<int64_t> row[2];      // [lanes] row of hidden, or -1
  std::vector<bool> primary[2];     // [lanes] this lane gives the row's own outputs; others are copies made for a pair
  std::vector<int64_t> pair_lane;   // [lanes] index into Plan::pair_lanes, or -1
  bool directed[2] = {false, false};  // some pair has its first row in panel q
  int64_t cost() const { return int64_t(vectors) * panels; }
};

struct Plan {
  std::vector<PairLane> pair_lanes;
  std::vector<Group> groups;
};

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

// ---- who does what: the threads form a grid of row shares x vocabulary shares ----

struct Grid {
  int row_shares, vocab_shares;
};

int64_t largest_share(const std::vector<Group>& groups, int shares);

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

// Contiguous shares of about equal cost: groups [bounds[i], bounds[i + 1]) for share i.
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

// ---- tiles of W ----

// Rows of W in a tile: it shall stay in the second-level cache, its logits in the first.
int64_t tile_rows(const Kernels& kernels, int64_t hidden_size, int64_t columns) {
  static const int64_t cache = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return size;
#endif
    return int64_t(512) << 10;
  }();
  const int64_t fit = cache / 2 / int64_t(sizeof(float)) / std::max<int64_t>(hidden_size, 1);
  int64_t blocks = std::clamp<int64_t>(fit / kernels.block_rows, 2, 112 / kernels.block_rows);
  return std::max<int64_t>(std::min(blocks * kernels.block_rows, columns), 1);
}

// A stride near the golden section that visits every tile: a run of tiles that holds most of the mass is met early,
// wherever it lies, and what comes after can be dropped.
int64_t visiting_stride(int64_t tiles) {
  auto divisor = [](int64_t a, int64_t b) {
    while (b) std::swap(a %= b, b);
    return a;
  };
  int64_t stride = std::max<int64_t>(int64_t(double(tiles) * 0.6180339887), 1);
  while (divisor(stride, tiles) != 1) ++stride;
  return stride;
}

const char* element(const Matrix& m, int64_t row, int64_t column) {
  const int64_t size = m.dtype == DType::f32 ? 4 : 2;
  return static_cast<const char*>(m.data) + (row * m.row_stride + column * m.column_stride) * size;
}

// Values [begin, end) of a row of a bfloat16 matrix.
void copy_bits(const Matrix& m, int64_t row, int64_t begin, int64_t end, uint16_t* to) {
  if (m.column_stride == 1) {
    std::memcpy(to, element(m, row, begin), sizeof(uint16_t) * size_t(end - begin));
  } else {
    for (int64_t h = begin; h < end; ++h) std::memcpy(to + (h - begin), element(m, row, h), sizeof(uint16_t));
  }
}

float value(const Matrix& m, int64_t row, int64_t column) {
  const char* at = element(m, row, column);
  float x;
  if (m.dtype == DType::f32) {
    std::memcpy(&x, at, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, at, 2);
    const uint32_t bits = uint32_t(half) << 16;
    std::memcpy(&x, &bits, 4);
  }
  return x;
}

bool direct(const Matrix& m) { return m.dtype == DType::f32 && (m.column_stride == 1 || m.columns == 1); }

// Tile of W as float32 rows, in place where it can be, else copied into `room`.
Tile open_tile(const Kernels& kernels, const HeadArgs& args, int64_t start, int64_t rows, float* room) {
  const Matrix& w = args.weight;
  auto tile = [&](const float* weight, int64_t stride) {
    return Tile{weight, stride, weight, stride, int(rows), args.bias ? args.bias + start : nullptr, 1.0f};
  };
  if (direct(w)) return tile(reinterpret_cast<const float*>(element(w, start, 0)), w.row_stride);
  for (int64_t v = 0; v < rows; ++v) {
    float* to = room + v * w.columns;
    if (w.dtype == DType::bf16 && w.column_stride == 1) {
      kernels.widen(reinterpret_cast<const uint16_t*>(element(w, start + v, 0)), to, w.columns);
    } else {
      for (int64_t h = 0; h < w.columns; ++h) to[h] = value(w, start + v, h);
    }
  }
  return tile(room, w.columns);
}

// ---- tiles of a bfloat16 W as pairs: along H for the logits, along V for the weighted sums ----

int64_t pair_depth(int64_t hidden_size) { return (hidden_size + 1) / 2; }

// An odd number of cache lines, lest the rows of a block meet in one set of the first-level cache.
int64_t pair_stride(int64_t words) { return ceil_div(words, 16) / 2 * 32 + 16; }

int64_t pair_room(int64_t rows, int64_t hidden_size) {
  return (rows + 1) / 2 * (2 * pair_stride(pair_depth(hidden_size)) + pair_stride(hidden_size));
}

Tile open_pairs(const Kernels& kernels, const HeadArgs& args, int64_t start, int64_t rows, float* room) {
  const Matrix& w = args.weight;
  const int64_t depth = pair_depth(w.columns), stride = pair_stride(depth), columns_stride = pair_stride(w.columns);
  float* columns = room + (rows + 1) / 2 * 2 * stride;
  auto bits = [&](int64_t v) { return reinterpret_cast<uint16_t*>(room + v * stride); };
  for (int64_t v = 0; v < rows; ++v) {
    room[v * stride + depth - 1] = 0;
    copy_bits(w, start + v, 0, w.columns, bits(v));
  }
  if (rows % 2) std::memset(bits(rows), 0, sizeof(float) * depth);
  for (int64_t v = 0; v < rows; v += 2)
    kernels.interleave(bits(v), bits(v + 1), columns + v / 2 * columns_stride, w.columns);
  return {room, stride, columns, columns_stride, int(rows), args.bias ? args.bias + start : nullptr, 1.0f};
}

// rows of hidden, one per lane, as pairs along H: [pair_depth, lanes]
void pack_pairs(const Matrix& hidden, const std::vector<int64_t>& rows, float* to) {
  const int64_t lanes = int64_t(rows.size());
  std::memset(to, 0, sizeof(float) * size_t(pair_depth(hidden.columns) * lanes));
  for (int64_t h0 = 0; h0 < hidden.columns; h0 += 32) {
    const int64_t h1 = std::min(h0 + 32, hidden.columns);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      if (rows[lane] < 0) continue;
      uint16_t bits[32] = {};
      copy_bits(hidden, rows[lane], h0, h1, bits);
      for (int64_t h = h0; h < h1; h += 2) std::memcpy(to + h / 2 * lanes + lane, bits + (h - h0), sizeof(float));
    }
  }
}

// rows of hidden, one per lane: [H, lanes]
void pack(const Matrix& hidden, const std::vector<int64_t>& rows, float* to) {
  const int64_t lanes = int64_t(rows.size());
  for (int64_t h0 = 0; h0 < hidden.columns; h0 += 16) {
    const int64_t h1 = std::min(h0 + 16, hidden.columns);
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t h = h0; h < h1; ++h) to[h * lanes + lane] = rows[lane] < 0 ? 0.0f : value(hidden, rows[lane], h);
  }
}

// ---- statistics and sums of one vocabulary share for one panel ----

struct Partial {
  Floats memory, sums;
  Panel panel;
  float* granted;
  int64_t lanes;

  Partial(const Group& group, int q, int64_t hidden_size, const float* packed, bool expected, bool mixed, bool spread)
      : memory(9 * int64_t(group.row[q].size()), true), lanes(int64_t(group.row[q].size())) {
    float* at = memory.get();
    auto take = [&] { return std::exchange(at, at + lanes); };
    float* slack = take();
    panel.hidden = packed;
    panel.slack = slack;
    panel.granted = granted = take();
    panel.highest = take();
    panel.total = take();
    panel.total_rest = take();
    panel.dropped = take();
    panel.reference = take();
    float* cross = take();
    panel.cross = group.directed[q] ? cross : nullptr;
    panel.cross_rest = take();
    for (int64_t lane = 0; lane < lanes; ++lane) {
      panel.highest[lane] = panel.reference[lane] = granted[lane] = kLowest;
      slack[lane] = group.row[q][lane] < 0 ? 1e30f : 0.0f;
    }
    const bool teacher = group.directed[q];
    const int64_t size = hidden_size * lanes;
    sums = Floats(size * (int(expected) + int(mixed && teacher) + int(spread && teacher)), true);
    float* sum = sums.get();
    auto take_sum = [&](bool wanted) { return wanted ? std::exchange(sum, sum + size) : nullptr; };
    panel.expected = take_sum(expected);
    panel.mixed = take_sum(mixed && teacher);
    panel.spread = take_sum(spread && teacher);
  }
};

// Every share learns the mass that all shares have seen, divided by their number.
void grant(std::vector<std::vector<std::vector<Partial>>>& partials, int64_t group) {
  for (size_t q = 0; q < partials[0][group].size(); ++q) {
    for (int64_t lane = 0; lane < partials[0][group][q].lanes; ++lane) {
      float highest = kLowest;
      for (auto& share : partials) highest = std::max(highest, share[group][q].panel.highest[lane]);
      double total = 0;
      for (auto& share : partials) {
        const Panel& panel = share[group][q].panel;
        total += std::exp(double(panel.highest[lane]) - highest) * panel.total[lane];
      }
      const float granted = total > 0 ? float(highest + std::log(total / double(partials.size()))) : kLowest;
      for (auto& share : partials) share[group][q].granted[lane] = granted;
    }
  }
}

}  // namespace

double vocab_pass(const HeadArgs& args, float mass_bound, const VocabOut& out) {
  const Kernels& kernels = active_kernels();
  const int64_t n = args.hidden.rows, h = args.hidden.columns, v = args.weight.rows;
  if (n == 0) return 0;
  const Plan plan = make_plan(args, kernels.lanes, true);
  const int64_t group_count = int64_t(plan.groups.size());
  const bool pairs = kernels.vocab_tile_bf16 && args.hidden.dtype == DType::bf16 && args.weight.dtype == DType::bf16;
  const auto vocab_tile = pairs ? kernels.vocab_tile_bf16 : kernels.vocab_tile;
  const auto open = pairs ? open_pairs : open_tile;
  const auto pack_rows = pairs ? pack_pairs : pack;
  const int64_t rows_per_tile = tile_rows(kernels, h, v);
  const int64_t tiles = ceil_div(v, rows_per_tile);
  const int threads = std::max(args.threads, 1);
  Grid grid = make_grid(plan.groups, threads);
  grid.vocab_shares = int(std::min<int64_t>(grid.vocab_shares, tiles));
  const auto bounds = share_bounds(plan.groups, grid.row_shares);
  const Head head{h, pairs ? pair_depth(h) : h, args.scale, args.softcap, args.entropy};

  std::vector<Floats> packed(group_count);  // both panels of a group, side by side
  parallel(int(std::min<int64_t>(threads, group_count)), [&](int thread) {
    for (int64_t g = thread; g < group_count; g += std::min<int64_t>(threads, group_count)) {
      const Group& group = plan.groups[g];
      const int64_t size = head.depth * int64_t(group.row[0].size());
      packed[g] = Floats(size * group.panels);
      for (int q = 0; q < group.panels; ++q) pack_rows(args.hidden, group.row[q], packed[g].get() + q * size);
    }
  });

  // partials[vocabulary share][group] -> one per panel
  std::vector<std::vector<std::vector<Partial>>> partials(grid.vocab_shares);
  for (auto& of_share : partials) of_share.resize(group_count);
  const int workers = grid.row_shares * grid.vocab_shares;
  std::vector<int64_t> multiplied(workers, 0);
  const int64_t stride = visiting_stride(tiles);

  // Tiles of a share in [from, to), in units of 1 / kPhases of its work
  auto visit = [&](int thread, int from, int to) {
    const int row_share = thread % grid.row_shares, vocab_share = thread / grid.row_shares;
    const int64_t begin = bounds[row_share], end = bounds[row_share + 1];
    if (begin == end) return;
    std::vector<Unit> units;
    for (int64_t g = begin; g < end; ++g) {
      const Group& group = plan.groups[g];
      auto& panels = partials[vocab_share][g];
      for (int q = 0; q < group.panels && from == 0; ++q) {
        const auto& primary = group.primary[q];
        const bool expected = out.expected && std::find(primary.begin(), primary.end(), true) != primary.end();
        const float* rows = packed[g].get() + q * head.depth * int64_t(group.row[q].size());
        panels.emplace_back(group, q, h, rows, expected, out.mixed, out.spread);
      }
      Unit unit{group.vectors, group.panels, {}};
      for (int q = 0; q < group.panels; ++q) unit.panel[q] = panels[q].panel;
      units.push_back(unit);
    }

    const int64_t cells = (rows_per_tile + 1) / 2 * 4 * kernels.lanes;
    Floats room(pairs ? pair_room(rows_per_tile, h) : direct(args.weight) ? 0 : rows_per_tile * h);
    Floats blocks(cells * 6), listed(2 * (rows_per_tile + 1));
    int32_t* index = reinterpret_cast<int32_t*>(listed.get());
    float* block = blocks.get();
    const Scratch scratch{{block, block + cells},
                          {block + 2 * cells, block + 3 * cells},
                          {block + 4 * cells, block + 5 * cells},
                          {index, index + rows_per_tile + 1}};
    // Shares take turns along the visiting order, so that each of them meets the mass early.
    const int64_t count = ceil_div(tiles - vocab_share, grid.vocab_shares);
    const float bound = grid.vocab_shares > 1 ? mass_bound / 2 : mass_bound;  // the other half pays for `granted`
    for (int64_t t = count * from / kPhases; t < count * to / kPhases; ++t) {
      const int64_t start = (vocab_share + t * grid.vocab_shares) * stride % tiles * rows_per_tile;
      Tile tile = open(kernels, args, start, std::min(rows_per_tile, v - start), room.get());
      tile.progress = float(t + 1) / float(count);
      for (const Unit& unit : units)
        multiplied[thread] += vocab_tile(unit, tile, head, scratch, bound) * unit.vectors;
    }
  };

  if (grid.vocab_shares == 1 || mass_bound == 0 || !out.expected) {
    parallel(workers, [&](int thread) { visit(thread, 0, kPhases); });
  } else {  // shares meet now and then, and tell each other what mass they have seen
    for (int from = 0, to = 1; from < kPhases; from = to, to *= 2) {
      parallel(workers, [&](int thread) { visit(thread, from, to); });
      for (int64_t g = 0; g < group_count; ++g) grant(partials, g);
    }
  }

  const int finishers = int(std::min<int64_t>(threads, group_count));
  parallel(finishers, [&](int thread) {
    std::vector<float> factor(grid.vocab_shares);
    std::vector<const float*> sums(grid.vocab_shares);
    // row [H] = sum over vocabulary shares of factor * (lane's column of the share's sums)
    auto gather = [&](int64_t lane, int64_t lanes, float* row) {
      for (int64_t i = 0; i < h; ++i) {
        float x = 0;
        for (int s = 0; s < grid.vocab_shares; ++s) x += factor[s] * sums[s][i * lanes + lane];
        row[i] = x;
      }
    };
    for (int64_t g = thread; g < group_count; g += finishers) {
      const Group& group = plan.groups[g];
      for (int q = 0; q < group.panels; ++q) {
        auto panel = [&](int s) -> const Panel& { return partials[s][g][q].panel; };
        const int64_t lanes = int64_t(group.row[q].size());
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const int64_t row = group.row[q][lane];
          if (row < 0) continue;
          float highest = panel(0).highest[lane];
          for (int s = 1; s < grid.vocab_shares; ++s)  // written so that a NaN stays
            highest = panel(s).highest[lane] > highest ? panel(s).highest[lane] : highest;
          double total = 0, cross = 0;
          for (int s = 0; s < grid.vocab_shares; ++s) {
            const double share = std::exp(double(panel(s).highest[lane]) - highest);
            total += share * panel(s).total[lane];
            if (panel(s).cross) cross += share * panel(s).cross[lane];
          }
          auto select = [&](float* Panel::*sum) {
            for (int s = 0; s < grid.vocab_shares; ++s) {
              sums[s] = panel(s).*sum;
              factor[s] = float(std::exp(double(panel(s).reference[lane]) - highest) / total * args.scale);
            }
          };
          if (group.primary[q][lane]) {
            out.lse[row] = float(highest + std::log(total));
            if (out.expected) {
              select(&Panel::expected);
              gather(lane, lanes, out.expected + row * h);
            }
          }
          if (group.pair_lane[lane] < 0) continue;
          for (const int64_t p : plan.pair_lanes[group.pair_lane[lane]].pairs[q]) {
            out.cross[p] = float(cross / total);
            if (out.mixed) {
              select(&Panel::mixed);
              gather(lane, lanes, out.mixed + p * h);
            }
            if (out.spread) {
              select(&Panel::spread);
              gather(lane, lanes, out.spread + p * h);
            }
          }
        }
      }
    }
  });

  int64_t products = 0;
  for (const int64_t m : multiplied) products += m;
  return double(products) * kernels.lanes / (double(n) * double(v));
}

void weight_grad(const HeadArgs& args, const WeightGradArgs& grad) {
  const Kernels& kernels = active_kernels();
  const int64_t h = args.hidden.columns, v = args.weight.rows;
  if (args.hidden.rows == 0) {
    if (grad.d_weight) std::memset(grad.d_weight, 0, sizeof(float) * size_t(v * h));
    if (grad.d_bias) std::memset(grad.d_bias, 0, sizeof(float) * size_t(v));
    return;
  }
  const Plan plan = make_plan(args, kernels.lanes, false);
  const int64_t group_count = int64_t(plan.groups.size());
  const int lanes = 2 * kernels.lanes;
  const Head head{h, h, args.scale, args.softcap, args.entropy};

  int64_t panels = 0;
  for (const Group& group : plan.groups) panels += group.panels;
  const int64_t padded = ceil_div(h, lanes) * lanes;
  Floats packed(panels * lanes * h), rows(panels * lanes * padded, true), inputs(panels * lanes * 5, true);
  std::vector<Unit> units;
  std::vector<GradLanes> unit_lanes;  // two per unit
  for (int64_t g = 0, panel = 0; g < group_count; ++g) {
    const Group& group = plan.groups[g];
    Unit unit{group.vectors, group.panels, {}};
    GradLanes of_unit[2] = {};
    for (int q = 0; q < group.panels; ++q, ++panel) {
      float* to = packed.get() + panel * lanes * h;
      pack(args.hidden, group.row[q], to);
      unit.panel[q].hidden = to;
      float* input = inputs.get() + panel * lanes * 5;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t row = group.row[q][lane];
        if (row < 0) {
          input[lane] = -kLowest;  // an empty lane has probability 0 everywhere
          continue;
        }
        float* natural = rows.get() + (panel * lanes + lane) * padded;
        for (int64_t i = 0; i < h; ++i) natural[i] = args.scale * to[i * lanes + lane];
        input[lane] = grad.lse[row];
        if (group.primary[q][lane]) input[lanes + lane] = grad.grad_lse[row];
        if (group.pair_lane[lane] < 0) continue;
        for (const int64_t p : plan.pair_lanes[group.pair_lane[lane]].pairs[q]) {
          input[2 * lanes + lane] = grad.cross[p];
          input[3 * lanes + lane] += grad.grad_first[p];
          input[4 * lanes + lane] += grad.grad_second[p];
        }
      }
      const bool teacher = group.directed[q];
      of_unit[q] = {input, input + lanes, teacher ? input + 2 * lanes : nullptr, input + 3 * lanes, input + 4 * lanes};
    }
    units.push_back(unit);
    unit_lanes.push_back(of_unit[0]);
    unit_lanes.push_back(of_unit[1]);
  }

  // A tile's gradients [panels, tile rows, lanes] shall stay in the second-level cache.
  const int64_t fit = std::max<int64_t>((int64_t(1) << 17) / (panels * lanes) / kernels.block_rows, 1);
  const int64_t rows_per_tile = std::min(tile_rows(kernels, h, v), fit * kernels.block_rows);
  const int64_t tiles = ceil_div(v, rows_per_tile);
  const int threads = int(std::min<int64_t>(std::max(args.threads, 1), tiles));
  parallel(threads, [&](int thread) {
    Floats room(direct(args.weight) ? 0 : rows_per_tile * h), grads(panels * rows_per_tile * lanes);
    Floats spare(int64_t(kernels.block_rows) * lanes);
    for (int64_t t = tiles * thread / threads; t < tiles * (thread + 1) / threads; ++t) {
      const int64_t start = t * rows_per_tile, size = std::min(rows_per_tile, v - start);
      const Tile tile = open_tile(kernels, args, start, size, room.get());
      float* to = grads.get();
      for (size_t u = 0; u < units.size(); ++u) {
        float* const of_panels[2] = {to, to + size * lanes};
        kernels.grad_tile(units[u], &unit_lanes[2 * u], tile, head, of_panels);
        to += units[u].panels * size * lanes;
      }
      if (grad.d_bias) {
        for (int64_t i = 0; i < size; ++i) {
          double sum = 0;
          for (int64_t q = 0; q < panels; ++q)
            for (int64_t lane = 0; lane < lanes; ++lane) sum += grads.get()[(q * size + i) * lanes + lane];
          grad.d_bias[start + i] = float(sum * args.scale);
        }
      }
      if (grad.d_weight)
        kernels.grad_product(grads.get(), panels, lanes, int(size), rows.get(), padded, h, grad.d_weight + start * h, h,
                             spare.get());
    }
  });
}

}  // namespace alro
