// distance [B] from hidden states: C_ij = 1 - t_i.p_j / (|t_i| |p_j|), T = IPOT(C), sum_ij C_ij T_ij. A sample a thread.
//
// t^_i = t_i / |t_i| goes into scratch (m x D floats), so that no product overflows; then tiles of inner products along D
// straight from the rows of the image: no packing, no transposition; C goes into the Transport.
#include "ipot.h"
#include "word_patch.h"
#include "word_patch_distance_args.h"

namespace vf::VF_ISA {

constexpr int kTileI = VF_LEVEL >= 2 ? 4 : 3, kTileJ = VF_LEVEL >= 2 ? 6 : 3;  // accumulators of inner products

// out[r * ldo + q] = 1 - x_r . y_q / norm[q], kI x kJ of them.
template <int kI, int kJ>
static void dot_tile(const float* const* x, const float* const* y, int64_t D, const float* norm, float* out,
                     int64_t ldo) {
  F acc[kI][kJ];
  for (int i = 0; i < kI; ++i)
    for (int j = 0; j < kJ; ++j) acc[i][j] = set1(0);
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
    F a[kI];
    for (int i = 0; i < kI; ++i) a[i] = load(x[i] + d);
    for (int j = 0; j < kJ; ++j) {
      const F b = load(y[j] + d);
      for (int i = 0; i < kI; ++i) acc[i][j] = fma(a[i], b, acc[i][j]);
    }
  }
  if (d < D)
    for (int j = 0; j < kJ; ++j)
      for (int i = 0; i < kI; ++i)
        acc[i][j] = fma(load(x[i] + d, (int)(D - d)), load(y[j] + d, (int)(D - d)), acc[i][j]);
  for (int i = 0; i < kI; ++i)
    for (int j = 0; j < kJ; ++j) out[i * ldo + j] = 1.f - reduce_add(acc[i][j]) / norm[j];
}

static void cosine_costs(const Transport& t, const float* const* x, const float* const* y, int64_t D,
                         const float* norm) {
  for (int64_t j = 0; j < t.n; j += kTileJ)
    for (int64_t i = 0; i < t.m; i += kTileI) {
      float* out = t.c + i * t.ld + j;
      const int64_t rows = min64(kTileI, t.m - i), columns = min64(kTileJ, t.n - j);
      if (rows == kTileI && columns == kTileJ) {
        dot_tile<kTileI, kTileJ>(x + i, y + j, D, norm + j, out, t.ld);
      } else if (columns == kTileJ) {
        for (int64_t r = 0; r < rows; ++r) dot_tile<1, kTileJ>(x + i + r, y + j, D, norm + j, out + r * t.ld, t.ld);
      } else if (rows == kTileI) {
        for (int64_t q = 0; q < columns; ++q) dot_tile<kTileI, 1>(x + i, y + j + q, D, norm + j + q, out + q, t.ld);
      } else {
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t q = 0; q < columns; ++q)
            dot_tile<1, 1>(x + i + r, y + j + q, D, norm + j + q, out + r * t.ld + q, t.ld);
      }
    }
  for (int64_t i = 0; i < t.m; ++i)
    for (int64_t j = t.n; j < t.width; ++j) t.c[i * t.ld + j] = kFar;
}

static double distance_of(const Transport& t, const Scaling& s) {
  double total = 0;
  for (int64_t i = 0; i < t.m; ++i) {
    F sum = set1(0);
    for (int64_t j = 0; j < t.width; j += kLanes) {
      const int64_t p = i * t.ld + j;
      sum = fma(load(t.c + p) * load(t.g + p), load(s.v + j), sum);
    }
    total += (double)reduce_add(sum) * s.u[i];
  }
  return total / ((double)t.m * (double)t.n);
}

static void scatter_nan(const Transport& t, float* plan, int64_t M, int64_t N) {
  memset(plan, 0, (size_t)(M * N) * sizeof(float));
  for (int64_t i = 0; i < t.m; ++i)
    for (int64_t j = 0; j < t.n; ++j) plan[t.rows[i] * N + t.columns[j]] = NAN;
}

void word_patch_distance(const WordPatchArgs& a) {
  const int64_t M = a.in.masks.M, N = a.in.masks.N, D = a.in.D;
  auto extra = [&](int64_t m, int64_t n) {
    Sides s;
    return (int64_t)(lay_out(s, {nullptr, 0}, a.in, m, n) / sizeof(float));
  };
  for_samples(a.in.masks, nullptr, nullptr, a.in.threads, true, extra, [&](int64_t b, Transport& t, float* scratch) {
    float* plan = a.plan ? a.plan + b * M * N : nullptr;
    a.distance[b] = 0;
    if (!t.m) {
      if (plan) scatter_plan(t, nullptr, nullptr, plan, M, N);
      return;
    }
    Sides s;
    lay_out(s, {(char*)scratch, 0}, a.in, t.m, t.n);
    read_sides(s, a.in, t, b);
    for (int64_t i = 0; i < t.m; ++i) {
      divided_copy(s.text[i], F32, D, clamped(s.text_norm[i]), s.unit + i * D);
      s.text[i] = s.unit + i * D;
    }
    for (int64_t j = 0; j < t.n; ++j) s.image_norm[j] = clamped(s.image_norm[j]);
    cosine_costs(t, s.text, s.image, D, s.image_norm);
    if (!column_minima(t)) {
      a.distance[b] = NAN;
      if (plan) scatter_nan(t, plan, M, N);
      return;
    }
    const Scaling solved = ipot_solve(t, a.beta, a.iterations, a.inner);
    a.distance[b] = (float)distance_of(t, solved);
    if (plan) scatter_plan(t, solved.u, solved.v, plan, M, N);
  });
}

}  // namespace vf::VF_ISA
