// Matrix products use 32-bit *units*: 1 float, 2 bf16 or 4 bytes that are adjacent along the reduction axis. Each of
// the types f32, bf16x2 and u8s8x4 has `dot(acc, a, b)`: acc += the inner product of the units in every lane.
#pragma once
#include "vec.h"

namespace vf::VF_ISA {

struct f32 {
  using acc = float;
  using V = F;  // accumulator vector
  using A = F;
  using B = F;
  static constexpr int kUnit = 1;  // values per 32-bit unit
  static inline A bcast(const uint32_t* p) { return as_float(broadcast_unit(p)); }
  static inline B get(const uint32_t* p) { return as_float(loadi(p)); }
  static inline V dot(V c, A a, B b) { return fma(a, b, c); }
};

struct bf16x2 {
  using acc = float;
  using V = F;
  static constexpr int kUnit = 2;
#if VF_LEVEL >= 3
  using A = __m512bh;
  using B = __m512bh;
  static inline A bcast(const uint32_t* p) { return (A)broadcast_unit(p); }
  static inline B get(const uint32_t* p) { return (B)loadi(p); }
  static inline V dot(V c, A a, B b) { return _mm512_dpbf16_ps(c, a, b); }
#else
  struct A { F lo, hi; };
  using B = A;
  VF_INLINE A widen(I x) { return {as_float(bf16_low(x)), as_float(bf16_high(x))}; }
  static inline A bcast(const uint32_t* p) { return widen(broadcast_unit(p)); }
  static inline B get(const uint32_t* p) { return widen(loadi(p)); }
  static inline V dot(V c, A a, B b) { return fma(a.hi, b.hi, fma(a.lo, b.lo, c)); }
#endif
};

struct u8s8x4 {
  using acc = int32_t;
  using V = I;
  static constexpr int kUnit = 4;
#if VF_LEVEL >= 3
  using A = I;
  using B = I;
  static inline A bcast(const uint32_t* p) { return broadcast_unit(p); }
  static inline B get(const uint32_t* p) { return loadi(p); }
  static inline V dot(V c, A a, B b) { return _mm512_dpbusd_epi32(c, a, b); }
#else
  struct A { I even, odd; };
  using B = A;
  static inline A bcast(const uint32_t* p) {
    const I x = broadcast_unit(p);
    return {even_u8(x), odd_u8(x)};
  }
  static inline B get(const uint32_t* p) {
    const I x = loadi(p);
    return {even_s8(x), odd_s8(x)};
  }
  // Products are summed in 32 bits (madd_epi16): maddubs would saturate in 16.
  static inline V dot(V c, A a, B b) { return add(c, add(madd16(a.even, b.even), madd16(a.odd, b.odd))); }
#endif
};

VF_INLINE F load_acc(const float* p) { return load(p); }
VF_INLINE I load_acc(const int32_t* p) { return loadi(p); }
VF_INLINE F plus(F a, F b) { return a + b; }
VF_INLINE I plus(I a, I b) { return add(a, b); }
VF_INLINE void store_acc(float* p, F x) { store(p, x); }
VF_INLINE void store_acc(int32_t* p, I x) { storei(p, x); }

}  // namespace vf::VF_ISA
