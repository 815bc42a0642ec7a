// The gradient of word_patch_distance with the plan T constant; a sample a thread.
//
//   s_i = sum_j T_ij p^_j,  dt_i = -g (s_i - t^_i (t^_i.s_i)) / |t_i|   (no projection where |t_i| < 1e-5)
//
// and the same for the image. W_ij = T_ij / |p_j| is the left operand of the sums, raw rows are the right one.
#include "word_patch.h"
#include "word_patch_gradient_args.h"

namespace vf::VF_ISA {

constexpr int kOutRows = 6, kOutVecs = kTileVecs;  // accumulators of weighted sums

// out[r] = sum_q w[r * wr + q * wq] x_q for kR rows r, columns d .. d + kV vectors.
template <int kR, int kV>
static void sum_tile(const float* w, int64_t wr, int64_t wq, const float* const* x, int64_t count, int64_t d,
                     float* out, int64_t ldo) {
  F acc[kR][kV];
  for (int r = 0; r < kR; ++r)
    for (int v = 0; v < kV; ++v) acc[r][v] = set1(0);
  for (int64_t q = 0; q < count; ++q, w += wq) {
    F b[kV];
    for (int v = 0; v < kV; ++v) b[v] = load(x[q] + d + v * kLanes);
    for (int r = 0; r < kR; ++r) {
      const F a = set1(w[r * wr]);
      for (int v = 0; v < kV; ++v) acc[r][v] = fma(a, b[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kR; ++r)
    for (int v = 0; v < kV; ++v) store(out + r * ldo + d + v * kLanes, acc[r][v]);
}

template <int kR>
static void sum_rows(const float* w, int64_t wr, int64_t wq, const float* const* x, int64_t count, int64_t D,
                     float* out) {
  int64_t d = 0;
  for (; d + kOutVecs * kLanes <= D; d += kOutVecs * kLanes) sum_tile<kR, kOutVecs>(w, wr, wq, x, count, d, out, D);
  for (; d + kLanes <= D; d += kLanes) sum_tile<kR, 1>(w, wr, wq, x, count, d, out, D);
  for (; d < D; ++d)
    for (int r = 0; r < kR; ++r) {
      float s = 0;
      for (int64_t q = 0; q < count; ++q) s += w[r * wr + q * wq] * x[q][d];
      out[r * D + d] = s;
    }
}

// gradient = -g (s - t^ (t^.s)) / |t| for one row, t^ = t / |t|
static void project(const float* s, const float* x, float norm, float g, int64_t D, void* out, int dtype) {
  const float divisor = clamped(norm);
  F dot = set1(0);
  for (int64_t d = 0; d < D; d += kLanes) {
    const int left = (int)min64(kLanes, D - d);
    dot = fma(load_any(s, F32, d, left), load_any(x, F32, d, left), dot);
  }
  const float along = norm < kEpsilon ? 0.f : reduce_add(dot) / divisor / divisor;
  const F factor = set1(-g / divisor);
  for (int64_t d = 0; d < D; d += kLanes) {
    const int left = (int)min64(kLanes, D - d);
    const F y = load_any(s, F32, d, left) - load_any(x, F32, d, left) * set1(along);
    store_any(out, dtype, d, y * factor, left);
  }
}

// Gradient of one side: rows `own` (m of them, at `places` of `size`), weights W[r, q] over the rows `other`.
static void side_gradient(const Param& out, int64_t b, int64_t size, const int64_t* places, int64_t m,
                          const float* const* own, const float* norms, const float* w, int64_t wr, int64_t wq,
                          const float* const* other, int64_t count, float g, int64_t D, float* sums) {
  char* base = (char*)advance(out.data, out.dtype, b * size * D);
  const int64_t bytes = D * (out.dtype == BF16 ? 2 : 4);
  for (int64_t p = 0, i = 0; p < size; ++p)
    if (i < m && places[i] == p) ++i;
    else memset(base + p * bytes, 0, (size_t)bytes);
  for (int64_t i = 0; i < m; i += kOutRows) {
    const int64_t rows = min64(kOutRows, m - i);
    switch (rows) {
      case 1: sum_rows<1>(w + i * wr, wr, wq, other, count, D, sums); break;
      case 2: sum_rows<2>(w + i * wr, wr, wq, other, count, D, sums); break;
      case 3: sum_rows<3>(w + i * wr, wr, wq, other, count, D, sums); break;
      case 4: sum_rows<4>(w + i * wr, wr, wq, other, count, D, sums); break;
      case 5: sum_rows<5>(w + i * wr, wr, wq, other, count, D, sums); break;
      default: sum_rows<kOutRows>(w + i * wr, wr, wq, other, count, D, sums);
    }
    for (int64_t r = 0; r < rows; ++r)
      project(sums + r * D, own[i + r], norms[i + r], g, D, base + places[i + r] * bytes, out.dtype);
  }
}

void word_patch_gradient(const WordPatchGradientArgs& a) {
  const int64_t M = a.in.masks.M, N = a.in.masks.N, D = a.in.D;
  auto extra = [&](int64_t m, int64_t n) {
    Sides s;
    return (int64_t)(lay_out(s, {nullptr, 0}, a.in, m > kOutRows ? m : kOutRows, n) / sizeof(float));
  };
  for_samples(a.in.masks, nullptr, nullptr, a.in.threads, false, extra, [&](int64_t b, Transport& t, float* scratch) {
    Sides s;
    lay_out(s, {(char*)scratch, 0}, a.in, t.m > kOutRows ? t.m : kOutRows, t.n);
    if (t.m) {
      read_sides(s, a.in, t, b);
      gather_costs(t, a.plan + b * M * N, N);  // the plan, compacted, in t.c
    }
    if (a.text.data) {
      for (int64_t i = 0; i < t.m; ++i)
        for (int64_t j = 0; j < t.n; ++j) t.g[i * t.ld + j] = t.c[i * t.ld + j] / clamped(s.image_norm[j]);
      side_gradient(a.text, b, M, t.rows, t.m, s.text, s.text_norm, t.g, t.ld, 1, s.image, t.n, a.grad[b], D, s.unit);
    }
    if (a.image.data) {
      for (int64_t i = 0; i < t.m; ++i) {
        const float norm = clamped(s.text_norm[i]);
        for (int64_t j = 0; j < t.n; ++j) t.g[i * t.ld + j] = t.c[i * t.ld + j] / norm;
      }
      side_gradient(a.image, b, N, t.columns, t.n, s.image, s.image_norm, t.g, 1, t.ld, s.text, t.m, a.grad[b], D,
                    s.unit);
    }
  });
}

}  // namespace vf::VF_ISA
