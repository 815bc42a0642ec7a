// ipot: plan [B, M, N] from cost [B, M, N], one thread block a pair. The method is in transport.cuh.
#include "ipot.h"
#include "transport.cuh"

namespace vf {
namespace {

template <int R>
__global__ void __launch_bounds__(THREADS, 1)
    ipot_kernel(CudaPairs pairs, const float* cost, float* plan, double step, int iterations, int inner, bool fits) {
  extern __shared__ __align__(128) char memory[];
  char* free = memory;
  const int64_t b = blockIdx.x;
  const int M = pairs.M, N = pairs.N;
  Pair p = make_pair(free, pairs.text_pad + b * M, pairs.image_pad + b * N, nullptr, nullptr, M, N);
  float* partial = reinterpret_cast<float*>(free);
  free += PARTIAL_BYTES;
  take_costs(p, cost + b * M * N, N, fits ? reinterpret_cast<float*>(free) : nullptr);
  transport<R>(p, step, iterations, inner, partial);
  finish_plan(p, step * iterations, plan + b * M * N, M, N);
}

template <int R>
int run(const CudaPairs& pairs, const float* cost, float* plan, double step, int iterations, int inner, void* stream) {
  size_t limit;
  if (int e = shared_limit(&limit)) return e;
  const size_t fixed = pair_bytes(pairs.M, pairs.N) + PARTIAL_BYTES, matrix = size_t(pairs.M) * pairs.N * 4;
  const bool fits = fixed + matrix <= limit;
  return launch(ipot_kernel<R>, pairs.B, fixed + (fits ? matrix : 0), stream, pairs, cost, plan, step, iterations,
                inner, fits);
}

}  // namespace

int cuda_ipot(CudaPairs pairs, const float* cost, float* plan, double beta, int iterations, int inner, void* stream) {
  const double step = 1.4426950408889634 / beta;
  auto* chosen = pairs.M <= 5 * WARPS ? &run<5> : &run<8>;
  return chosen(pairs, cost, plan, step, iterations, inner, stream);
}

}  // namespace vf
