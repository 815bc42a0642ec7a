// Vectors for one instruction-set level: a handful of functions, written once per level, that all kernels are made of.
//
// VF_ISA names the namespace (generic, avx2, avx512, avx512_bf16) and VF_LEVEL (0..3) picks the section below.
//   F  kLanes floats          I  kLanes int32          (+ - * / work on F: GCC/Clang vector types)
// Everything here has internal linkage, so copies built with different flags can never be merged by the linker.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if VF_LEVEL > 0
#include <immintrin.h>
#endif

#define VF_INLINE static inline __attribute__((always_inline))

namespace vf::VF_ISA {

using bf16 = uint16_t;

// ---- AVX-512 ------------------------------------------------------------------------------------------------------
#if VF_LEVEL >= 2
constexpr int kLanes = 16;
constexpr int kTileRows = 6, kTileVecs = 4;  // 24 accumulators + 4 B vectors + 1 broadcast of 32 registers
using F = __m512;
using I = __m512i;

VF_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
VF_INLINE F set1(float x) { return _mm512_set1_ps(x); }
VF_INLINE I seti(int32_t x) { return _mm512_set1_epi32(x); }
VF_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
VF_INLINE F load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
VF_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
VF_INLINE void store(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
VF_INLINE I loadi(const void* p) { return _mm512_loadu_si512(p); }
VF_INLINE void storei(void* p, I x) { _mm512_storeu_si512(p, x); }
VF_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
VF_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }  // NaN in b propagates
VF_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }  // NaN in b propagates
VF_INLINE F abs(F x) { return _mm512_abs_ps(x); }
VF_INLINE F keep_first(F x, int n) { return _mm512_maskz_mov_ps(first(n), x); }
VF_INLINE F select_lt(F a, F b, F yes, F no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
VF_INLINE float reduce_add(F x) { return _mm512_reduce_add_ps(x); }
VF_INLINE float reduce_max(F x) { return _mm512_reduce_max_ps(x); }
VF_INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
VF_INLINE I round_int(F x) { return _mm512_cvtps_epi32(x); }
VF_INLINE F as_float(I x) { return _mm512_castsi512_ps(x); }
VF_INLINE I as_int(F x) { return _mm512_castps_si512(x); }
VF_INLINE void split_exp2(F x, F& fraction, F& whole) {
  whole = _mm512_roundscale_ps(x, 8);  // nearest even, no exceptions
  fraction = x - whole;
}
VF_INLINE F scale_exp2(F x, F whole) { return _mm512_scalef_ps(x, whole); }
VF_INLINE F from_bf16(__m256i h) { return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
VF_INLINE __m256i to_bf16(F x) {
#if VF_LEVEL >= 3
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const I u = as_int(x);
  const I lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), seti(1));
  const I r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(seti(0x7fff), lsb)), 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), seti(0x7fc0)));
#endif
}
VF_INLINE F load(const bf16* p) { return from_bf16(_mm256_loadu_si256((const __m256i*)p)); }
VF_INLINE F load(const bf16* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
VF_INLINE void store(bf16* p, F x) { _mm256_storeu_si256((__m256i*)p, to_bf16(x)); }
VF_INLINE void store(bf16* p, F x, int n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(x)); }
VF_INLINE void store_u8(uint8_t* p, I x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtusepi32_epi8(x)); }  // 0 <= x
// Units {even[i], odd[i]} of two bf16 rows: key pairs for the product with V.
VF_INLINE I interleave_bf16(const bf16* even, const bf16* odd) {
  const I e = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
  const I o = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)odd));
  return _mm512_or_si512(e, _mm512_slli_epi32(o, 16));
}
VF_INLINE I interleave_bf16(F even, F odd) {  // rounded
#if VF_LEVEL >= 3
  const I both = (I)_mm512_cvtne2ps_pbh(odd, even);  // 16 of even, then 16 of odd
  const __m256i e = _mm512_castsi512_si256(both), o = _mm512_extracti64x4_epi64(both, 1);
#else
  const __m256i e = to_bf16(even), o = to_bf16(odd);
#endif
  return _mm512_or_si512(_mm512_cvtepu16_epi32(e), _mm512_slli_epi32(_mm512_cvtepu16_epi32(o), 16));
}
// A Chunk is kChunk consecutive units of one matrix row; see pack() in gemm.h.
using Chunk = __m256i;
constexpr int kChunk = 8;
VF_INLINE Chunk load_chunk(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
VF_INLINE Chunk round_chunk(const float* p) { return to_bf16(load(p)); }
VF_INLINE I join(Chunk lo, Chunk hi) { return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1); }
// r[i] = chunks of rows i and i + 8 -> r[j] = unit j of rows 0..15. Three shuffles a vector instead of the four that
// a 16 x 16 transpose takes: loading half rows does the last step.
VF_INLINE void transpose(I (&r)[8]) {
  I t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  const I even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (int i = 0; i < 4; ++i) {
    const I a = r[i], b = r[i + 4];
    r[i] = _mm512_permutex2var_epi64(a, even, b);
    r[i + 4] = _mm512_permutex2var_epi64(a, odd, b);
  }
}
VF_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
VF_INLINE I broadcast_unit(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
VF_INLINE I bf16_low(I x) { return _mm512_slli_epi32(x, 16); }
VF_INLINE I bf16_high(I x) { return _mm512_and_si512(x, seti(static_cast<int>(0xffff0000u))); }
VF_INLINE I madd16(I a, I b) { return _mm512_madd_epi16(a, b); }
VF_INLINE I even_u8(I x) { return _mm512_and_si512(x, seti(0x00ff00ff)); }
VF_INLINE I odd_u8(I x) { return _mm512_srli_epi16(x, 8); }
VF_INLINE I even_s8(I x) { return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8); }
VF_INLINE I odd_s8(I x) { return _mm512_srai_epi16(x, 8); }

// ---- AVX2 + FMA + F16C --------------------------------------------------------------------------------------------
#elif VF_LEVEL == 1
constexpr int kLanes = 8;
constexpr int kTileRows = 6, kTileVecs = 2;  // 12 accumulators + 2 B vectors + 1 broadcast of 16 registers
using F = __m256;
using I = __m256i;

VF_INLINE F set1(float x) { return _mm256_set1_ps(x); }
VF_INLINE I seti(int32_t x) { return _mm256_set1_epi32(x); }
VF_INLINE I first(int n) { return _mm256_cmpgt_epi32(seti(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
VF_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
VF_INLINE F load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
VF_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
VF_INLINE void store(float* p, F x, int n) { _mm256_maskstore_ps(p, first(n), x); }
VF_INLINE I loadi(const void* p) { return _mm256_loadu_si256((const I*)p); }
VF_INLINE void storei(void* p, I x) { _mm256_storeu_si256((I*)p, x); }
VF_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
VF_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
VF_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
VF_INLINE F as_float(I x) { return _mm256_castsi256_ps(x); }
VF_INLINE I as_int(F x) { return _mm256_castps_si256(x); }
VF_INLINE F abs(F x) { return _mm256_and_ps(x, as_float(seti(0x7fffffff))); }
VF_INLINE F keep_first(F x, int n) { return _mm256_and_ps(x, as_float(first(n))); }
VF_INLINE F select_lt(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
VF_INLINE float reduce_add(F x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
VF_INLINE float reduce_max(F x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
VF_INLINE F to_float(I x) { return _mm256_cvtepi32_ps(x); }
VF_INLINE I round_int(F x) { return _mm256_cvtps_epi32(x); }
VF_INLINE void split_exp2(F x, F& fraction, F& whole) {
  whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  fraction = x - whole;
}
VF_INLINE F scale_exp2(F x, F whole) {  // whole in [-126, 127]
  return x * as_float(_mm256_slli_epi32(_mm256_add_epi32(round_int(whole), seti(127)), 23));
}
VF_INLINE F from_bf16(__m128i h) { return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
VF_INLINE I round_bf16(F x) {  // bf16 in the low half of every lane
  const I u = as_int(x);
  const I lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), seti(1));
  const I r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(seti(0x7fff), lsb)), 16);
  return _mm256_blendv_epi8(r, seti(0x7fc0), as_int(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
VF_INLINE __m128i to_bf16(F x) {
  const I r = round_bf16(x);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
VF_INLINE F load(const bf16* p) { return from_bf16(_mm_loadu_si128((const __m128i*)p)); }
VF_INLINE F load(const bf16* p, int n) {
  bf16 t[8] = {};
  memcpy(t, p, static_cast<size_t>(n) * 2);
  return load(t);
}
VF_INLINE void store(bf16* p, F x) { _mm_storeu_si128((__m128i*)p, to_bf16(x)); }
VF_INLINE void store(bf16* p, F x, int n) {
  bf16 t[8];
  store(t, x);
  memcpy(p, t, static_cast<size_t>(n) * 2);
}
VF_INLINE void store_u8(uint8_t* p, I x) {
  const __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  // packus_epi32 clamps to 0..65535 and packus_epi16 reads signed: clamp to 255 in between.
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(_mm_min_epu16(h, _mm_set1_epi16(255)), h));
}
VF_INLINE I interleave_bf16(const bf16* even, const bf16* odd) {
  const I e = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)even));
  const I o = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)odd));
  return _mm256_or_si256(e, _mm256_slli_epi32(o, 16));
}
VF_INLINE I interleave_bf16(F even, F odd) {  // rounded
  return _mm256_or_si256(round_bf16(even), _mm256_slli_epi32(round_bf16(odd), 16));
}
using Chunk = __m256i;
constexpr int kChunk = 8;
VF_INLINE Chunk load_chunk(const void* p) { return loadi(p); }
VF_INLINE Chunk round_chunk(const float* p) { return _mm256_set_m128i(to_bf16(load(p + 8)), to_bf16(load(p))); }
VF_INLINE I join(Chunk lo, Chunk) { return lo; }
VF_INLINE void transpose(I (&r)[8]) {
  I t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const I a = r[i], b = r[i + 4];
    r[i] = _mm256_permute2x128_si256(a, b, 0x20);
    r[i + 4] = _mm256_permute2x128_si256(a, b, 0x31);
  }
}
VF_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
VF_INLINE I broadcast_unit(const uint32_t* p) { return _mm256_set1_epi32(static_cast<int>(*p)); }
VF_INLINE I bf16_low(I x) { return _mm256_slli_epi32(x, 16); }
VF_INLINE I bf16_high(I x) { return _mm256_and_si256(x, seti(static_cast<int>(0xffff0000u))); }
VF_INLINE I madd16(I a, I b) { return _mm256_madd_epi16(a, b); }
VF_INLINE I even_u8(I x) { return _mm256_and_si256(x, seti(0x00ff00ff)); }
VF_INLINE I odd_u8(I x) { return _mm256_srli_epi16(x, 8); }
VF_INLINE I even_s8(I x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
VF_INLINE I odd_s8(I x) { return _mm256_srai_epi16(x, 8); }

// ---- portable C++ -------------------------------------------------------------------------------------------------
#else
constexpr int kLanes = 4;
constexpr int kTileRows = 6, kTileVecs = 2;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));

VF_INLINE F set1(float x) { return F{x, x, x, x}; }
VF_INLINE I seti(int32_t x) { return I{x, x, x, x}; }
VF_INLINE I first(int n) { return I{0, 1, 2, 3} < seti(n); }
VF_INLINE F load(const float* p) {
  F x;
  memcpy(&x, p, sizeof x);
  return x;
}
VF_INLINE F load(const float* p, int n) {
  F x = set1(0);
  memcpy(&x, p, static_cast<size_t>(n) * 4);
  return x;
}
VF_INLINE void store(float* p, F x) { memcpy(p, &x, sizeof x); }
VF_INLINE void store(float* p, F x, int n) { memcpy(p, &x, static_cast<size_t>(n) * 4); }
VF_INLINE I loadi(const void* p) {
  I x;
  memcpy(&x, p, sizeof x);
  return x;
}
VF_INLINE void storei(void* p, I x) { memcpy(p, &x, sizeof x); }
VF_INLINE F as_float(I x) { return (F)x; }
VF_INLINE I as_int(F x) { return (I)x; }
VF_INLINE F pick(I mask, F yes, F no) { return (F)(((I)yes & mask) | ((I)no & ~mask)); }
VF_INLINE F fma(F a, F b, F c) { return a * b + c; }
VF_INLINE F max(F a, F b) { return pick(a > b, a, b); }
VF_INLINE F min(F a, F b) { return pick(a < b, a, b); }
VF_INLINE F abs(F x) { return (F)((I)x & seti(0x7fffffff)); }
VF_INLINE F keep_first(F x, int n) { return (F)((I)x & first(n)); }
VF_INLINE F select_lt(F a, F b, F yes, F no) { return pick(a < b, yes, no); }
VF_INLINE float reduce_add(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
VF_INLINE float reduce_max(F x) {
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = m > x[i] ? m : x[i];
  return m;
}
VF_INLINE F to_float(I x) { return F{(float)x[0], (float)x[1], (float)x[2], (float)x[3]}; }
VF_INLINE F round_even(F x) {  // |x| < 2^22; larger values and NaN come back unchanged
  const F big = pick(x < set1(0), set1(-12582912.f), set1(12582912.f));
  F y = x + big;
#if defined(__GNUC__)
  __asm__("" : "+m"(y));  // keep the compiler from folding (x + big) - big
#endif
  return pick(abs(x) < set1(4194304.f), y - big, x);
}
VF_INLINE I round_int(F x) {
  const F y = round_even(x);
  I r;
  for (int i = 0; i < kLanes; ++i) r[i] = y[i] > -2147483648.f && y[i] < 2147483648.f ? (int32_t)y[i] : INT32_MIN;
  return r;
}
VF_INLINE void split_exp2(F x, F& fraction, F& whole) {
  whole = round_even(x);
  fraction = x - whole;
}
VF_INLINE F scale_exp2(F x, F whole) { return x * (F)((round_int(whole) + 127) << 23); }
VF_INLINE I round_bf16(F x) {
  const U u = (U)x;
  const I r = (I)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  return (r & (x == x)) | (seti(0x7fc0) & ~(x == x));
}
VF_INLINE F load(const bf16* p, int n) {
  I x = seti(0);
  for (int i = 0; i < n; ++i) x[i] = (int32_t)((uint32_t)p[i] << 16);
  return (F)x;
}
VF_INLINE F load(const bf16* p) { return load(p, kLanes); }
VF_INLINE void store(bf16* p, F x, int n) {
  const I r = round_bf16(x);
  for (int i = 0; i < n; ++i) p[i] = (bf16)r[i];
}
VF_INLINE void store(bf16* p, F x) { store(p, x, kLanes); }
VF_INLINE void store_u8(uint8_t* p, I x) {
  for (int i = 0; i < kLanes; ++i) p[i] = (uint8_t)(x[i] < 0 ? 0 : x[i] > 255 ? 255 : x[i]);
}
VF_INLINE I interleave_bf16(const bf16* even, const bf16* odd) {
  I x;
  for (int i = 0; i < kLanes; ++i) x[i] = (int32_t)((uint32_t)even[i] | (uint32_t)odd[i] << 16);
  return x;
}
VF_INLINE I interleave_bf16(F even, F odd) {  // rounded
  return round_bf16(even) | (I)((U)round_bf16(odd) << 16);
}
using Chunk = I;
constexpr int kChunk = 4;
VF_INLINE Chunk load_chunk(const void* p) { return loadi(p); }
VF_INLINE Chunk round_chunk(const float* p) {
  bf16 t[8];
  store(t, load(p));
  store(t + 4, load(p + 4));
  return loadi(t);
}
VF_INLINE I join(Chunk lo, Chunk) { return lo; }
VF_INLINE void transpose(I (&r)[4]) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) {
      const int32_t t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
}
VF_INLINE I add(I a, I b) { return a + b; }
VF_INLINE I broadcast_unit(const uint32_t* p) { return seti((int32_t)*p); }
VF_INLINE I bf16_low(I x) { return x << 16; }
VF_INLINE I bf16_high(I x) { return x & seti((int32_t)0xffff0000u); }
VF_INLINE I madd16(I a, I b) {  // s16 pairs; products of a u8 and an s8 fit
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}
VF_INLINE I even_u8(I x) { return x & seti(0x00ff00ff); }
VF_INLINE I odd_u8(I x) { return (I)((U)x >> 8) & seti(0x00ff00ff); }
VF_INLINE I even_s8(I x) { return ((x << 24 >> 24) & seti(0xffff)) | ((x << 8 >> 24) << 16); }
VF_INLINE I odd_s8(I x) { return ((x << 16 >> 24) & seti(0xffff)) | (x >> 24 << 16); }
#endif

}  // namespace vf::VF_ISA
