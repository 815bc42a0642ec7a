// Sinkhorn's algorithm for one sample a thread, on top of transport.h: log2 T' = phi + psi - c, c in bits of epsilon.
//
//   u_i = mu_i / sum_j G_ij v_j (text);  v_j = nu_j / sum_i G_ij u_i (image)
//
// The sweep that makes v also sums the rows with it: sum_i |u_i r_i - mu_i| is the error of the text marginals, and
// mu / r the next u. So looking at the error costs nothing. The value needs no costs, they cancel:
//   <C, T> + epsilon KL(T || mu nu^t) = epsilon sum_ij T_ij ln(T_ij e^(C_ij / epsilon) / (mu_i nu_j)).
#include "sinkhorn_args.h"
#include "transport.h"

namespace vf::VF_ISA {

constexpr double kLeastShare = 0x1p-100;  // nothing to a converged plan; less is lost in floats

// Weights normalised to sum to `total`, and their log2. False if floats cannot hold them: where G spans as many bits, a row of
// less than kLeastShare has a part in the first plans.
static bool marginal(const float* weight, const int64_t* places, int64_t n, double total, float* out, double* logs) {
  bool held = true;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += weight_of(weight, places[i]);
  for (int64_t i = 0; i < n; ++i) {
    const double share = weight_of(weight, places[i]) / sum * total;
    out[i] = (float)(share > kLeastShare ? share : kLeastShare);
    logs[i] = log2(weight_of(weight, places[i])) - log2(sum) + log2(total);
    held = held && share > kLeastShare;
  }
  return held;
}

static double text_error(const Transport& t, const float* u) {
  double error = 0;
  for (int64_t i = 0; i < t.m; ++i) error += fabs((double)u[i] * t.r[i] - t.mu[i]);
  return error / ((double)t.m * (double)t.n);
}

struct Outcome {
  const float *u, *v;
  int64_t used;
  double error;
};

// Leaves G, u, v with T' = u G v and r = G v. Every step is taken in logarithms unless `held`.
static Outcome solve(Transport& t, const SinkhornArgs& a, bool held) {
  float least = t.least[0];
  for (int64_t j = 1; j < t.n; ++j) least = t.least[j] < least ? t.least[j] : least;
  for (int64_t i = 0; i < t.m; ++i) t.phi[i] = (double)least * t.unit;
  int64_t used = 0;
  double error = 0;
  auto finished = [&] { return used == a.iterations || (used > 0 && error <= a.tolerance); };
  while (true) {
    open_plan(t, 1);
    fill(t.u[0], round_up(t.m, kLanes), 1.f);
    fill(t.v[0], t.width, 1.f);
    sweep<false, false>(t, false, nullptr, t.v[0]);
    error = text_error(t, t.u[0]);
    int64_t s = 0;
    while (held && !finished()) {
      float *u = t.u[(s + 1) % 2], *v = t.v[(s + 1) % 2];
      const Range rows = scale_rows(t, u);
      if (!(rows.least() > 0 && rows.most() < kLimit)) break;
      if (!safe(rows, sweep<false, true>(t, s % 2 == 0, u, v))) break;
      ++s, ++used;
      error = text_error(t, u);
    }
    const float *u = t.u[s % 2], *v = t.v[s % 2];
    if (finished()) return {u, v, used, error};
    for (int64_t i = 0; s && i < t.m; ++i) t.phi[i] += log2((double)u[i]);
    for (int64_t j = 0; s && j < t.n; ++j) t.psi[j] += log2((double)v[j]);
    if (s < 4) {
      rows_lse(t, 1);
      columns_lse(t, 1);
      ++used;
    }
  }
}

static double value_of(const Transport& t, const Outcome& o, double epsilon) {
  double bits = 0, mass = 0;
  for (int64_t i = 0; i < t.m; ++i) {
    const double share = (double)o.u[i] * t.r[i];
    bits += share * (t.phi[i] + log2((double)o.u[i]) - t.log_mu[i]);
    mass += share;
  }
  for (int64_t j = 0; j < t.n; ++j) bits += t.nu[j] * (t.psi[j] + log2((double)o.v[j]) - t.log_nu[j]);
  const double cells = (double)t.m * (double)t.n;
  return epsilon * kLn2 * (bits + mass * log2(cells)) / cells;
}

void sinkhorn(const SinkhornArgs& a) {
  const int64_t M = a.masks.M, N = a.masks.N;
  for_samples(
      a.masks, a.text_marginal, a.image_marginal, a.threads, false, [](int64_t, int64_t) { return (int64_t)0; },
      [&](int64_t b, Transport& t, float*) {
        float* plan = a.plan + b * M * N;
        a.value[b] = a.error[b] = 0;
        a.used[b] = 0;
        if (!t.m) return scatter_plan(t, nullptr, nullptr, plan, M, N);
        gather_costs(t, a.cost + b * M * N, N);
        if (!column_minima(t)) {
          a.broken[b] = 1;
          return;
        }
        start(t, kLog2E / a.epsilon);
        const double cells = (double)t.m * (double)t.n;
        bool held = true;
        if (a.text_marginal) held = marginal(a.text_marginal + b * M, t.rows, t.m, cells, t.mu, t.log_mu);
        if (a.image_marginal) held = marginal(a.image_marginal + b * N, t.columns, t.n, cells, t.nu, t.log_nu) && held;
        const Outcome o = solve(t, a, held);
        scatter_plan(t, o.u, o.v, plan, M, N);
        a.value[b] = (float)value_of(t, o, a.epsilon);
        a.error[b] = (float)o.error;
        a.used[b] = o.used;
      });
}

}  // namespace vf::VF_ISA
