#include <algorithm>
#include <cstring>
#include <vector>

#include "common/buffer.h"
#include "common/threads.h"
#include "vocab/plan.h"
#include "vocab/tiles.h"
#include "vocab/vocab.h"

namespace alro {

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
