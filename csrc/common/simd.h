// Vectors of ALRO_LANES floats, written with the compiler's vector extensions so that one source serves AVX-512, AVX2,
// SSE2 and NEON. Everything lives in a namespace of its own per instruction set: two copies of one inline function,
// compiled with different flags, must never be merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace alro::ALRO_ISA {

constexpr int kLanes = ALRO_LANES;

typedef float vf __attribute__((vector_size(4 * ALRO_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * ALRO_LANES)));
typedef float vfu __attribute__((vector_size(4 * ALRO_LANES), aligned(4)));  // at any address

#define ALRO_INLINE static inline __attribute__((always_inline))
#define ALRO_UNROLL _Pragma("GCC unroll 32")

ALRO_INLINE vf splat(float x) { return vf{} + x; }
ALRO_INLINE vf broadcast(const float* p) {  // the word at p, whatever its bits stand for
  int32_t word;
  memcpy(&word, p, sizeof word);
  return (vf)(vi{} + word);
}
ALRO_INLINE vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
ALRO_INLINE void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }
ALRO_INLINE vf load_any(const float* p) { return *reinterpret_cast<const vfu*>(p); }
ALRO_INLINE void store_any(float* p, vf x) { *reinterpret_cast<vfu*>(p) = x; }
ALRO_INLINE vf maximum(vf a, vf b) {  // a > b ? a : b, so b where one of them is NaN
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

ALRO_INLINE bool any_above(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLE_UQ)) != 0;
#else
  vi above = ~(a <= b);
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= above[i];
  return any != 0;
#endif
}

ALRO_INLINE float sum_lanes(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

ALRO_INLINE float largest_lane(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#elif defined(__AVX2__)
  __m128 half = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
#else
  const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
#endif
}

ALRO_INLINE vi lane_numbers() {
  vi x;
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

// The first n lanes (all, where n >= kLanes); nothing beyond them is read or written.
ALRO_INLINE vf load_some(const float* p, int64_t n, vf otherwise) {
  if (n >= kLanes) return load_any(p);
#if defined(__AVX512F__)
  return (vf)_mm512_mask_loadu_ps((__m512)otherwise, (__mmask16)((1u << n) - 1), p);
#elif defined(__AVX2__)
  const vi mask = lane_numbers() < vi{} + int32_t(n);
  return mask ? (vf)_mm256_maskload_ps(p, (__m256i)mask) : otherwise;
#else
  for (int i = 0; i < n; ++i) otherwise[i] = p[i];
  return otherwise;
#endif
}

ALRO_INLINE void store_some(float* p, vf x, int64_t n) {
  if (n >= kLanes) {
    store_any(p, x);
    return;
  }
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, (__m256i)(lane_numbers() < vi{} + int32_t(n)), (__m256)x);
#else
  for (int i = 0; i < n; ++i) p[i] = x[i];
#endif
}

// rows[i][j] and rows[j][i] change places: at every power of two, halves of neighbouring blocks do
#if defined(__clang__)
#define ALRO_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ALRO_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif
template <int S, int... J>
ALRO_INLINE void swap_blocks(vf* rows, std::integer_sequence<int, J...> lanes) {
  ALRO_UNROLL for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const vf a = rows[i], b = rows[i + S];
    rows[i] = ALRO_SHUFFLE(a, b, (J & S ? kLanes + J - S : J)...);
    rows[i + S] = ALRO_SHUFFLE(a, b, (J & S ? kLanes + J : J + S)...);
  }
  if constexpr (2 * S < kLanes) swap_blocks<2 * S>(rows, lanes);
}
ALRO_INLINE void transpose(vf* rows) { swap_blocks<1>(rows, std::make_integer_sequence<int, kLanes>()); }
#undef ALRO_SHUFFLE

// table[index]; a table has at least 32 entries, and `small` says that no index is above 31
ALRO_INLINE vf look_up(const float* table, vi index, bool small) {
#if defined(__AVX512F__)
  if (small) return (vf)_mm512_permutex2var_ps(_mm512_loadu_ps(table), (__m512i)index, _mm512_loadu_ps(table + 16));
  return (vf)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(__AVX2__)
  (void)small;
  return (vf)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
  (void)small;
  vf x;
  for (int i = 0; i < kLanes; ++i) x[i] = table[index[i]];
  return x;
#endif
}

// exp(x) to 1 ulp or so for x <= 88, 0 below -87.3; NaN stays NaN.
ALRO_INLINE vf exponential(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  vf clamped = maximum(splat(-87.33654f), x);
  vf shifted = clamped * splat(1.44269504088896341f) + magic;
  vf n = shifted - magic;
  vf r = clamped - n * splat(0.693359375f);
  r = r + n * splat(2.12194440e-4f);
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  vi bits = ((vi)shifted - (vi)magic + 127) << 23;
  vf power = (vf)bits;
  return x < splat(-87.33654f) ? vf{} : p * power;
}

// log(x) for normal x > 0 (Cephes)
ALRO_INLINE vf logarithm(vf x) {
  vi bits = (vi)x;
  vi exponent = (bits - 0x3f3504f3) >> 23;  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
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
  vf y = m + p + e * splat(0.693359375f);
  return x == x ? y : x;  // NaN stays NaN
}

// tanh(x) to a few ulp: an odd polynomial near 0 (Cephes), 1 - 2 / (exp(2|x|) + 1) elsewhere.
ALRO_INLINE vf hyperbolic_tangent(vf x) {
  vf size = x < vf{} ? -x : x;
  vf capped = size > splat(10.0f) ? splat(10.0f) : size;
  vf far = splat(1.0f) - splat(2.0f) / (exponential(capped + capped) + splat(1.0f));
  far = x < vf{} ? -far : far;
  vf s = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * s + splat(2.06390887954e-2f);
  p = p * s + splat(-5.37397155531e-2f);
  p = p * s + splat(1.33314422036e-1f);
  p = p * s + splat(-3.33332819422e-1f);
  vf near = p * s * x + x;
  return size < splat(0.625f) ? near : far;
}

}  // namespace alro::ALRO_ISA
