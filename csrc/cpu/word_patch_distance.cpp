// distance [B] from hidden states: C_ij = 1 - t_i.p_j / (|t_i| |p_j|), T = IPOT(C), sum_ij C_ij T_ij; and its gradient
// with T constant. A sample a thread; norms are clamped at 1e-5; padded rows are never read.
//
//   forward   t^_i = t_i / |t_i| into scratch (m x D floats), so that no product overflows; then tiles of inner products
//             along D straight from the rows of the image: no packing, no transposition; C goes into the Transport.
//   backward  s_i = sum_j T_ij p^_j,  dt_i = -g (s_i - t^_i (t^_i.s_i)) / |t_i|   (no projection where |t_i| < 1e-5)
//             and the same for the image. W_ij = T_ij / |p_j| is the left operand, raw rows are the right one.
//
// Stored rows may be bf16 (converted once, into scratch) and lie anywhere: strides by sample and by row.
#include "ipot.h"

namespace vf::VF_ISA {

constexpr float kEpsilon = 1e-5f;
constexpr int kTileI = VF_LEVEL >= 2 ? 4 : 3, kTileJ = VF_LEVEL >= 2 ? 6 : 3;  // accumulators of inner products
constexpr int kOutRows = 6, kOutVecs = kTileVecs;                              // accumulators of weighted sums

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

// out[r * ldo + q] = 1 - x_r . y_q / norm[q], kI x kJ of them.
template <int kI, int kJ>
static void dot_tile(const float* const* x, const float* const* y, int64_t D, const float* norm, float* out, int64_t ldo) {
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

static void cosine_costs(const Transport& t, const float* const* x, const float* const* y, int64_t D, const float* norm) {
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
          for (int64_t q = 0; q < columns; ++q) dot_tile<1, 1>(x + i + r, y + j + q, D, norm + j + q, out + r * t.ld + q, t.ld);
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

// ---- gradient -----------------------------------------------------------------------------------------------------
// out[r] = sum_q w[r * wr + q * wq] x_q for kR rows r, columns d .. d + kV vectors.
template <int kR, int kV>
static void sum_tile(const float* w, int64_t wr, int64_t wq, const float* const* x, int64_t count, int64_t d, float* out, int64_t ldo) {
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
static void sum_rows(const float* w, int64_t wr, int64_t wq, const float* const* x, int64_t count, int64_t D, float* out) {
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
static void side_gradient(const Param& out, int64_t b, int64_t size, const int64_t* places, int64_t m, const float* const* own,
                          const float* norms, const float* w, int64_t wr, int64_t wq, const float* const* other, int64_t count,
                          float g, int64_t D, float* sums) {
  char* base = (char*)advance(out.data, out.dtype, b * size * D);
  const int64_t bytes = D * (out.dtype == BF16 ? 2 : 4);
  for (int64_t p = 0, i = 0; p < size; ++p)
    if (i < m && places[i] == p) ++i; else memset(base + p * bytes, 0, (size_t)bytes);
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
      side_gradient(a.image, b, N, t.columns, t.n, s.image, s.image_norm, t.g, 1, t.ld, s.text, t.m, a.grad[b], D, s.unit);
    }
  });
}

}  // namespace vf::VF_ISA
