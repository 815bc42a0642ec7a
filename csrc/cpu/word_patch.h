// The hidden states of one sample, for word_patch_distance and its gradient: pointers to the real rows and their norms.
// Norms are clamped at 1e-5; padded rows are never read. Stored rows may be bf16 (converted once, into scratch) and lie
// anywhere: strides by sample and by row.
#pragma once
#include "samples.h"
#include "word_patch_args.h"

namespace vf::VF_ISA {

constexpr float kEpsilon = 1e-5f;

static float norm(const float* x, int64_t D) {
  F s0 = set1(0), s1 = set1(0);
  int64_t d = 0;
  for (; d + 2 * kLanes <= D; d += 2 * kLanes) {
    const F a = load(x + d), b = load(x + d + kLanes);
    s0 = fma(a, a, s0), s1 = fma(b, b, s1);
  }
  for (; d < D; d += kLanes) {
    const F a = load_any(x, F32, d, (int)min64(kLanes, D - d));
    s0 = fma(a, a, s0);
  }
  float square = reduce_add(s0 + s1);
  if (square - square == 0) return sqrtf(square);
  double wide = 0;  // too large for a float, or not finite
  for (d = 0; d < D; ++d) wide += (double)x[d] * x[d];
  return (float)sqrt(wide);
}

VF_INLINE float clamped(float norm) { return norm < kEpsilon ? kEpsilon : norm; }  // NaN stays

// y = x / divisor: a division, not a product with the inverse, so that parallel vectors cost 0 like torch's.
static void divided_copy(const void* x, int dtype, int64_t D, float divisor, float* y) {
  for (int64_t d = 0; d < D; d += kLanes) {
    const int left = (int)min64(kLanes, D - d);
    store_any(y, F32, d, load_any(x, dtype, d, left) / set1(divisor), left);
  }
}

// Pointers to the real rows of one side as floats, converted into `copy` if need be, and their norms.
static void float_rows(const Rows3& side, int64_t b, const int64_t* places, int64_t n, int64_t D, float* copy,
                       const float** rows, float* norms) {
  for (int64_t i = 0; i < n; ++i) {
    const void* row = advance(side.x.data, side.x.dtype, b * side.by_sample + places[i] * side.by_row);
    if (side.x.dtype == F32) {
      rows[i] = (const float*)row;
    } else {
      divided_copy(row, side.x.dtype, D, 1.f, copy + i * D);
      rows[i] = copy + i * D;
    }
    norms[i] = norm(rows[i], D);
  }
}

static int64_t copy_floats(const Rows3& side, int64_t rows, int64_t D) { return side.x.dtype == F32 ? 0 : rows * D; }

struct Sides {  // scratch of one sample
  float *unit, *text_copy, *image_copy, *text_norm, *image_norm;
  const float **text, **image;
};

static size_t lay_out(Sides& s, Arena arena, const WordPatch& a, int64_t m, int64_t n) {
  s.text = arena.take<const float*>(m);
  s.image = arena.take<const float*>(n);
  s.text_norm = arena.take<float>(m);
  s.image_norm = arena.take<float>(n);
  s.text_copy = arena.take<float>(copy_floats(a.text, m, a.D));
  s.image_copy = arena.take<float>(copy_floats(a.image, n, a.D));
  s.unit = arena.take<float>(m * a.D);
  return arena.used;
}

static void read_sides(const Sides& s, const WordPatch& a, const Transport& t, int64_t b) {
  float_rows(a.text, b, t.rows, t.m, a.D, s.text_copy, s.text, s.text_norm);
  float_rows(a.image, b, t.columns, t.n, a.D, s.image_copy, s.image, s.image_norm);
}

}  // namespace vf::VF_ISA
