#include "gather/gather.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/buffer.h"
#include "common/threads.h"

namespace alro {
namespace {

// [begin, end) of a row of a matrix as float32: in place where it can be, else copied into `room`.
const float* open_row(const Kernels& kernels, const Matrix& m, int64_t row, int64_t begin, int64_t end, float* room) {
  if (m.dtype == DType::f32) {
    const float* at = static_cast<const float*>(m.data) + row * m.row_stride + begin * m.column_stride;
    if (m.column_stride == 1) return at;
    for (int64_t h = begin; h < end; ++h, at += m.column_stride) room[h - begin] = *at;
    return room;
  }
  const uint16_t* at = static_cast<const uint16_t*>(m.data) + row * m.row_stride + begin * m.column_stride;
  if (m.column_stride == 1) {
    kernels.widen(at, room, end - begin);
  } else {
    for (int64_t h = begin; h < end; ++h, at += m.column_stride) {
      const uint32_t bits = uint32_t(*at) << 16;
      std::memcpy(room + (h - begin), &bits, sizeof bits);
    }
  }
  return room;
}

}  // namespace

void gather_logits(const GatherArgs& args, float* logits) {
  const Kernels& kernels = active_kernels();
  const int64_t h = args.hidden.columns;
  const int64_t work = args.groups * args.slots * args.columns * h;
  const int threads =
      int(std::clamp<int64_t>(std::min<int64_t>(work >> 18, args.groups), 1, std::max(args.threads, 1)));
  parallel(threads, [&](int thread) {
    Floats row_room(h), column_room(h * args.columns);
    std::vector<const float*> columns(args.columns);
    for (int64_t g = args.groups * thread / threads; g < args.groups * (thread + 1) / threads; ++g) {
      const int64_t* ids = args.ids + g * args.columns;
      for (int64_t c = 0; c < args.columns; ++c)
        columns[c] = ids[c] < 0 ? nullptr : open_row(kernels, args.weight, ids[c], 0, h, column_room.get() + c * h);
      for (int64_t s = 0; s < args.slots; ++s) {
        const int64_t row = args.rows[g * args.slots + s];
        float* to = logits + (g * args.slots + s) * args.columns;
        if (row < 0) {
          std::fill(to, to + args.columns, 0.0f);
          continue;
        }
        const float* x = open_row(kernels, args.hidden, row, 0, h, row_room.get());
        for (int64_t c = 0; c < args.columns; ++c) {
          if (!columns[c]) {
            to[c] = 0;
            continue;
          }
          float z = args.scale * (kernels.dot(x, columns[c], h) + (args.bias ? args.bias[ids[c]] : 0.0f));
          to[c] = args.softcap > 0 ? args.softcap * std::tanh(z / args.softcap) : z;
        }
      }
    }
  });
}

void gather_backward(const GatherArgs& args, const float* logits, const float* grad, float* d_hidden, float* d_weight,
                     float* d_bias) {
  const Kernels& kernels = active_kernels();
  const int64_t h = args.hidden.columns;
  // A row or a column may be in several groups, so threads share out H: sums keep one order whatever their number.
  const int64_t work = args.groups * args.slots * args.columns * h;
  const int64_t chunks = (h + 63) / 64;
  const int threads = int(std::clamp<int64_t>(std::min(work >> 18, chunks), 1, std::max(args.threads, 1)));
  parallel(threads, [&](int thread) {
    const int64_t begin = std::min(h, 64 * (chunks * thread / threads));
    const int64_t end = std::min(h, 64 * (chunks * (thread + 1) / threads));
    const int64_t size = end - begin;
    Floats row_room(size), column_room(size * args.columns);
    std::vector<const float*> columns(args.columns);
    for (int64_t g = 0; g < args.groups; ++g) {
      const int64_t* ids = args.ids + g * args.columns;
      for (int64_t c = 0; c < args.columns; ++c)
        columns[c] = ids[c] < 0 || !d_hidden
                         ? nullptr
                         : open_row(kernels, args.weight, ids[c], begin, end, column_room.get() + c * size);
      for (int64_t s = 0; s < args.slots; ++s) {
        const int64_t row = args.rows[g * args.slots + s];
        if (row < 0) continue;
        const float* x = d_weight ? open_row(kernels, args.hidden, row, begin, end, row_room.get()) : nullptr;
        const int64_t at = (g * args.slots + s) * args.columns;
        for (int64_t c = 0; c < args.columns; ++c) {
          if (ids[c] < 0) continue;
          float slope = grad[at + c] * args.scale;
          if (args.softcap > 0) {
            const float share = logits[at + c] / args.softcap;
            slope *= 1 - share * share;
          }
          if (slope == 0) continue;
          if (d_hidden) kernels.axpy(slope, columns[c], d_hidden + row * h + begin, size);
          if (d_weight) kernels.axpy(slope, x, d_weight + ids[c] * h + begin, size);
          if (d_bias && thread == 0) d_bias[ids[c]] += slope;
        }
      }
    }
  });
}

}  // namespace alro
