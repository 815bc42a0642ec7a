// sinkhorn: entropic plans [B, M, N], one thread block a pair, with the numbers and sums of transport.cuh.
//
//   K = exp(-C/epsilon);  v = 1;  repeat:  u_i = mu_i / sum_j K_ij v_j,  v_j = nu_j / sum_i u_i K_ij
//   T = diag(u) K diag(v);  error = sum_i |u_i sum_j K_ij v_j - mu_i|  (these sums are what the next u needs anyway)
//   <C, T> + epsilon KL(T || mu nu^t) = epsilon sum_ij T_ij (log u_i/mu_i + log v_j/nu_j)
//
// A pair stops as soon as its own error has reached the tolerance: the block decides for itself.
#include "sinkhorn.h"
#include "transport.cuh"

namespace vf {
namespace {

struct SinkhornOut {
  float *plan, *value;
  int64_t* used;
  float* error;
};

constexpr float LEAST_SHARE = 0x1p-100f;  // nothing to a float32 plan, but it has a logarithm

// Shares of the real entries, sum 1, uniform without weights. By the whole block; ends with a barrier.
__device__ void shares(const float* weight, const int* at, int count, float* share, float* buffer) {
  float most = 0, sum = 0;
  for (int i = threadIdx.x; i < count; i += THREADS) most = fmaxf(most, share[i] = weight ? weight[at[i]] : 1.f);
  most = block_all(most, buffer, [](float x) { return warp_max(x); }, 0.f);
  for (int i = threadIdx.x; i < count; i += THREADS) sum += share[i] /= most;  // so that no sum overflows
  sum = block_sum(sum, buffer);
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const float x = share[i] / sum;
    share[i] = x < LEAST_SHARE ? LEAST_SHARE : x;  // NaN stays
  }
  __syncthreads();
}

// r_i = sum_j K_ij v_j as (top, total) for all rows. Ends with a barrier.
__device__ void text_pass(const Pair& p, const Step& step, float* top, float* total) {
  for (int i = threadIdx.x / 32; i < p.m; i += WARPS) {
    float at, sum = text_sum(p, step, i, p.v_exponent, p.v, at);
    if (threadIdx.x % 32 == 0) top[i] = at, total[i] = sum;
  }
  __syncthreads();
}

__device__ float text_error(const Pair& p, const float* mu, const float* top, const float* total) {
  float error = 0;
  for (int i = threadIdx.x; i < p.m; i += THREADS)
    error += fabsf(p.u[i] * total[i] * exp2f(p.u_exponent[i] + top[i]) - mu[i]);
  return block_sum(error, p.buffer);
}

__global__ void __launch_bounds__(THREADS, 1)
    sinkhorn_kernel(CudaPairs pairs, const float* cost, const float* text_weight, const float* image_weight,
                    SinkhornOut out, double step, int iterations, float tolerance, bool fits) {
  extern __shared__ __align__(128) char memory[];
  char* free = memory;
  const int64_t b = blockIdx.x;
  const int M = pairs.M, N = pairs.N;
  if (text_weight) text_weight += b * M;
  if (image_weight) image_weight += b * N;
  Pair p = make_pair(free, pairs.text_pad + b * M, pairs.image_pad + b * N, text_weight, image_weight, M, N);
  float *mu = p.a, *top = p.a_exponent, *total = reinterpret_cast<float*>(free), *nu = total + M;
  take_costs(p, cost + b * M * N, N, fits ? nu + N : nullptr);
  shares(text_weight, p.row, p.m, mu, p.buffer);
  shares(image_weight, p.column, p.n, nu, p.buffer);

  const Step now(step);
  for (int j = threadIdx.x; j < p.n; j += THREADS) p.v_exponent[j] = 0.f, p.v[j] = 1.f;
  for (int i = threadIdx.x; i < p.m; i += THREADS) p.u_exponent[i] = 0.f, p.u[i] = 1.f;
  __syncthreads();
  int used = 0;
  float error = 0;
  if (p.m > 0) {
    text_pass(p, now, top, total);
    while (used < iterations) {
      for (int i = threadIdx.x; i < p.m; i += THREADS) inverse(top[i], total[i], mu[i], p.u_exponent[i], p.u[i]);
      __syncthreads();
      for (int j = threadIdx.x; j < p.n; j += THREADS) {
        float at;
        const float sum = image_sum(p, now, j, p.u_exponent, p.u, at);
        inverse(at, sum, nu[j], p.v_exponent[j], p.v[j]);
      }
      __syncthreads();
      text_pass(p, now, top, total);
      ++used;
      if (tolerance >= 0.f || used == iterations) {
        error = text_error(p, mu, top, total);
        if (tolerance >= 0.f && !(error > tolerance)) break;
      }
    }
  }
  finish_plan(p, step, out.plan + b * M * N, M, N);
  float value = 0;
  for (int i = threadIdx.x / 32; i < p.m; i += WARPS) {
    const float log_u = p.u_exponent[i] + log2f(p.u[i] / mu[i]);
    for (int j = threadIdx.x % 32; j < p.n; j += 32) {
      const float plan = now.power(p.u_exponent[i] + p.v_exponent[j], p.at(i, j)) * p.u[i] * p.v[j];
      value = fmaf(plan, log_u + (p.v_exponent[j] + log2f(p.v[j] / nu[j])), value);
    }
  }
  value = block_sum(value, p.buffer);
  if (threadIdx.x == 0) out.value[b] = value / now.rounded, out.used[b] = used, out.error[b] = error;
}

}  // namespace

int cuda_sinkhorn(CudaPairs pairs, const float* cost, const float* text_weight, const float* image_weight, float* plan,
                  float* value, int64_t* used, float* error, double epsilon, int iterations, double tolerance,
                  void* stream) {
  size_t limit;
  if (int e = shared_limit(&limit)) return e;
  const size_t fixed = pair_bytes(pairs.M, pairs.N) + size_t(4) * (pairs.M + pairs.N),
               matrix = size_t(pairs.M) * pairs.N * 4;
  const bool fits = fixed + matrix <= limit;
  return launch(sinkhorn_kernel, pairs.B, fixed + (fits ? matrix : 0), stream, pairs, cost, text_weight, image_weight,
                SinkhornOut{plan, value, used, error}, 1.4426950408889634 / epsilon, iterations, float(tolerance),
                fits);
}

}  // namespace vf
