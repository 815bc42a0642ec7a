// IPOT for one sample, in scaling form on top of transport.h. With A = 2^(alpha_i + gamma_j - c_ij) and Q = A o T:
//
//   T_t = diag(u) (G_0 o A^t) diag(v);   x = u sigma;   v_j = m / sum_i G_ij x_i  (delta first, image)
//                                                       u_i = n / sum_j G_ij v_j  (then sigma, text)
//   sigma = u / u_before carries over, so the next x is u^2 / u_before. With inner > 1, x = u and again.
//
// alpha and gamma only choose a gauge: a factor of all sigmas changes nothing, so alpha starts at 0; gamma as the smallest
// cost of each column, which is near log2 of delta. After an `open` they are the log2 of the last sigma and delta, which a
// step near the fixed point repeats. Thus u and v stay near 1 and G rarely has to be opened anew, which takes as long as
// 10 to 20 steps: not once in 50 iterations at beta 0.5 on costs like ViLT's.
#pragma once
#include "transport.h"

namespace vf::VF_ISA {

constexpr int64_t kLongest = 64;  // steps on one G: roundings of A^s stay below 64 ulp

// G = T' before the first iteration, and A with alpha = 0 and gamma = the smallest cost of each column.
static void open_first(const Transport& t) {
  const F unit = set1(-(float)t.unit);
  for (int64_t i = 0; i < t.m; ++i)
    for (int64_t j = 0; j < t.width; j += kLanes) {
      const int64_t p = i * t.ld + j;
      store(t.a + p, exp2_or_zero((load(t.c + p) - load(t.least + j)) * unit));
      store(t.g + p, set1(1));
    }
}

// G = T' after `done` iterations and A, both from the costs. Returns how many steps G is good for: entries lost at once
// (G < 2^-126) must not grow back by more than 2^30 unseen.
static int64_t open_powers(const Transport& t, double done) {
  F rate = set1(0);
  open_plan(t, done);
  for (int64_t i = 0; i < t.m; ++i) {
    float *a = t.a + i * t.ld, *g = t.g + i * t.ld;
    exponents(t.c + i * t.ld, t.width, t.alpha[i], t.gamma, t.unit, a);
    for (int64_t j = 0; j < t.width; j += kLanes) {
      const F bits = load(a + j);
      const F lost = select_lt(load(g + j), set1(0x1p-126f), bits, set1(0));
      rate = max(rate, max(lost, select_lt(set1(126), bits, bits, set1(0))));  // too large for A: no step at all
      store(a + j, exp2_or_zero(bits));
    }
  }
  const float fastest = reduce_max(rate);
  return fastest * kLongest > 30 ? (int64_t)(30 / fastest) : kLongest;
}

// One iteration on G; false if it leaves the safe range (then nothing but G and the new u, v has changed).
static bool ipot_step(const Transport& t, bool backwards, const float* u, float* new_u, float* v, int64_t inner) {
  Range columns = sweep<true, true>(t, backwards, t.x, v), rows = scale_rows(t, new_u);
  for (int64_t k = 1; k < inner && safe(rows, columns); ++k) {
    backwards = !backwards;
    columns = sweep<false, true>(t, backwards, new_u, v);
    rows = scale_rows(t, new_u);
  }
  if (!safe(rows, columns)) return false;
  for (int64_t i = 0; i < t.m; i += kLanes) {
    const F y = load(new_u + i);
    store(t.x + i, y * (y / load(u + i)));
  }
  return true;
}

// Moves s accepted steps into the potentials; alpha and gamma become log2 of the last sigma and delta.
static void ipot_close(const Transport& t, int64_t s) {
  const float *u = t.u[s % 3], *last_u = t.u[(s + 2) % 3], *v = t.v[s % 3], *last_v = t.v[(s + 2) % 3];
  for (int64_t i = 0; i < t.m; ++i) {
    t.phi[i] += (double)s * t.alpha[i] + log2((double)u[i]);
    t.alpha[i] += log2((double)u[i] / (double)last_u[i]);
  }
  for (int64_t j = 0; j < t.n; ++j) {
    t.psi[j] += (double)s * t.gamma[j] + log2((double)v[j]);
    t.gamma[j] += log2((double)v[j] / (double)last_v[j]);
  }
}

// One iteration in logarithms, from `done` iterations.
static void ipot_in_logs(const Transport& t, double done, int64_t inner) {
  for (int64_t j = 0; j < t.n; ++j) t.last_psi[j] = t.psi[j];
  for (int64_t i = 0; i < t.m; ++i) {
    t.last_phi[i] = t.phi[i];
    t.phi[i] += t.alpha[i];  // x = u sigma
  }
  for (int64_t k = 0; k < inner; ++k) {
    columns_lse(t, done + 1);
    rows_lse(t, done + 1);
  }
  for (int64_t i = 0; i < t.m; ++i) t.alpha[i] = t.phi[i] - t.last_phi[i];
  for (int64_t j = 0; j < t.n; ++j) t.gamma[j] = t.psi[j] - t.last_psi[j];
}

struct Scaling { const float *u, *v; };

// Costs in t.c, finite, and t.least -> T' = u G v.
static Scaling ipot_solve(Transport& t, double beta, int64_t iterations, int64_t inner) {
  start(t, kLog2E / beta);
  for (int64_t j = 0; j < t.n; ++j) t.gamma[j] = (double)t.least[j] * t.unit;
  int64_t done = 0, patience = 1;
  while (done < iterations) {
    int64_t most = kLongest;
    if (done) most = open_powers(t, (double)done);
    else open_first(t);
    most = min64(most, iterations - done);
    fill(t.u[0], round_up(t.m, kLanes), 1.f);
    fill(t.x, t.m, 1.f);  // sigma 2^-alpha
    fill(t.v[0], t.width, 1.f);
    int64_t s = 0;
    while (s < most && ipot_step(t, s % 2, t.u[s % 3], t.u[(s + 1) % 3], t.v[(s + 1) % 3], inner)) ++s;
    if (done + s == iterations) return {t.u[s % 3], t.v[s % 3]};
    if (s) {
      ipot_close(t, s);
      done += s;
    }
    if (s >= 4) {
      patience = 1;
      continue;
    }
    for (int64_t k = 0; k < patience && done < iterations; ++k) ipot_in_logs(t, (double)done++, inner);
    patience = min64(2 * patience, 16);
  }
  open_plan(t, (double)iterations);
  fill(t.u[0], t.m, 1.f);
  fill(t.v[0], t.width, 1.f);
  return {t.u[0], t.v[0]};
}

}  // namespace vf::VF_ISA
