#include "attention/attention.h"

#include <algorithm>
#include <atomic>

#include "common/buffer.h"
#include "common/threads.h"
#include "instruction_sets/kernels.h"

namespace alro {

void attention(const AttentionArgs& args, bool backward) {
  const AttentionKernels& kernels = *active_kernels().attention;
  const int64_t tasks = args.trees * args.kv_heads;
  if (tasks == 0) return;
  int64_t longest = 0, work = 0;
  for (int64_t t = 0; t < args.trees; ++t) {
    const int64_t rows = args.tree[t].end - args.tree[t].start;
    longest = std::max(longest, rows);
    work += rows * (args.tree[t].last_query - args.tree[t].first_query) * args.heads * args.width;
  }
  const int useful = int(std::min<int64_t>(work / (1 << 18) + 1, tasks));
  // A task writes rows of its own, so which thread takes it changes nothing.
  std::atomic<int64_t> next{0};
  parallel(std::clamp(args.threads, 1, useful), [&](int) {
    Floats scratch(kernels.scratch(args.width, longest, backward));
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
      auto run = backward ? kernels.backward : kernels.forward;
      run(args, task / args.kv_heads, task % args.kv_heads, scratch.get());
    }
  });
}

}  // namespace alro
