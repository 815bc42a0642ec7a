// What IPOT and Sinkhorn share: a plan of one sample, kept as potentials and, for a while, as a scaled matrix.
//
//   log2 T'_ij = phi_i + psi_j - k c_ij        T' = m n T, c = cost * unit (bits), m x n real entries, compacted
//   T'_ij      = u_i G_ij v_j                  between two `open`s; G holds everything else
//
// phi and psi are doubles; u, v and G are floats. A step reads G once or twice and touches nothing but vectors besides:
// given weights x of the rows, v_j = nu_j / sum_i G_ij x_i and r_i = sum_j G_ij v_j come out of one sweep, a block of
// columns at a time: the block is in L1 when its second half reads it. Column sums lie across lanes, so no sum needs a
// shuffle but the m sums of rows, whose partial sums are kept by lane.
//
// Floats stay safe because u and v are watched: a step that takes them out of 2^-60 .. 2^60 (or their product above
// 2^60) is not accepted; the caller moves u and v into the potentials and opens G anew from the *costs*. So an entry of
// G that has underflowed is lost only until the next `open`, where it counted for less than 2^-30 of a row; nothing is
// lost for good, errors do not pile up in G, and 2^-100 000 is as good a value as any. Should even the first step after
// an `open` fail, `rows_lse` and `columns_lse` take it in logarithms.
#pragma once
#include "samples.h"

namespace vf::VF_ISA {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kLimit = 0x1p60f;
constexpr double kNever = -INFINITY;           // log2 of the weight of a column that is not there
constexpr int kSweep = VF_LEVEL >= 2 ? 4 : 8;  // vectors of columns in a block

typedef double D __attribute__((vector_size(sizeof(F))));
typedef float H __attribute__((vector_size(sizeof(F) / 2)));

// Sets t.least; false if a cost is NaN or infinite.
static bool column_minima(const Transport& t) {
  F poison = set1(0);
  for (int64_t j = 0; j < t.width; j += kLanes) {
    F low = load(t.c + j);
    for (int64_t i = 0; i < t.m; ++i) {
      const F x = load(t.c + i * t.ld + j);
      poison = fma(x, set1(0), poison);
      low = min(low, x);
    }
    store(t.least + j, keep_first(low, (int)min64(kLanes, t.n - j)));
  }
  return reduce_add(poison) == 0;
}

// plan [M, N] = u G v / (m n) at the real places, 0 elsewhere (everywhere for a sample with nothing real).
static void scatter_plan(const Transport& t, const float* u, const float* v, float* plan, int64_t M, int64_t N) {
  if (N == 0) return;  // an empty plan may be at no address, which memset must not be given
  const float scale = t.m ? 1.f / ((float)t.m * (float)t.n) : 0.f;
  for (int64_t p = 0, i = 0; p < M; ++p) {
    float* to = plan + p * N;
    memset(to, 0, (size_t)N * sizeof(float));
    if (i == t.m || t.rows[i] != p) continue;
    const float* g = t.g + i * t.ld;
    const float share = u[i++] * scale;
    if (t.columns[t.n - 1] == t.n - 1) {
      const F weight = set1(share);
      for (int64_t j = 0; j < t.n; j += kLanes)
        store_any(to, F32, j, load(g + j) * load(v + j) * weight, (int)min64(kLanes, t.n - j));
    } else {
      for (int64_t j = 0; j < t.n; ++j) to[t.columns[j]] = g[j] * v[j] * share;
    }
  }
}

// ---- exponents ----------------------------------------------------------------------------------------------------
// Exponents are sums in double: terms of 1e10 bits cancel to what matters, of which a float would keep nothing.
VF_INLINE D doubles(const double* p) {
  D d;
  memcpy(&d, p, sizeof d);
  return d;
}
VF_INLINE D doubles(const float* p) {
  H h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, D);
}
VF_INLINE D max(D a, D b) { return a > b ? a : b; }

// out_j = a + b_j - k c_j for one row.
VF_INLINE void exponents(const float* c, int64_t width, double a, const double* b, double k, float* out) {
  for (int64_t j = 0; j < width; j += kLanes / 2) {
    const H h = __builtin_convertvector((a + doubles(b + j)) - k * doubles(c + j), H);
    memcpy(out + j, &h, sizeof h);
  }
}

// 2^x to 1 ulp (it is raised to powers: shared exp2_clamped is less exact), 0 below -126; x > 126 counts as 126.
VF_INLINE F exp2_or_zero(F x) {
  F f, n;
  split_exp2(max(set1(-126.f), min(set1(126.f), x)), f, n);
  F p = fma(fma(set1(1.535336188319500e-4f), f, set1(1.339887440266574e-3f)), f, set1(9.618437357674640e-3f));
  p = fma(fma(p, f, set1(5.550332471162809e-2f)), f, set1(2.402264791363012e-1f));
  p = fma(fma(p, f, set1(6.931472028550421e-1f)), f, set1(1.f));
  return select_lt(x, set1(-126.f), set1(0), scale_exp2(p, n));
}

// G = 2^(phi + psi - k c), u = v = 1.
static void open_plan(const Transport& t, double k) {
  for (int64_t i = 0; i < t.m; ++i) {
    float* g = t.g + i * t.ld;
    exponents(t.c + i * t.ld, t.width, t.phi[i], t.psi, k * t.unit, g);
    for (int64_t j = 0; j < t.width; j += kLanes) store(g + j, exp2_or_zero(load(g + j)));
  }
}

// psi_j = log2 nu_j - log2 sum_i 2^(phi_i - k c_ij), in logarithms; G is overwritten.
static void columns_lse(const Transport& t, double k) {
  k *= t.unit;
  double* top = t.lift;
  float* sum = t.v[0];
  for (int64_t j = 0; j < t.width; ++j) top[j] = -INFINITY, sum[j] = 0;
  for (int64_t i = 0; i < t.m; ++i)
    for (int64_t j = 0; j < t.width; j += kLanes / 2) {
      const D high = max(doubles(top + j), t.phi[i] - k * doubles(t.c + i * t.ld + j));
      memcpy(top + j, &high, sizeof high);
    }
  for (int64_t j = 0; j < t.width; ++j) t.lift[j] = -top[j];
  for (int64_t i = 0; i < t.m; ++i) {
    exponents(t.c + i * t.ld, t.width, t.phi[i], t.lift, k, t.g);
    for (int64_t j = 0; j < t.width; j += kLanes) store(sum + j, load(sum + j) + exp2_or_zero(load(t.g + j)));
  }
  for (int64_t j = 0; j < t.n; ++j) t.psi[j] = t.log_nu[j] + t.lift[j] - log2((double)sum[j]);
}

// phi_i = log2 mu_i - log2 sum_j 2^(psi_j - k c_ij), in logarithms; G is overwritten.
static void rows_lse(const Transport& t, double k) {
  k *= t.unit;
  for (int64_t i = 0; i < t.m; ++i) {
    const float* c = t.c + i * t.ld;
    D high = doubles(t.psi) - k * doubles(c);
    for (int64_t j = kLanes / 2; j < t.width; j += kLanes / 2)
      high = max(high, doubles(t.psi + j) - k * doubles(c + j));
    double top = high[0];
    for (int l = 1; l < kLanes / 2; ++l) top = high[l] > top ? high[l] : top;
    exponents(c, t.width, -top, t.psi, k, t.g);
    F sum = set1(0);
    for (int64_t j = 0; j < t.width; j += kLanes) sum = sum + exp2_or_zero(load(t.g + j));
    t.phi[i] = t.log_mu[i] - top - log2((double)reduce_add(sum));
  }
}

// ---- sweeps -------------------------------------------------------------------------------------------------------
struct Range {
  F low, high;
  void add(F x) { low = min(low, x), high = max(high, x); }
  float least() const { return -reduce_max(set1(0) - low); }
  float most() const { return reduce_max(high); }
};

template <bool kMultiply, bool kColumns, int kWidth>
VF_INLINE void sweep_block(const Transport& t, int64_t j, const float* x, float* v, bool first, Range& range) {
  const int64_t m = t.m, ld = t.ld;
  const float* a = t.a + j;
  float *g = t.g + j, *partial = t.partial;
  F sum[kWidth];
  if (kColumns) {
    for (int w = 0; w < kWidth; ++w) sum[w] = set1(0);
    for (int64_t i = 0; i < m; ++i, a += ld, g += ld) {
      const F xi = set1(x[i]);
      for (int w = 0; w < kWidth; ++w) {
        F q = load(g + w * kLanes);
        if (kMultiply) {
          q = q * load(a + w * kLanes);
          store(g + w * kLanes, q);
        }
        sum[w] = fma(q, xi, sum[w]);
      }
    }
    for (int w = 0; w < kWidth; ++w) {
      const int64_t p = j + w * kLanes;
      sum[w] = load(t.nu + p) / (sum[w] + load(t.hole + p));
      store(v + p, sum[w]);
      range.add(sum[w]);
    }
  } else {
    for (int w = 0; w < kWidth; ++w) sum[w] = load(v + j + w * kLanes);
  }
  g = t.g + j;
  for (int64_t i = 0; i < m; ++i, g += ld, partial += kLanes) {
    F s = first ? set1(0) : load(partial);
    for (int w = 0; w < kWidth; ++w) s = fma(load(g + w * kLanes), sum[w], s);
    store(partial, s);
  }
}

// `count` blocks of kWidth vectors from column j on, or before it if backwards; moves j.
template <bool kMultiply, bool kColumns, int kWidth>
static void sweep_blocks(const Transport& t, int64_t count, bool backwards, const float* x, float* v, int64_t& j,
                         Range& range) {
  for (; count > 0; --count) {
    const bool first = j == (backwards ? t.width : 0);
    if (backwards) j -= kWidth * kLanes;
    sweep_block<kMultiply, kColumns, kWidth>(t, j, x, v, first, range);
    if (!backwards) j += kWidth * kLanes;
  }
}

// kMultiply: G *= A first. kColumns: v_j = nu_j / sum_i G_ij x_i, else v is given. Then r_i = sum_j G_ij v_j. Callers turn
// round after every sweep: what one has touched last is still in L1 when the next begins with it.
template <bool kMultiply, bool kColumns>
static Range sweep(const Transport& t, bool backwards, const float* x, float* v) {
  Range range{set1(INFINITY), set1(0)};
  const int64_t vecs = t.width / kLanes;
  int64_t j = backwards ? t.width : 0;
  for (int k = 0; k < 4; ++k) {
    switch (backwards ? 3 - k : k) {
      case 0: sweep_blocks<kMultiply, kColumns, kSweep>(t, vecs / kSweep, backwards, x, v, j, range); break;
      case 1:
        if (kSweep > 4) sweep_blocks<kMultiply, kColumns, 4>(t, vecs / 4 % 2, backwards, x, v, j, range);
        break;
      case 2: sweep_blocks<kMultiply, kColumns, 2>(t, vecs / 2 % 2, backwards, x, v, j, range); break;
      default: sweep_blocks<kMultiply, kColumns, 1>(t, vecs % 2, backwards, x, v, j, range);
    }
  }
  for (int64_t i = 0; i < t.m; ++i) t.r[i] = reduce_add(load(t.partial + i * kLanes));
  return range;
}

// u = mu / r
static Range scale_rows(const Transport& t, float* u) {
  Range range{set1(INFINITY), set1(0)};
  for (int64_t i = 0; i < t.m; i += kLanes) {
    const F y = load(t.mu + i) / load(t.r + i);
    store(u + i, y);
    range.add(y);
  }
  return range;
}

VF_INLINE bool safe(const Range& u, const Range& v) {
  const float high_u = u.most(), high_v = v.most();
  return u.least() > 1 / kLimit && v.least() > 1 / kLimit && high_u < kLimit && high_v < kLimit &&
         high_u * high_v < kLimit;
}

static void fill(float* p, int64_t n, float x) {
  for (int64_t i = 0; i < n; ++i) p[i] = x;
}

// What every sample starts from: marginals uniform, potentials 0, nothing in the holes.
static void start(Transport& t, double unit) {
  t.unit = unit;
  const int64_t mr = round_up(t.m, kLanes);
  fill(t.mu, mr, (float)t.n), fill(t.nu, t.width, (float)t.m), fill(t.r, mr, 1.f), fill(t.hole, t.width, 0.f);
  for (int64_t i = t.m; i < mr; ++i) t.mu[i] = 1;
  for (int64_t j = t.n; j < t.width; ++j) t.hole[j] = t.nu[j] = 1;
  const double log_m = log2((double)t.m), log_n = log2((double)t.n);
  for (int64_t i = 0; i < t.m; ++i) t.phi[i] = t.alpha[i] = 0, t.log_mu[i] = log_n;
  for (int64_t j = 0; j < t.n; ++j) t.log_nu[j] = log_m;
  for (int64_t j = 0; j < t.width; ++j) t.psi[j] = t.gamma[j] = j < t.n ? 0 : kNever;
}

}  // namespace vf::VF_ISA
