#include "attention/attention.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "attention/plan.h"
#include "common/buffer.h"
#include "common/threads.h"
#include "instruction_sets/kernels.h"

namespace alro {

void attention(AttentionArgs args, bool backward) {
  const AttentionKernels& kernels = *active_kernels().attention;
  const AttentionPlan plan = plan_attention(args, kernels.lanes, kernels.tile_keys);
  args.until = plan.until.data();
  args.position = plan.position.data();
  args.run = plan.runs.data();
  args.tile = plan.tiles.data();
  args.panel = plan.panels.data();
  args.unit = plan.units.data();
  const int64_t tasks = int64_t(plan.units.size()) * args.kv_heads;
  const int64_t work = plan.pairs * args.kv_heads * args.width;
  const int useful = int(std::min<int64_t>(work / (1 << 18) + 1, tasks));
  // Units add to keys they share in the order of the stream, which thread ever has them: each waits for its turn. Tasks
  // are taken in that order too, so the first unfinished one never waits.
  std::atomic<int64_t> next{0};
  std::vector<std::atomic<int64_t>> turn(args.kv_heads);
  parallel(std::clamp(args.threads, 1, useful), [&](int) {
    Floats scratch(kernels.scratch(args.width, backward));
    Floats sums(backward ? kernels.sums(args.width, plan.most_keys) : 0);
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
      const int64_t unit = task / args.kv_heads, head = task % args.kv_heads;
      if (!backward) {
        kernels.forward(args, unit, head, scratch.get());
        continue;
      }
      kernels.backward(args, unit, head, sums.get(), scratch.get());
      while (turn[head].load(std::memory_order_acquire) != unit) std::this_thread::yield();
      kernels.add_sums(args, unit, head, sums.get());
      turn[head].store(unit + 1, std::memory_order_release);
    }
  });
}

}  // namespace alro
