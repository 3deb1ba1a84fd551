#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "common/buffer.h"
#include "common/threads.h"
#include "vocab/plan.h"
#include "vocab/tiles.h"
#include "vocab/vocab.h"

namespace alro {
namespace {

constexpr int kPhases = 32;  // vocabulary shares meet after 1, 2, 4, .. of so many parts

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

using Partials = std::vector<std::vector<std::vector<Partial>>>;  // [vocabulary share][group] -> one per panel

// Every share learns the mass that all shares have seen, divided by their number.
void grant(Partials& partials, int64_t group) {
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

// Adds up the vocabulary shares, row by row and pair by pair.
void write_results(const HeadArgs& args, const Plan& plan, const Partials& partials, int threads, const VocabOut& out) {
  const int shares = int(partials.size());
  const int64_t h = args.hidden.columns;
  const int finishers = int(std::min<int64_t>(threads, int64_t(plan.groups.size())));
  parallel(finishers, [&](int thread) {
    std::vector<float> factor(shares);
    std::vector<const float*> sums(shares);
    // row [H] = sum over vocabulary shares of factor * (lane's column of the share's sums)
    auto gather = [&](int64_t lane, int64_t lanes, float* row) {
      for (int64_t i = 0; i < h; ++i) {
        float x = 0;
        for (int s = 0; s < shares; ++s) x += factor[s] * sums[s][i * lanes + lane];
        row[i] = x;
      }
    };
    for (int64_t g = thread; g < int64_t(plan.groups.size()); g += finishers) {
      const Group& group = plan.groups[g];
      for (int q = 0; q < group.panels; ++q) {
        auto panel = [&](int s) -> const Panel& { return partials[s][g][q].panel; };
        const int64_t lanes = int64_t(group.row[q].size());
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const int64_t row = group.row[q][lane];
          if (row < 0) continue;
          float highest = panel(0).highest[lane];
          for (int s = 1; s < shares; ++s)  // written so that a NaN stays
            highest = panel(s).highest[lane] > highest ? panel(s).highest[lane] : highest;
          double total = 0, cross = 0;
          for (int s = 0; s < shares; ++s) {
            const double share = std::exp(double(panel(s).highest[lane]) - highest);
            total += share * panel(s).total[lane];
            if (panel(s).cross) cross += share * panel(s).cross[lane];
          }
          auto select = [&](float* Panel::* sum) {
            for (int s = 0; s < shares; ++s) {
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

  Partials partials(grid.vocab_shares);
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
      for (const Unit& unit : units) multiplied[thread] += vocab_tile(unit, tile, head, scratch, bound) * unit.vectors;
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

  write_results(args, plan, partials, threads, out);

  int64_t products = 0;
  for (const int64_t m : multiplied) products += m;
  return double(products) * kernels.lanes / (double(n) * double(v));
}

}  // namespace alro
