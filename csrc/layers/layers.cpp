#include "layers/layers.h"

#include <algorithm>
#include <vector>

#include "common/buffer.h"
#include "common/threads.h"

namespace alro {
namespace {

constexpr int64_t kCells = 1 << 16;  // a thread is not worth less work than this

template <class Work>
int over_rows(int64_t rows, int64_t columns, int threads, Work work) {
  const int count = int(std::clamp<int64_t>(std::min(rows * columns / kCells, rows), 1, std::max(threads, 1)));
  parallel(count, [&](int thread) { work(thread, rows * thread / count, rows * (thread + 1) / count); });
  return count;
}

}  // namespace

void norm(const NormArgs& args, int threads) {
  const LayerKernels& kernels = *active_kernels().layers;
  over_rows(args.rows, args.columns, threads, [&](int, int64_t begin, int64_t end) { kernels.norm(args, begin, end); });
}

void norm_backward(const NormArgs& args, int threads) {
  const LayerKernels& kernels = *active_kernels().layers;
  threads = std::max(threads, 1);
  const int64_t padded = (args.columns + 15) / 16 * 16;
  Floats sums(args.d_weight ? threads * padded : 0, true);  // each thread's own, added in the order of threads
  const int count = over_rows(args.rows, args.columns, threads, [&](int thread, int64_t begin, int64_t end) {
    kernels.norm_backward(args, begin, end, args.d_weight ? sums.get() + thread * padded : nullptr);
  });
  if (!args.d_weight) return;
  std::copy(sums.get(), sums.get() + args.columns, args.d_weight);
  for (int thread = 1; thread < count; ++thread)
    for (int64_t i = 0; i < args.columns; ++i) args.d_weight[i] += sums.get()[thread * padded + i];
}

void gated(const GatedArgs& args, int threads) {
  const LayerKernels& kernels = *active_kernels().layers;
  over_rows(args.rows, args.columns, threads,
            [&](int, int64_t begin, int64_t end) { kernels.gated(args, begin, end); });
}

void gated_backward(const GatedArgs& args, int threads) {
  const LayerKernels& kernels = *active_kernels().layers;
  over_rows(args.rows, args.columns, threads,
            [&](int, int64_t begin, int64_t end) { kernels.gated_backward(args, begin, end); });
}

void rotary(const RotaryArgs& args, int threads) {
  const LayerKernels& kernels = *active_kernels().layers;
  over_rows(args.batches * args.rows, args.heads * args.width, threads,
            [&](int, int64_t begin, int64_t end) { kernels.rotary(args, begin, end); });
}

}  // namespace alro
