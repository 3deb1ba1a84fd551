// The listwise terms of one list after another: lanes are candidates (or grades), a list's matrices stay in the
// first-level cache, loss and gradient come out of one visit.
#pragma once

#include "common/simd.h"
#include "listwise/listwise.h"

namespace alro::ALRO_ISA {

constexpr float kMasked = -3.0e38f;  // the logarithm of a masked column's probability
constexpr float kCut = 0.5f * kMasked;

ALRO_INLINE int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

struct List {  // one list's view of the arguments
  const ListwiseArgs& args;
  int64_t l, rows, columns;  // used rows and columns

  List(const ListwiseArgs& a, int64_t list)
      : args(a), l(list), rows(a.sizes[list]), columns(a.values ? a.columns : a.sizes[list]) {}
  int64_t at(int64_t row) const { return (l * args.rows + row) * args.columns; }
  const int64_t* ranks() const { return args.ranks + l * args.width; }
};

// to [args.columns] = the first `columns` of a row, then zeros
ALRO_INLINE void put_row(const List& list, const float* row, float* to) {
  int64_t c = 0;
  for (; c < list.columns; c += kLanes) store_some(to + c, load(row + c), list.columns - c);
  for (c = list.columns; c < list.args.columns; c += kLanes) store_some(to + c, vf{}, list.args.columns - c);
}

// log_p, p [rows, padded]: softmax of each row over the list's columns; with `emitted`, without those of earlier slots.
// Masked columns get log_p = kMasked; room [2, rows in whole vectors].
static void softmax_rows(const List& list, bool emitted, int64_t padded, float* log_p, float* p, float* room) {
  const vf masked = splat(kMasked);
  float* highest = room;
  float* sum = room + whole_vectors(list.rows);
  for (int64_t k = 0; k < list.rows; ++k) {
    const float* z = list.args.logits + list.at(k);
    float* y = log_p + k * padded;
    float* e = p + k * padded;
    vf largest = masked;
    for (int64_t c = 0; c < padded; c += kLanes) {
      const int64_t left = list.columns - c;
      vf x = left > 0 ? load_some(z + c, left, masked) : masked;
      store(y + c, x);
      largest = maximum(x, largest);
    }
    if (emitted) {
      for (int64_t c = 0; c < list.columns; ++c)
        if (list.ranks()[c] <= k) y[c] = kMasked;
      largest = masked;
      for (int64_t c = 0; c < padded; c += kLanes) largest = maximum(load(y + c), largest);
    }
    highest[k] = largest_lane(largest);
    const vf top = splat(highest[k]);
    vf total = vf{};
    for (int64_t c = 0; c < padded; c += kLanes) {
      vf x = exponential(load(y + c) - top);
      store(e + c, x);
      total += x;
    }
    sum[k] = sum_lanes(total);
  }
  for (int64_t k = list.rows; k < whole_vectors(list.rows); ++k) highest[k] = 0, sum[k] = 1;
  for (int64_t k = 0; k < list.rows; k += kLanes) {
    vf total = load(sum + k);
    store(highest + k, load(highest + k) + logarithm(total));
    store(sum + k, splat(1.0f) / total);
  }
  for (int64_t k = 0; k < list.rows; ++k) {
    const vf lse = splat(highest[k]), share = splat(sum[k]);
    for (int64_t c = 0; c < padded; c += kLanes) {
      float* y = log_p + k * padded + c;
      float* e = p + k * padded + c;
      store(e, load(e) * share);
      store(y, load(y) <= splat(kCut) ? masked : load(y) - lse);
    }
  }
}

// sum over r_i > r_j of delta |G_i - G_j| log2(1 + exp(sigma (score_i - score_j))), d_score [padded] its gradient;
// score [padded] is finite on pads; room [3, padded].
static float pairwise_lambda(const List& list, const float* score, float sigma, int64_t padded, float* d_score,
                             float* room) {
  const ListwiseArgs& args = list.args;
  const int64_t m = args.sizes[list.l];
  float* rating = room;
  float* gain = room + padded;
  int32_t* rank = reinterpret_cast<int32_t*>(room + 2 * padded);
  const vf one = splat(1.0f), ungraded = splat(__builtin_nanf(""));
  const vi lane = lane_numbers();
  const bool small = args.width < 32;
  for (int64_t c = 0; c < padded; c += kLanes) {
    vf r = c < m ? load_some(args.ratings + list.l * args.width + c, m - c, ungraded) : ungraded;
    vf x = r * splat(0.693147180559945f);
    vf g = exponential(x > splat(88.0f) ? splat(88.0f) : x) - one;
    store(rating + c, r);
    g = r == r ? g : vf{};
    store(gain + c, lane + int32_t(c) < vi{} + int32_t(args.width) ? g : splat(kMasked));  // sorts last
    store(d_score + c, vf{});
  }
  for (int64_t i = 0; i < padded; ++i) rank[i] = i < m ? int32_t(list.ranks()[i]) : 1;

  vf ideal_sum = vf{};  // of gains in descending order, each over its discount; every entry of the list counts a place
  for (int64_t c = 0; c < padded; c += kLanes) {
    const vf own = load(gain + c);
    const vi number = lane + int32_t(c);
    vi place = vi{} + 1;
    for (int64_t j = 0; j < args.width && j < padded; ++j) {
      const vf other = splat(gain[j]);
      place -= (other > own) | ((other == own) & (number > vi{} + int32_t(j)));  // true is -1
    }
    place += (own < vf{}) & vi{} + int32_t(args.width > padded ? args.width - padded : 0);
    const vi last = vi{} + int32_t(args.width);
    ideal_sum += own > splat(kCut) ? own * look_up(args.discount, place > last ? last : place, small) : vf{};
  }
  const float ideal = sum_lanes(ideal_sum);
  const vf per_ideal = splat(ideal > 0 ? 1.0f / ideal : 1.0f);

  vf loss = vf{};
  for (int64_t i = 0; i < m; ++i) {
    if (!(rating[i] == rating[i])) continue;
    vf pulled = vf{};
    for (int64_t c = 0; c < padded; c += kLanes) {
      vi better = splat(rating[i]) > load(rating + c);
      vi distance = vi{} + rank[i] - *reinterpret_cast<const vi*>(rank + c);
      distance = distance < 0 ? -distance : distance;
      vf delta = look_up(args.delta, distance, small);
      vf apart = (splat(gain[i]) - load(gain + c)) * per_ideal;
      vf weight = better ? delta * apart * splat(1.44269504088896341f) : vf{};  // a better rating has the larger gain
      vf margin = splat(sigma) * (splat(score[i]) - load(score + c));
      vf small = exponential(margin < vf{} ? margin : -margin);  // exp(-|margin|)
      vf sum = one + small, inverse = one / sum;
      vf log_sum = logarithm(sum) + (small - (sum - one)) * inverse;  // log1p(small)
      loss += weight * ((margin > vf{} ? margin : vf{}) + log_sum);
      vf pull = splat(sigma) * weight * ((margin < vf{} ? small : one) * inverse);
      pulled += pull;
      store(d_score + c, load(d_score + c) - pull);
    }
    d_score[i] += sum_lanes(pulled);
  }
  return sum_lanes(loss);
}

// `ratings` form: scores are expected grades, higher is better.
static void grade_lambda(const List& list, int64_t padded, const float* p, float* work, float* room) {
  const ListwiseArgs& args = list.args;
  const int64_t wide = whole_vectors(list.rows);
  float* score = room;
  float* d_score = room + wide;
  for (int64_t i = 0; i < wide; ++i) score[i] = 0;
  for (int64_t i = 0; i < list.rows; ++i) {
    vf sum = vf{};
    for (int64_t c = 0; c < list.columns; c += kLanes)
      sum += load(p + i * padded + c) * load_some(args.values + c, list.columns - c, vf{});
    score[i] = sum_lanes(sum);
  }
  args.soft_lambda[list.l] = pairwise_lambda(list, score, -args.sigma, wide, d_score, room + 2 * wide);
  for (int64_t i = 0; i < list.rows; ++i) {
    for (int64_t c = 0; c < list.columns; c += kLanes) {
      vf value = load_some(args.values + c, list.columns - c, vf{});
      store(work + c, splat(d_score[i]) * load(p + i * padded + c) * (value - splat(score[i])));
    }
    put_row(list, work, args.d_soft_lambda + list.at(i));
  }
}

// `ranking` form: scores are expected slots, lower is better. work [rows, padded] is free.
static void slot_lambda(const List& list, int64_t padded, const float* log_p, const float* p, float* work,
                        float* room) {
  const ListwiseArgs& args = list.args;
  const int64_t m = list.rows;
  float* score = room;
  float* d_score = room + padded;
  const vf gamma = splat(args.gamma);
  for (int64_t c = 0; c < padded; c += kLanes) {
    const int64_t left = m - c;
    auto sharpened = [&](int64_t k) __attribute__((always_inline)) {
      if (args.normalise) return gamma * load(log_p + k * padded + c);
      return left > 0 ? gamma * load_some(args.logits + list.at(k) + c, left, vf{}) : vf{};
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
    const vf inverse = splat(1.0f) / total;
    const vi used = lane_numbers() < vi{} + int32_t(left);
    const vf mean = used ? moment * inverse : vf{};
    store(score + c, mean);
    for (int64_t k = 0; k < m; ++k) {  // the derivative of `score`
      float* at = work + k * padded + c;
      store(at, used ? gamma * load(at) * inverse * (splat(float(k + 1)) - mean) : vf{});
    }
  }
  args.soft_lambda[list.l] = pairwise_lambda(list, score, args.sigma, padded, d_score, room + 2 * padded);
  for (int64_t k = 0; k < m; ++k) {
    float* row = work + k * padded;
    vf sum = vf{};
    for (int64_t c = 0; c < padded; c += kLanes) {
      vf d = load(d_score + c) * load(row + c);
      store(row + c, d);
      sum += d;
    }
    if (args.normalise) {
      const vf all = splat(sum_lanes(sum));
      for (int64_t c = 0; c < padded; c += kLanes) store(row + c, load(row + c) - load(p + k * padded + c) * all);
    }
    put_row(list, row, args.d_soft_lambda + list.at(k));
  }
}

// D(P, Q) of one row and its gradients times `weight`; columns masked in either are left out.
ALRO_INLINE float divergence_row(Divergence kind, int64_t padded, const float* log_p, const float* p,
                                 const float* log_q, const float* q, float weight, float* d_student, float* d_teacher) {
  const vf cut = splat(kCut), w = splat(weight);
  const bool both = kind == Divergence::symmetric;
  vf forward = vf{}, backward = vf{};
  for (int64_t c = 0; c < padded; c += kLanes) {
    vf a = load(log_p + c), b = load(log_q + c);
    vi masked = (a < cut) | (b < cut);
    vf ratio = masked ? vf{} : (kind == Divergence::ce ? -b : a - b);
    forward += load(p + c) * ratio;
    if (both) backward -= load(q + c) * ratio;
  }
  const vf f = splat(sum_lanes(forward)), g = both ? splat(sum_lanes(backward)) : vf{};
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

// work: log_q, q of the list itself (without masks), then three free [rows, padded]
static void permutation(const List& list, int64_t padded, float* const* work, float* room) {
  const ListwiseArgs& args = list.args;
  const List teacher(args, args.twin[list.l]);
  float *log_q = work[0], *q = work[1], *log_p = work[2], *p = work[3];
  const bool emitted = args.mask_emitted && !args.values;
  if (emitted) softmax_rows(list, true, padded, log_q, q, room);
  softmax_rows(teacher, emitted, padded, log_p, p, room);
  const int64_t compared = args.values ? list.rows : list.rows - 1;
  float* d_student = work[4];
  float* d_teacher = work[4] + padded;
  float sum = 0;
  for (int64_t k = 0; k < list.rows; ++k) {
    if (k < compared && k < teacher.rows) {
      const int64_t at = k * padded;
      sum += divergence_row(args.divergence, padded, log_p + at, p + at, log_q + at, q + at, 1.0f / float(compared),
                            d_student, d_teacher);
    } else {
      for (int64_t c = 0; c < padded; c += kLanes) store(d_student + c, vf{}), store(d_teacher + c, vf{});
    }
    put_row(list, d_student, args.d_student + list.at(k));
    if (args.d_teacher) put_row(list, d_teacher, args.d_teacher + list.at(k));
  }
  args.permutation[list.l] = compared > 0 ? sum / float(compared) : 0.0f;
}

ALRO_INLINE void clear_rows(const List& list, int64_t begin, float* to) {
  const int64_t cells = (list.args.rows - begin) * list.args.columns;
  if (cells > 0) memset(to + list.at(begin), 0, sizeof(float) * cells);
}

static void listwise(const ListwiseArgs& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t widest = ((args.columns > args.width ? args.columns : args.width) + 63) / 64 * 64;
  float* work[5];
  for (int i = 0; i < 5; ++i) work[i] = scratch + i * (args.rows + 2) * widest;
  float* room = scratch + 5 * (args.rows + 2) * widest;
  for (int64_t l = begin; l < end; ++l) {
    const List list(args, l);
    const bool compare = args.divergence != Divergence::none && args.twin[l] >= 0;
    int64_t padded = whole_vectors(list.columns);
    if (compare) {  // one width for both
      const int64_t twin_padded = whole_vectors(List(args, args.twin[l]).columns);
      padded = twin_padded > padded ? twin_padded : padded;
    }
    clear_rows(list, list.rows, args.d_soft_lambda);
    clear_rows(list, compare ? list.rows : 0, args.d_student);
    if (args.d_teacher) clear_rows(list, compare ? list.rows : 0, args.d_teacher);
    args.permutation[l] = 0;
    softmax_rows(list, false, padded, work[0], work[1], room);
    if (args.values) grade_lambda(list, padded, work[1], work[2], room);
    else slot_lambda(list, padded, work[0], work[1], work[2], room);
    float* expected = args.expected + l * args.width;  // `room` begins with the scores
    for (int64_t i = 0; i < args.width; ++i) expected[i] = i < list.rows ? room[i] : 0.0f;
    if (compare) permutation(list, padded, work, room);
  }
}

}  // namespace alro::ALRO_ISA
