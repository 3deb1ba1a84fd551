// The listwise terms of one list after another: lanes are candidates (or grades), a list's matrices stay in the
// first-level cache, loss and gradient come out of one visit.
#pragma once

#include <math.h>

#include "listwise.h"
#include "simd.h"

namespace alro::ALRO_ISA {

constexpr float kMasked = -3.0e38f;

// log(x) for normal x > 0 (Cephes)
ALRO_INLINE vf logarithm(vf x) {
  vi bits = (vi)x;
  vi exponent = ((bits - 0x3f3504f3) >> 23);  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
  vf m = (vf)(bits - (exponent << 23)) - splat(1.0f);
  vf e = __builtin_convertvector(exponent, vf);
  vf s = m * m;
  vf p = splat(7.0376836292e-2f);
  p = p * m + splat(-1.1514610310e-1f);
  p = p * m + splat(1.1676998740e-1f);
  p = p * m + splat(-1.2420140846e-1f);
  p = p * m + splat(1.4249322787e-1f);
  p = p * m + splat(-1.6668057665e-1f);
  p = p * m + splat(2.0000714765e-1f);
  p = p * m + splat(-2.4999993993e-1f);
  p = p * m + splat(3.3333331174e-1f);
  p = p * m * s + e * splat(-2.12194440e-4f) - s * splat(0.5f);
  return m + p + e * splat(0.693359375f);
}

ALRO_INLINE vf lane_numbers(int64_t start) {
  vf x;
  for (int i = 0; i < kLanes; ++i) x[i] = float(start + i);
  return x;
}

ALRO_INLINE float largest_lane(vf x) {
  float largest = x[0];
  for (int i = 1; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

ALRO_INLINE vf pick(const float* table, const int32_t* index) {
#if defined(__AVX512F__)
  return (vf)_mm512_i32gather_ps(_mm512_loadu_si512(index), table, 4);
#elif defined(__AVX2__)
  return (vf)_mm256_i32gather_ps(table, _mm256_loadu_si256((const __m256i*)index), 4);
#else
  vf x;
  for (int i = 0; i < kLanes; ++i) x[i] = table[index[i]];
  return x;
#endif
}

struct List {  // one list's view of the arguments
  const ListwiseArgs& args;
  int64_t l, rows, columns, padded;  // used rows and columns; padded: columns up to whole vectors

  List(const ListwiseArgs& a, int64_t list)
      : args(a),
        l(list),
        rows(a.sizes[list]),
        columns(a.values ? a.columns : a.sizes[list]),
        padded((columns + kLanes - 1) / kLanes * kLanes) {}
  const float* logits(int64_t row) const { return args.logits + (l * args.rows + row) * args.columns; }
  const int64_t* ranks() const { return args.ranks + l * args.width; }
};

// log_p, p [rows, padded]: softmax of each row over the list's columns; with `emitted`, without those of earlier slots.
// Masked columns get log_p = kMasked and p = 0.
static void softmax_rows(const List& list, bool emitted, int64_t padded, float* log_p, float* p) {
  const vf masked = splat(kMasked);
  for (int64_t k = 0; k < list.rows; ++k) {
    float* y = log_p + k * padded;
    float* e = p + k * padded;
    for (int64_t c = 0; c < padded; c += kLanes) store(y + c, masked);
    memcpy(y, list.logits(k), sizeof(float) * list.columns);
    if (emitted)
      for (int64_t c = 0; c < list.columns; ++c)
        if (list.ranks()[c] <= k) y[c] = kMasked;
    vf largest = masked;
    for (int64_t c = 0; c < padded; c += kLanes) largest = maximum(load(y + c), largest);
    const vf highest = splat(largest_lane(largest));
    vf total = vf{};
    for (int64_t c = 0; c < padded; c += kLanes) {
      vf x = exponential(load(y + c) - highest);
      store(e + c, x);
      total += x;
    }
    const float sum = sum_lanes(total);
    const vf share = splat(1.0f / sum), lse = highest + splat(logf(sum));
    for (int64_t c = 0; c < padded; c += kLanes) {
      vf z = load(y + c);
      store(e + c, load(e + c) * share);
      store(y + c, z > splat(0.5f * kMasked) ? z - lse : (z <= splat(0.5f * kMasked) ? masked : z));
    }
  }
}

// Pairwise lambda loss of scores (lower is better where sigma > 0); d_score [padded] is its gradient.
static float pairwise_lambda(const List& list, const float* score, float sigma, int64_t padded, float* d_score,
                             float* room) {
  const ListwiseArgs& args = list.args;
  const int64_t m = args.sizes[list.l];
  float* rating = room;
  float* gain = room + padded;
  float* sorted = room + 2 * padded;
  int32_t* rank = reinterpret_cast<int32_t*>(room + 3 * padded);
  int32_t* distance = reinterpret_cast<int32_t*>(room + 4 * padded);
  const float* ratings = args.ratings + list.l * args.width;
  for (int64_t i = 0; i < padded; ++i) {
    rating[i] = i < m ? ratings[i] : NAN;
    rank[i] = i < m ? int32_t(list.ranks()[i]) : 1;
    gain[i] = rating[i] == rating[i] ? exp2f(rating[i]) - 1.0f : 0.0f;
    d_score[i] = 0;
    int64_t at = i;  // insertion sort, descending
    for (; at > 0 && sorted[at - 1] < gain[i]; --at) sorted[at] = sorted[at - 1];
    sorted[at] = gain[i];
  }
  // gains of ungraded candidates and of pads are 0, and so are the terms they add; they sort before negative gains,
  // as in the reference, which keeps their places too: both count `width` places
  float ideal = 0;
  int64_t place = 1, zeros = args.width - padded;
  for (int64_t i = 0; i < padded; ++i) {
    if (sorted[i] < 0 && zeros != 0) {
      place += zeros;
      zeros = 0;
    }
    if (sorted[i] != 0) ideal += sorted[i] * args.discount[place > 0 ? place : 1];
    ++place;
  }
  const float per_ideal = ideal > 0 ? 1.0f / ideal : 1.0f;

  vf loss = vf{};
  for (int64_t i = 0; i < m; ++i) {
    if (!(rating[i] == rating[i])) continue;
    vf pulled = vf{};
    for (int64_t c = 0; c < padded; c += kLanes) {
      vf other = load(rating + c);
      vi better = splat(rating[i]) > other;
      for (int j = 0; j < kLanes; ++j) {
        const int32_t d = rank[i] - rank[c + j];
        distance[j] = d == 0 ? 1 : d < 0 ? -d : d;
      }
      vf delta = pick(args.discount, distance) - pick(args.discount + 1, distance);
      vf apart = (splat(gain[i]) - load(gain + c)) * splat(per_ideal);
      apart = apart < vf{} ? -apart : apart;
      vf weight = better ? delta * apart * splat(1.44269504088896341f) : vf{};
      vf margin = splat(sigma) * (splat(score[i]) - load(score + c));
      vf small = exponential(margin < vf{} ? margin : -margin);  // exp(-|margin|)
      vf one = splat(1.0f), sum = one + small;
      vf log_sum = logarithm(sum) + (small - (sum - one)) / sum;  // log1p
      loss += weight * ((margin > vf{} ? margin : vf{}) + log_sum);
      vf pull = splat(sigma) * weight * ((margin < vf{} ? small : one) / sum);
      pulled += pull;
      store(d_score + c, load(d_score + c) - pull);
    }
    d_score[i] += sum_lanes(pulled);
  }
  return sum_lanes(loss);
}

ALRO_INLINE void put_row(const float* from, int64_t used, int64_t columns, float* to) {
  memcpy(to, from, sizeof(float) * used);
  if (columns > used) memset(to + used, 0, sizeof(float) * (columns - used));
}

// One list's soft lambda loss. log_p, p are its row softmaxes; work [rows, padded] is free.
static void soft_lambda(const List& list, int64_t padded, const float* log_p, const float* p, float* work, float* room) {
  const ListwiseArgs& args = list.args;
  float* score = room;
  float* d_score = room + padded;
  float* rest = room + 2 * padded;
  float* expected = args.expected + list.l * args.width;
  const int64_t m = list.rows;

  if (args.values) {
    for (int64_t i = 0; i < padded; ++i) score[i] = 0;
    for (int64_t i = 0; i < m; ++i) {
      float sum = 0;
      for (int64_t c = 0; c < list.columns; ++c) sum += p[i * list.padded + c] * args.values[c];
      score[i] = sum;
    }
    args.soft_lambda[list.l] = pairwise_lambda(list, score, -args.sigma, padded, d_score, rest);
    put_row(score, m, args.width, expected);
    for (int64_t i = 0; i < m; ++i) {
      float* to = args.d_soft_lambda + (list.l * args.rows + i) * args.columns;
      for (int64_t c = 0; c < list.columns; ++c)
        to[c] = d_score[i] * p[i * list.padded + c] * (args.values[c] - score[i]);
    }
    return;
  }

  // softmax over the slots of each candidate, and the expected slot
  const vf gamma = splat(args.gamma);
  for (int64_t c = 0; c < padded; c += kLanes) {
    auto sharpened = [&](int64_t k) __attribute__((always_inline)) {
      if (args.normalise) return gamma * load(log_p + k * padded + c);
      vf z;  // pads of a row may lie in the next one: they are finite, and their results are not used
      for (int j = 0; j < kLanes; ++j) z[j] = c + j < list.columns ? list.logits(k)[c + j] : 0.0f;
      return gamma * z;
    };
    vf highest = sharpened(0);
    for (int64_t k = 1; k < m; ++k) highest = maximum(sharpened(k), highest);
    vf total = vf{}, moment = vf{};
    for (int64_t k = 0; k < m; ++k) {
      vf x = exponential(sharpened(k) - highest);
      store(work + k * padded + c, x);
      total += x;
      moment += x * splat(float(k + 1));
    }
    const vf mean = lane_numbers(c) < splat(float(list.columns)) ? moment / total : vf{};
    store(score + c, mean);
    for (int64_t k = 0; k < m; ++k) {
      float* at = work + k * padded + c;
      store(at, gamma * (load(at) / total) * (splat(float(k + 1)) - mean));
    }
  }
  args.soft_lambda[list.l] = pairwise_lambda(list, score, args.sigma, padded, d_score, rest);
  put_row(score, m, args.width, expected);
  for (int64_t k = 0; k < m; ++k) {
    vf sum = vf{};
    for (int64_t c = 0; c < padded; c += kLanes) {
      vf d = load(d_score + c) * load(work + k * padded + c);
      d = lane_numbers(c) < splat(float(list.columns)) ? d : vf{};
      store(work + k * padded + c, d);
      sum += d;
    }
    if (args.normalise) {
      const vf all = splat(sum_lanes(sum));
      for (int64_t c = 0; c < padded; c += kLanes)
        store(work + k * padded + c, load(work + k * padded + c) - load(p + k * padded + c) * all);
    }
    put_row(work + k * padded, list.columns, args.columns,
            args.d_soft_lambda + (list.l * args.rows + k) * args.columns);
  }
}

// D(P, Q) of one row and its gradients; p and q are 0, and the logarithms kMasked, where a column is masked.
ALRO_INLINE float divergence_row(Divergence kind, int64_t padded, const float* log_p, const float* p, const float* log_q,
                                 const float* q, float weight, float* d_student, float* d_teacher) {
  const vf cut = splat(0.5f * kMasked), w = splat(weight);
  vf forward = vf{}, backward = vf{};
  for (int64_t c = 0; c < padded; c += kLanes) {
    vf a = load(log_p + c), b = load(log_q + c);
    vi masked = (a < cut) | (b < cut);
    vf ratio = masked ? vf{} : (kind == Divergence::ce ? -b : a - b);
    forward += masked ? vf{} : load(p + c) * ratio;
    backward -= masked ? vf{} : load(q + c) * ratio;
  }
  const vf f = splat(sum_lanes(forward)), g = splat(sum_lanes(backward));
  const bool both = kind == Divergence::symmetric;
  for (int64_t c = 0; c < padded; c += kLanes) {
    vf a = load(log_p + c), b = load(log_q + c);
    vi masked = (a < cut) | (b < cut);
    vf ratio = masked ? vf{} : (kind == Divergence::ce ? -b : a - b);
    vf x = masked ? vf{} : load(p + c), y = masked ? vf{} : load(q + c);
    vf student = y - x, teacher = x * (ratio - f);
    if (both) {
      student = splat(0.5f) * (y * (-ratio - g) + y - x);
      teacher = splat(0.5f) * (teacher + x - y);
    }
    store(d_student + c, w * student);
    store(d_teacher + c, w * teacher);
  }
  return both ? 0.5f * (f[0] + g[0]) : f[0];
}

static void permutation(const List& list, int64_t padded, float* const* work) {
  const ListwiseArgs& args = list.args;
  const List teacher(args, args.twin[list.l]);
  float *log_q = work[0], *q = work[1], *log_p = work[2], *p = work[3];
  const bool emitted = args.mask_emitted && !args.values;
  if (emitted) softmax_rows(list, true, padded, log_q, q);
  softmax_rows(teacher, emitted, padded, log_p, p);
  const int64_t compared = args.values ? list.rows : list.rows - 1;
  const int64_t shared = compared < teacher.rows ? compared : teacher.rows;
  float* d_student = work[4];
  float* d_teacher = work[4] + padded;
  float sum = 0;
  for (int64_t k = 0; k < shared; ++k) {
    sum += divergence_row(args.divergence, padded, log_p + k * padded, p + k * padded, log_q + k * padded,
                          q + k * padded, 1.0f / float(compared), d_student, d_teacher);
    const int64_t at = (list.l * args.rows + k) * args.columns;
    put_row(d_student, list.columns, args.columns, args.d_student + at);
    if (args.d_teacher) put_row(d_teacher, list.columns, args.columns, args.d_teacher + at);
  }
  args.permutation[list.l] = compared > 0 ? sum / float(compared) : 0.0f;
}

static void listwise(const ListwiseArgs& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t widest = ((args.columns > args.width ? args.columns : args.width) + 63) / 64 * 64;
  float* work[5];
  for (int i = 0; i < 5; ++i) work[i] = scratch + i * args.rows * widest;
  float* room = scratch + 6 * args.rows * widest;
  const int64_t cells = args.rows * args.columns;
  for (int64_t l = begin; l < end; ++l) {
    const List list(args, l);
    const bool compare = args.divergence != Divergence::none && args.twin[l] >= 0;
    int64_t padded = list.padded;
    if (compare) {  // one width for both
      const int64_t twin_padded = List(args, args.twin[l]).padded;
      padded = twin_padded > padded ? twin_padded : padded;
    }
    const int64_t wide = (args.sizes[l] + kLanes - 1) / kLanes * kLanes;
    memset(args.d_soft_lambda + l * cells, 0, sizeof(float) * cells);
    memset(args.d_student + l * cells, 0, sizeof(float) * cells);
    if (args.d_teacher) memset(args.d_teacher + l * cells, 0, sizeof(float) * cells);
    args.permutation[l] = 0;
    softmax_rows(list, false, padded, work[0], work[1]);
    soft_lambda(list, args.values ? wide : padded, work[0], work[1], work[2], room);
    if (compare) permutation(list, padded, work);
  }
}

}  // namespace alro::ALRO_ISA
