// Row-wise arithmetic: exp2, GELU, LayerNorm, and the conversion of rows into matrix-product operands.
//
//   gelu(x) = x Phi(x), Phi(x) = 1/2 + h(x), h odd. For |x| < 5.3, h = x P(x^2)/Q(x^2), a degree-(5,5) minimax fit
//   (max |error| of Phi 3.2e-8); beyond, |h| = 1/2 exactly. Written as |x| h(|x|) + x/2 so that the left tail
//   cancels to 0. Error of gelu <= 2.3e-7 max(1, |x|): two thirds of torch's float32 erf form.
//   LayerNorm: y = (x - mean) / sqrt(var + eps) w + b, two passes over a row that stays in L1, float32 throughout.
//   u8 rows: x = scale q + offset with offset = min(x), scale = (max(x) - min(x)) / 255. The float offset needs no
//   zero point, and one-sided rows (after GELU) keep all 8 bits. NaN or infinity anywhere makes the scale NaN.
#pragma once
#include "kernels.h"
#include "units.h"

namespace vf::VF_ISA {

VF_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
VF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
VF_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// 2^x for x <= 127; below -126 the result is 2^-126, not 0. Minimax fit with p(0) = 1, relative error 8e-8 in floats.
VF_INLINE F exp2_clamped(F x) {
  F f, n;
  split_exp2(max(set1(-126.f), x), f, n);
  F p = fma(set1(1.53533620e-4f), f, set1(1.33988739e-3f));
  p = fma(p, f, set1(9.61843692e-3f));
  p = fma(p, f, set1(5.55033237e-2f));
  p = fma(p, f, set1(2.40226477e-1f));
  p = fma(p, f, set1(6.93147182e-1f));
  p = fma(p, f, set1(1.f));
  return scale_exp2(p, n);
}

// |h(x)| of |x| = magnitude
VF_INLINE F gelu_half(F magnitude) {
  const F limit = set1(5.3f), half = set1(0.5f);
  const F t = min(limit, magnitude), u = t * t;
  F p = set1(2.8033593224563447e-08f), q = set1(1.3603314528154442e-06f);
  p = fma(p, u, set1(6.471489086834481e-06f));
  q = fma(q, u, set1(6.431622750824317e-05f));
  p = fma(p, u, set1(1.3382786710280925e-04f));
  q = fma(q, u, set1(1.6845399513840675e-03f));
  p = fma(p, u, set1(4.469434265047312e-03f));
  q = fma(q, u, set1(2.653665281832218e-02f));
  p = fma(p, u, set1(3.005356155335903e-02f));
  q = fma(q, u, set1(2.4199934303760529e-01f));
  p = fma(p, u, set1(3.989422023296356e-01f));
  q = fma(q, u, set1(1.f));
  return select_lt(magnitude, limit, t * p / q, half);
}

VF_INLINE F gelu(F x) {
  const F magnitude = abs(x);
  return fma(magnitude, gelu_half(magnitude), set1(0.5f) * x);
}

// d gelu(x) / dx = Phi(x) + x phi(x); phi is taken for 0 beyond 13, where exp2_clamped no longer falls.
VF_INLINE F gelu_slope(F x) {
  const F magnitude = abs(x), h = gelu_half(magnitude), zero = set1(0), far = set1(13.f);
  const F phi = set1(0.3989422804f) * exp2_clamped(min(far * far, x * x) * set1(-0.72134752f));
  return set1(0.5f) + select_lt(x, zero, zero - h, h) + select_lt(far, magnitude, zero, x * phi);
}

// ---- rows of any stored type as floats ----------------------------------------------------------------------------
VF_INLINE F load_any(const void* p, int dtype, int64_t i, int n) {
  if (n == kLanes) return dtype == BF16 ? load((const bf16*)p + i) : load((const float*)p + i);
  return dtype == BF16 ? load((const bf16*)p + i, n) : load((const float*)p + i, n);
}
VF_INLINE float load_one(const void* p, int dtype, int64_t i) {
  if (dtype != BF16) return ((const float*)p)[i];
  const uint32_t u = (uint32_t)((const bf16*)p)[i] << 16;
  float x;
  memcpy(&x, &u, 4);
  return x;
}
VF_INLINE const void* advance(const void* p, int dtype, int64_t elements) {
  return (const char*)p + elements * (dtype == BF16 ? 2 : 4);
}
VF_INLINE void store_any(void* p, int dtype, int64_t i, F x, int n) {
  if (dtype == BF16) {
    if (n == kLanes) store((bf16*)p + i, x);
    else store((bf16*)p + i, x, n);
  } else {
    if (n == kLanes) store((float*)p + i, x);
    else store((float*)p + i, x, n);
  }
}

// ---- LayerNorm ----------------------------------------------------------------------------------------------------
struct Moments {
  float mean, rstd;  // rstd = 1 / sqrt(var + eps)
};

[[maybe_unused]] static Moments moments(const float* x, float eps, int64_t D) {
  F s0 = set1(0), s1 = set1(0);
  int64_t i = 0;
  for (; i + 2 * kLanes <= D; i += 2 * kLanes) {
    s0 = s0 + load(x + i);
    s1 = s1 + load(x + i + kLanes);
  }
  for (; i < D; i += kLanes) s0 = s0 + load(x + i, (int)min64(kLanes, D - i));
  const float average = reduce_add(s0 + s1) / (float)D;
  const F mean = set1(average);
  s0 = s1 = set1(0);
  for (i = 0; i + 2 * kLanes <= D; i += 2 * kLanes) {
    const F c0 = load(x + i) - mean, c1 = load(x + i + kLanes) - mean;
    s0 = fma(c0, c0, s0);
    s1 = fma(c1, c1, s1);
  }
  for (; i < D; i += kLanes) {
    const int n = (int)min64(kLanes, D - i);
    const F c = keep_first(load(x + i, n) - mean, n);
    s0 = fma(c, c, s0);
  }
  return {average, 1.f / sqrtf(reduce_add(s0 + s1) / (float)D + eps)};
}

[[maybe_unused]] static Moments layer_norm(const float* x, Param w, Param b, float eps, int64_t D, void* y,
                                           int dtype = F32) {
  const Moments m = moments(x, eps, D);
  const F mean = set1(m.mean), rstd = set1(m.rstd);
  for (int64_t i = 0; i < D; i += kLanes) {
    const int n = (int)min64(kLanes, D - i);
    F v = (load_any(x, F32, i, n) - mean) * rstd;
    v = v * (w.data ? load_any(w.data, w.dtype, i, n) : set1(1.f));
    if (b.data) v = v + load_any(b.data, b.dtype, i, n);
    store_any(y, dtype, i, v, n);
  }
  return m;
}

// ---- a row as the left operand of a product: K values -> ceil(K / kUnit) units, padded with zeros ------------------
template <class T>
static void to_units(const void* x, int dtype, int64_t K, uint32_t* out, float* scale, float* offset);

template <>
[[maybe_unused]] void to_units<f32>(const void* x, int dtype, int64_t K, uint32_t* out, float*, float*) {
  for (int64_t i = 0; i < K; i += kLanes) {
    const int n = (int)min64(kLanes, K - i);
    store_any(out, F32, i, load_any(x, dtype, i, n), n);
  }
}

template <>
[[maybe_unused]] void to_units<bf16x2>(const void* x, int dtype, int64_t K, uint32_t* out, float*, float*) {
  bf16* y = (bf16*)out;
  if (K & 1) y[K] = 0;
  if (dtype == BF16) {
    memcpy(y, x, (size_t)K * 2);
    return;
  }
  for (int64_t i = 0; i < K; i += kLanes) {
    const int n = (int)min64(kLanes, K - i);
    store_any(y, BF16, i, load_any(x, F32, i, n), n);
  }
}

template <>
[[maybe_unused]] void to_units<u8s8x4>(const void* x, int dtype, int64_t K, uint32_t* out, float* scale,
                                       float* offset) {
  const F first_value = set1(load_one(x, dtype, 0));
  F lo = first_value, hi = first_value, poison = set1(0);
  for (int64_t i = 0; i < K; i += kLanes) {
    const int n = (int)min64(kLanes, K - i);
    F v = load_any(x, dtype, i, n);
    poison = fma(v, set1(0), poison);
    if (n < kLanes) v = v + (first_value - keep_first(first_value, n));  // absent lanes must not count as zeros
    lo = min(lo, v);
    hi = max(hi, v);
  }
  const float low = -reduce_max(set1(0) - lo), high = reduce_max(hi);
  const float range = high - low;
  const float inverse = range > 0 ? 255.f / range : 0.f;
  const F factor = set1(inverse), base = set1(-low * inverse);  // a value just below 0 still rounds to 0
  uint8_t* y = (uint8_t*)out;
  int64_t i = 0;
  for (; i + kLanes <= K; i += kLanes) store_u8(y + i, round_int(fma(load_any(x, dtype, i, kLanes), factor, base)));
  if (i < K) {
    alignas(16) uint8_t t[16];
    store_u8(t, round_int(fma(load_any(x, dtype, i, (int)(K - i)), factor, base)));
    memcpy(y + i, t, (size_t)(K - i));
  }
  for (i = K; i % 4; ++i) y[i] = 0;
  *scale = range / 255.f + reduce_add(poison);
  *offset = low;
}

}  // namespace vf::VF_ISA
