// Gradients of s = dropout(x) + residual, y = LayerNorm(s), with xhat = (s - mean) rstd and g = dy weight:
//
//   d = ds + rstd (g - mean_D(g) - xhat mean_D(g xhat));  dresidual = d;  dx = dropout'(d)
//   dweight = sum_rows dy xhat;  dbias = sum_rows dy
//
// One pass over memory: g and xhat of a row wait in L1 for its two means. The dropout mask is drawn again (philox.h). Rows
// go in at most kGroups runs, each with sums of its own, which are added in order at the end: sums do not depend on the
// number of threads.
#include "add_layer_norm_bwd_args.h"
#include "philox.h"
#include "rows.h"
#include "team.h"

namespace vf::VF_ISA {

static void backward_row(const AddLayerNormBwdArgs& a, int64_t r, float* g, float* xhat, float* factor, float* dweight,
                         float* dbias) {
  const int64_t D = a.D;
  const bool normed = a.grad_y.data != nullptr;
  F sum = set1(0), tilted = set1(0);
  if (normed) {
    const F mean = set1(a.mean[r]), rstd = set1(a.rstd[r]);
    for (int64_t i = 0; i < D; i += kLanes) {
      const int n = (int)min64(kLanes, D - i);
      const F dy = load_any(a.grad_y.data, a.grad_y.dtype, r * D + i, n);
      const F x = keep_first((load_any(a.s.data, a.s.dtype, r * D + i, n) - mean) * rstd, n);
      const F scaled = a.weight.data ? dy * load_any(a.weight.data, a.weight.dtype, i, n) : dy;
      store(g + i, scaled), store(xhat + i, x);
      sum = sum + scaled, tilted = fma(scaled, x, tilted);
      store(dweight + i, fma(dy, x, load(dweight + i)));
      store(dbias + i, dy + load(dbias + i));
    }
  }
  if (a.dropout_p > 0 && a.dx) dropout_factors(a.seed, (uint32_t)r, a.dropout_p, D, factor);
  const F rstd = set1(normed ? a.rstd[r] : 0.f);
  const F shift = set1(reduce_add(sum) / (float)D), tilt = set1(reduce_add(tilted) / (float)D);
  for (int64_t i = 0; i < D; i += kLanes) {
    const int n = (int)min64(kLanes, D - i);
    F d = a.grad_s.data ? load_any(a.grad_s.data, a.grad_s.dtype, r * D + i, n) : set1(0);
    if (normed) d = fma(rstd, load(g + i) - shift - load(xhat + i) * tilt, d);
    store_any(a.dresidual, a.dresidual_dtype, r * D + i, d, n);
    if (!a.dx) continue;
    if (a.dropout_p > 0) d = d * load(factor + i);
    store_any(a.dx, a.dx_dtype, r * D + i, d, n);
  }
}

void add_layer_norm_bwd(const AddLayerNormBwdArgs& a) {
  constexpr int64_t kGroups = 64;
  const int64_t D = a.D, wide = round_up(D, 64), each = ceil_div(a.N, kGroups) > 4 ? ceil_div(a.N, kGroups) : 4;
  const int64_t groups = ceil_div(a.N, each);
  const int threads = worthwhile(a.threads, a.N * D * 16);
  Phase* phases;
  float *shares, *rows;
  auto layout = [&](Arena arena) {
    phases = arena.take<Phase>(2);
    shares = arena.take<float>(groups * 2 * wide);
    rows = arena.take<float>(3 * wide * threads);
    return arena.used;
  };
  void* buffer = scratch_acquire(layout({nullptr, 0}));
  layout({(char*)buffer, 0});
  memset(phases, 0, 2 * sizeof(Phase));
#pragma omp parallel num_threads(threads)
  {
    Phase own{};
    Team team{team_size(), team_rank(), nullptr};
    team.phase = team.size > 1 ? phases : &own;
    float* row = rows + 3 * wide * team.rank;
    for (int64_t group; (group = team.take()) < groups;) {
      float* share = shares + group * 2 * wide;
      memset(share, 0, (size_t)(2 * wide) * 4);
      for (int64_t r = group * each; r < min64(a.N, (group + 1) * each); ++r)
        backward_row(a, r, row, row + wide, row + 2 * wide, share, share + wide);
    }
    team.barrier();
    if (a.sums)
      for (int64_t i; (i = team.take() * kLanes) < D;)
        for (int which = 0; which < 2; ++which) {
          F sum = set1(0);
          for (int64_t group = 0; group < groups; ++group) sum = sum + load(shares + (2 * group + which) * wide + i);
          store_any(a.sums + which * D, F32, i, sum, (int)min64(kLanes, D - i));
        }
  }
  scratch_release(buffer);
}

}  // namespace vf::VF_ISA
