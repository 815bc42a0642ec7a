// Samples of a batch for transport: their real rows and columns, compacted, each in the memory of one thread at a time.
//
// Memory: 3 m n floats a thread (costs, kernel, G), in L2 for ViLT's sizes (115 KB at 40 x 241).
#pragma once
#include <stdlib.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "masks.h"
#include "rows.h"
#include "team.h"

namespace vf::VF_ISA {

constexpr float kFar = 1e30f;  // cost of a column that is not there

struct FlushDenormals {  // entries of G that no longer matter must not cost 100 cycles each
#if defined(__SSE__)
  unsigned saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

struct Transport {
  int64_t m, n, width, ld;   // real rows and columns, columns in whole vectors, from row to row
  double unit;               // bits a unit of cost
  float *c, *a, *g;          // [m, ld]: costs, kernel of one proximal step (IPOT), plan without u and v
  float *u[3], *x, *r, *mu;  // [m, rounded up]: scalings of this step, the last and the one before; weights; row sums
  float *v[3], *nu, *hole;   // [width]: hole is 1 where there is no column
  float* least;              // [width]: smallest cost of the column, 0 where there is none
  float* partial;            // [m, kLanes]
  double *phi, *psi, *alpha, *gamma, *last_phi, *last_psi, *lift;
  double *log_mu, *log_nu;  // log2 of the weights of real rows and columns, also of those that no float holds
  int64_t *rows, *columns;  // which positions of the sample are real
};

// Rows lie an odd number of cache lines apart, so that a block of columns spreads over all sets of L1.
VF_INLINE int64_t row_stride(int64_t width) {
  return round_up(width, 16) + (width > 16 && round_up(width, 16) % 32 == 0 ? 16 : 0);
}

// Lays out a Transport for at most m x n; the kernel matrix only if asked for.
static size_t lay_out(Transport& t, Arena arena, int64_t m, int64_t n, bool kernel) {
  const int64_t mr = round_up(m, kLanes), width = round_up(n, kLanes), ld = row_stride(width);
  t.c = arena.take<float>(m * ld);
  t.a = arena.take<float>(kernel ? m * ld : 0);
  t.g = arena.take<float>(m * ld);
  t.partial = arena.take<float>(m * kLanes);
  float **of_rows[] = {&t.u[0], &t.u[1], &t.u[2], &t.x, &t.r, &t.mu},
        **of_columns[] = {&t.v[0], &t.v[1], &t.v[2], &t.nu, &t.hole, &t.least};
  double **row_logs[] = {&t.phi, &t.alpha, &t.last_phi, &t.log_mu},
         **column_logs[] = {&t.psi, &t.gamma, &t.last_psi, &t.lift, &t.log_nu};
  for (float** p : of_rows) *p = arena.take<float>(mr);
  for (float** p : of_columns) *p = arena.take<float>(width);
  for (double** p : row_logs) *p = arena.take<double>(mr);
  for (double** p : column_logs) *p = arena.take<double>(width);
  t.rows = arena.take<int64_t>(m);
  t.columns = arena.take<int64_t>(n);
  return arena.used;
}

struct Sample {
  int64_t index, m, n;  // m = n = 0 when there is no real row or no real column
};

static int larger_first(const void* a, const void* b) {
  const Sample *p = (const Sample*)a, *q = (const Sample*)b;
  const int64_t x = p->m * p->n, y = q->m * q->n;
  return x != y ? (x < y) - (x > y) : (p->index > q->index) - (p->index < q->index);
}

// A weight >= 0. From its bits: whether a denormal one is 0 must not depend on who set the FP mode of this thread.
VF_INLINE double weight_of(const float* weight, int64_t i) {
  uint32_t bits;
  memcpy(&bits, weight + i, sizeof bits);
  bits &= 0x7fffffff;
  return bits >> 23 ? weight[i] : bits * 0x1p-149;
}

// How many of the positions 0 .. size - 1 are real, and which, unless `at` is null.
static int64_t real_places(const uint8_t* pad, const float* weight, int64_t size, int64_t* at) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (pad[i] || (weight && weight_of(weight, i) == 0)) continue;
    if (at) at[count] = i;
    ++count;
  }
  return count;
}

// Calls work(b, t, extra) for every sample, the largest first so that no thread is left with a big one at the end.
// t.m, t.n, t.ld, t.rows and t.columns are set; `extra` points to extra_floats(largest m, largest n) floats.
template <class Extra, class Work>
static void for_samples(const Masks& k, const float* row_weight, const float* column_weight, int threads, bool kernel,
                        Extra extra_floats, Work work) {
  auto rows = [&](int64_t b, int64_t* at) {
    return real_places(k.text_pad + b * k.M, row_weight ? row_weight + b * k.M : nullptr, k.M, at);
  };
  auto columns = [&](int64_t b, int64_t* at) {
    return real_places(k.image_pad + b * k.N, column_weight ? column_weight + b * k.N : nullptr, k.N, at);
  };
  Sample* samples = (Sample*)malloc(sizeof(Sample) * (size_t)k.B);
  int64_t most_m = 0, most_n = 0;
  for (int64_t b = 0; b < k.B; ++b) {
    int64_t m = rows(b, nullptr), n = columns(b, nullptr);
    if (!m || !n) m = n = 0;
    samples[b] = {b, m, n};
    if (m > most_m) most_m = m;
    if (n > most_n) most_n = n;
  }
  qsort(samples, (size_t)k.B, sizeof(Sample), larger_first);
  if (threads > k.B) threads = (int)k.B;
  Transport probe;
  const size_t own = lay_out(probe, {nullptr, 0}, most_m, most_n, kernel);
  const size_t each = own + (size_t)round_up(extra_floats(most_m, most_n), 16) * sizeof(float);
  char* buffer = (char*)scratch_acquire(each * (size_t)threads);
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int rank = team_rank();
    char* mine = buffer + each * (size_t)rank;
    for (int64_t s; (s = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < k.B;) {
      const Sample& sample = samples[s];
      Transport t;
      lay_out(t, {mine, 0}, most_m, most_n, kernel);
      t.m = sample.m, t.n = sample.n, t.width = round_up(sample.n, kLanes), t.ld = row_stride(t.width);
      if (t.m) {
        rows(sample.index, t.rows);
        columns(sample.index, t.columns);
      }
      work(sample.index, t, (float*)(mine + own));
    }
  }
  scratch_release(buffer);
  free(samples);
}

// Compacts the costs [M, N] of a sample.
[[maybe_unused]] static void gather_costs(const Transport& t, const float* cost, int64_t N) {
  const bool dense = t.columns[t.n - 1] == t.n - 1;
  for (int64_t i = 0; i < t.m; ++i) {
    const float* from = cost + t.rows[i] * N;
    float* to = t.c + i * t.ld;
    if (dense) memcpy(to, from, (size_t)t.n * sizeof(float));
    else
      for (int64_t j = 0; j < t.n; ++j) to[j] = from[t.columns[j]];
    for (int64_t j = t.n; j < t.width; ++j) to[j] = kFar;
  }
}

}  // namespace vf::VF_ISA
