#include "listwise/listwise.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/buffer.h"
#include "common/threads.h"
#include "instruction_sets/kernels.h"

namespace alro {

int64_t listwise_scratch(const ListwiseArgs& args) {
  const int64_t widest = (std::max(args.columns, args.width) + 63) / 64 * 64;
  return 5 * (args.rows + 2) * widest + 8 * widest;
}

void listwise(ListwiseArgs args, int threads) {
  std::vector<float> discount(std::max<int64_t>(args.width + 1, 32), 0.0f), delta(discount.size());
  for (size_t d = 1; d < discount.size(); ++d) {
    const double here = 1.0 / std::log2(1.0 + double(d));
    discount[d] = float(here);
    delta[d] = float(here - 1.0 / std::log2(2.0 + double(d)));
  }
  delta[0] = delta[1];
  args.discount = discount.data();
  args.delta = delta.data();
  const Kernels& kernels = active_kernels();
  const int64_t cells = args.lists * args.rows * args.columns;
  const int useful = int(std::min<int64_t>(cells / 4096 + 1, args.lists));  // a thread is not worth less work than this
  const int count = std::clamp(threads, 1, std::max(useful, 1));
  parallel(count, [&](int thread) {
    Floats scratch(listwise_scratch(args));
    kernels.listwise(args, args.lists * thread / count, args.lists * (thread + 1) / count, scratch.get());
  });
}

}  // namespace alro
