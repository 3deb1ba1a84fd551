// Vectors of ALRO_LANES floats, written with the compiler's vector extensions so that one source serves AVX-512, AVX2,
// SSE2 and NEON. Everything lives in a namespace of its own per instruction set: two copies of one inline function,
// compiled with different flags, must never be merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>
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
ALRO_INLINE vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
ALRO_INLINE void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }
ALRO_INLINE vf load_any(const float* p) { return *reinterpret_cast<const vfu*>(p); }
ALRO_INLINE void store_any(float* p, vf x) { *reinterpret_cast<vfu*>(p) = x; }
ALRO_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }

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
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// exp(x) to 1 ulp or so for x <= 88, 0 below -87.3; NaN stays NaN.
ALRO_INLINE vf exponential(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  vf clamped = x < splat(-87.33654f) ? splat(-87.33654f) : x;
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
