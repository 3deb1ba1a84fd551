// RMS norm, gated activation and rotary position embedding on rows; T is the storage: float, or uint16_t for bfloat16.
#pragma once

#include <cmath>

#include "common/simd.h"
#include "layers/layers.h"

namespace alro::ALRO_ISA {

typedef uint32_t vu __attribute__((vector_size(4 * ALRO_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * ALRO_LANES)));

template <class T>
ALRO_INLINE const T* row_of(const Rows& m, int64_t row) {
  return static_cast<const T*>(m.data) + row * m.stride;
}
template <class T>
ALRO_INLINE T* own_row_of(const Rows& m, int64_t row) {
  return static_cast<T*>(m.data) + row * m.stride;
}

ALRO_INLINE vf from_storage(const float* p) { return load_any(p); }
ALRO_INLINE vf from_storage(const uint16_t* p) {
  vh half;
  memcpy(&half, p, sizeof half);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}
ALRO_INLINE void to_storage(float* p, vf x) { store_any(p, x); }
ALRO_INLINE void to_storage(uint16_t* p, vf x) {  // to nearest, ties to even
  const vu bits = (vu)x;
  const vu rounded = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : vu{} + 0x7fc0;
  const vh half = __builtin_convertvector(rounded, vh);
  memcpy(p, &half, sizeof half);
}

// The first n elements, at most a vector of them, zeros behind; nothing beyond is read or written.
template <class T>
ALRO_INLINE vf get(const T* p, int64_t n) {
  if (n >= kLanes) return from_storage(p);
  T room[kLanes] = {};
  memcpy(room, p, n * sizeof(T));
  return from_storage(room);
}
template <class T>
ALRO_INLINE void put(T* p, vf x, int64_t n) {
  if (n >= kLanes) {
    to_storage(p, x);
    return;
  }
  T room[kLanes];
  to_storage(room, x);
  memcpy(p, room, n * sizeof(T));
}

// f(start, how many of the vector's lanes are columns)
template <class F>
ALRO_INLINE void along(int64_t columns, F f) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) f(i, int64_t(kLanes));
  if (i < columns) f(i, columns - i);
}

template <class T>
static void norm_rows(const NormArgs& args, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(args.weight);
  const vf offset = splat(args.offset);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(args.x, row);
    T* y = own_row_of<T>(args.y, row);
    vf even{}, odd{};
    along(args.columns, [&](int64_t i, int64_t n) {
      const vf value = get(x + i, n);
      const vf before = even;  // two sums in turn: neither waits for the other
      even = odd + value * value;
      odd = before;
    });
    const float scale = 1.0f / std::sqrt(sum_lanes(even + odd) / float(args.columns) + args.eps);
    args.scale[row] = scale;
    along(args.columns,
          [&](int64_t i, int64_t n) { put(y + i, get(x + i, n) * splat(scale) * (get(weight + i, n) + offset), n); });
  }
}

// With n = scale x and u = dy (weight + offset):  dx = scale (u - n mean(u n)),  dweight = sum over rows of dy n
template <class T>
static void norm_backward_rows(const NormArgs& args, int64_t begin, int64_t end, float* d_weight) {
  const T* weight = static_cast<const T*>(args.weight);
  const vf offset = splat(args.offset);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(args.x, row);
    const T* d_y = row_of<T>(args.y, row);
    T* d_x = own_row_of<T>(args.d_x, row);
    const float scale = args.scale[row];
    vf even{}, odd{};
    along(args.columns, [&](int64_t i, int64_t n) {
      const vf product = get(d_y + i, n) * get(x + i, n);
      if (d_weight) store(d_weight + i, load(d_weight + i) + product * splat(scale));
      const vf before = even;
      even = odd + product * (get(weight + i, n) + offset);
      odd = before;
    });
    const vf share = splat(scale * scale * (sum_lanes(even + odd) / float(args.columns)));
    along(args.columns, [&](int64_t i, int64_t n) {
      const vf u = get(d_y + i, n) * (get(weight + i, n) + offset);
      put(d_x + i, splat(scale) * (u - get(x + i, n) * share), n);
    });
  }
}

// Both activations are gate * sigmoid(w(gate)).
template <Activation A>
struct Argument {
  vf value, slope;
};
template <Activation A>
ALRO_INLINE Argument<A> argument(vf gate) {
  if (A == Activation::silu) return {gate, splat(1.0f)};
  const vf twice = splat(1.5957691216057308f), cubic = splat(0.044715f), square = gate * gate;  // 2 sqrt(2 / pi)
  return {twice * gate * (splat(1.0f) + cubic * square), twice * (splat(1.0f) + splat(3.0f) * cubic * square)};
}
ALRO_INLINE vf exponential_of_minus(vf x) {
  const vf negative = -x;
  return exponential(negative > splat(88.0f) ? splat(88.0f) : negative);
}

template <class T, Activation A>
static void gated_rows(const GatedArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = row_of<T>(args.gate, row), *up = row_of<T>(args.up, row);
    T* y = own_row_of<T>(args.y, row);
    along(args.columns, [&](int64_t i, int64_t n) {
      const vf g = get(gate + i, n);
      put(y + i, g / (splat(1.0f) + exponential_of_minus(argument<A>(g).value)) * get(up + i, n), n);
    });
  }
}

template <class T, Activation A>
static void gated_backward_rows(const GatedArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = row_of<T>(args.gate, row), *up = row_of<T>(args.up, row), *d_y = row_of<T>(args.y, row);
    T *d_gate = own_row_of<T>(args.d_gate, row), *d_up = own_row_of<T>(args.d_up, row);
    along(args.columns, [&](int64_t i, int64_t n) {
      const vf g = get(gate + i, n), grad = get(d_y + i, n);
      const Argument<A> w = argument<A>(g);
      const vf e = exponential_of_minus(w.value);
      const vf s = splat(1.0f) / (splat(1.0f) + e);  // the sigmoid; e s is 1 - s without the cancellation
      put(d_gate + i, grad * get(up + i, n) * s * (splat(1.0f) + g * (e * s) * w.slope), n);
      put(d_up + i, grad * g * s, n);
    });
  }
}

template <class T>
static void rotary_rows(const RotaryArgs& args, int64_t begin, int64_t end) {
  const int64_t half = args.width / 2;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t batch = at / args.rows, row = at % args.rows;
    const T* cos = static_cast<const T*>(args.cos) + batch * args.cos_batch_stride + row * args.cos_row_stride;
    const T* sin = static_cast<const T*>(args.sin) + batch * args.sin_batch_stride + row * args.sin_row_stride;
    const T* x = static_cast<const T*>(args.x.data) + batch * args.x.batch_stride + row * args.x.row_stride;
    T* y = static_cast<T*>(args.y.data) + batch * args.y.batch_stride + row * args.y.row_stride;
    for (int64_t head = 0; head < args.heads; ++head, x += args.x.head_stride, y += args.y.head_stride)
      along(half, [&](int64_t i, int64_t n) {
        const vf a = get(x + i, n), b = get(x + half + i, n);
        const vf sin_a = get(sin + i, n), sin_b = get(sin + half + i, n);
        const vf from_b = args.transpose ? sin_b : -sin_a, from_a = args.transpose ? -sin_a : sin_b;
        put(y + i, a * get(cos + i, n) + b * from_b, n);
        put(y + half + i, b * get(cos + half + i, n) + a * from_a, n);
      });
  }
}

static void norm_any(const NormArgs& args, int64_t begin, int64_t end) {
  (args.dtype == DType::f32 ? norm_rows<float> : norm_rows<uint16_t>)(args, begin, end);
}
static void norm_backward_any(const NormArgs& args, int64_t begin, int64_t end, float* d_weight) {
  (args.dtype == DType::f32 ? norm_backward_rows<float> : norm_backward_rows<uint16_t>)(args, begin, end, d_weight);
}
static void gated_any(const GatedArgs& args, int64_t begin, int64_t end) {
  const bool f32 = args.dtype == DType::f32;
  if (args.activation == Activation::silu)
    (f32 ? gated_rows<float, Activation::silu> : gated_rows<uint16_t, Activation::silu>)(args, begin, end);
  else (f32 ? gated_rows<float, Activation::gelu_tanh> : gated_rows<uint16_t, Activation::gelu_tanh>)(args, begin, end);
}
static void gated_backward_any(const GatedArgs& args, int64_t begin, int64_t end) {
  const bool f32 = args.dtype == DType::f32;
  if (args.activation == Activation::silu)
    (f32 ? gated_backward_rows<float, Activation::silu> : gated_backward_rows<uint16_t, Activation::silu>)(args, begin,
                                                                                                           end);
  else
    (f32 ? gated_backward_rows<float, Activation::gelu_tanh>
         : gated_backward_rows<uint16_t, Activation::gelu_tanh>)(args, begin, end);
}

static void rotary_any(const RotaryArgs& args, int64_t begin, int64_t end) {
  (args.dtype == DType::f32 ? rotary_rows<float> : rotary_rows<uint16_t>)(args, begin, end);
}

static const LayerKernels layer_table = {norm_any, norm_backward_any, gated_any, gated_backward_any, rotary_any};

}  // namespace alro::ALRO_ISA
