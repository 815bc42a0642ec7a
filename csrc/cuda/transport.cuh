// IPOT in one thread block, shared by ipot.cu and word_patch_distance.cu.
//
// With A = exp(-C/beta), T_t = diag(u) A^t diag(v) (A^t entry by entry):
//   iteration t:  v_j = 1 / (n sum_i a_i A_ij^t),  u'_i = 1 / (m sum_j A_ij^t v_j),  a = u'^2 / u,  u = u';  u = 1, a = 1/m at first
//   (a carries sigma over; with inner > 1 the further steps use a = u').
// So only A^t changes, and the state is a, u and v. t C log2(e)/beta reaches 1e5, where float has lost the fraction: it is
// split exactly into whole + fraction, and u, v are (exponent, factor) pairs with whole exponents, which add without rounding.
//
// Memory. Only real rows and columns are visited (index lists). Costs lie in shared memory, or in global memory where they
// do not fit, and are never written. Two loops:
//   linear  q = A^t in registers, R rows x 8 columns a thread, updated by one multiplication; rebuilt from the costs every
//           `window` iterations and for the last, so that nothing drifts or underflows. Warps own rows (sums by shuffles, u and a stay in
//           registers), lanes own columns (sums across warps through shared memory): two barriers an iteration.
//   scaled  for small beta, or where the registers do not suffice: each sum takes its largest exponent out first.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace vf {
namespace {

constexpr float REACH = 24.f;    // by how many powers of two q may shrink between two rebuilds
constexpr float LONGEST = 16.f;  // iterations between two rebuilds
constexpr float LOWEST = -1e9f;
constexpr unsigned ALL = 0xffffffffu;
constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int COLUMNS = 8;  // 32 times as many columns at most in the linear loop

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int k = 16; k; k >>= 1) x += __shfl_xor_sync(ALL, x, k);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int k = 16; k; k >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL, x, k));
  return x;
}

// The same value in every thread; `buffer` holds 32 floats. Every thread of the block must come here.
template <class Op>
__device__ float block_all(float x, float* buffer, Op across_warp, float nothing) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  x = across_warp(x);
  __syncthreads();
  if (lane == 0) buffer[warp] = x;
  __syncthreads();
  return across_warp(lane < WARPS ? buffer[lane] : nothing);
}

__device__ __forceinline__ float block_sum(float x, float* buffer) {
  return block_all(x, buffer, [](float y) { return warp_sum(y); }, 0.f);
}

// Positions of the real entries of a mask row, in order, by one warp; returns how many. weight: entries of 0 count as padding.
__device__ inline int real_positions(const uint8_t* pad, const float* weight, int size, int* at) {
  const int lane = threadIdx.x % 32;
  int count = 0;
  for (int first = 0; first < size; first += 32) {
    const int i = first + lane;
    const bool real = i < size && !pad[i] && (!weight || weight[i] != 0.f);
    const unsigned votes = __ballot_sync(ALL, real);
    if (real) at[count + __popc(votes & ((1u << lane) - 1))] = i;
    count += __popc(votes);
  }
  return count;
}

// One pair in shared memory. Rows and columns are numbered over the real ones only, 0..m-1 and 0..n-1.
struct Pair {
  int m, n;
  int *row, *column;                       // where they are in the padded matrix
  float *u_exponent, *u, *a_exponent, *a;  // [M]
  float *v_exponent, *v;                   // [N]
  float* buffer;                           // [32]
  const float* cost;                       // cost of (i, j) is cost[row_offset[i] + column_offset[j]]
  int *row_offset, *column_offset;
  __device__ float at(int i, int j) const { return cost[row_offset[i] + column_offset[j]]; }
};

__host__ __device__ constexpr size_t pair_bytes(int M, int N) { return (size_t(6) * M + size_t(4) * N + 32 + 8) * 4; }

// Lays the arrays out from `memory` on and finds the real rows and columns. Ends with a barrier.
__device__ inline Pair make_pair(char*& memory, const uint8_t* text_pad, const uint8_t* image_pad,
                                 const float* text_weight, const float* image_weight, int M, int N) {
  Pair p;
  auto floats = [&memory](int count) {
    float* result = reinterpret_cast<float*>(memory);
    memory += size_t(count) * 4;
    return result;
  };
  p.u_exponent = floats(M), p.u = floats(M), p.a_exponent = floats(M), p.a = floats(M);
  p.v_exponent = floats(N), p.v = floats(N), p.buffer = floats(32);
  p.row = reinterpret_cast<int*>(floats(M)), p.row_offset = reinterpret_cast<int*>(floats(M));
  p.column = reinterpret_cast<int*>(floats(N)), p.column_offset = reinterpret_cast<int*>(floats(N));
  int* counts = reinterpret_cast<int*>(p.buffer);
  if (threadIdx.x < 32) {
    const int m = real_positions(text_pad, text_weight, M, p.row),
              n = real_positions(image_pad, image_weight, N, p.column);
    if (threadIdx.x == 0) counts[0] = m, counts[1] = n;
  }
  __syncthreads();
  p.m = counts[0], p.n = counts[1];
  if (p.m == 0 || p.n == 0) p.m = p.n = 0;  // nothing to move to: nothing moves
  __syncthreads();
  return p;
}

// Read costs from a padded matrix [M, stride]; copy them to `room` first unless it is null. Ends with a barrier.
__device__ inline void take_costs(Pair& p, const float* matrix, int stride, float* room) {
  if (room)
    for (int i = threadIdx.x / 32; i < p.m; i += WARPS)
      for (int j = threadIdx.x % 32; j < p.n; j += 32)
        room[i * p.n + j] = matrix[int64_t(p.row[i]) * stride + p.column[j]];
  for (int i = threadIdx.x; i < p.m; i += THREADS) p.row_offset[i] = room ? i * p.n : p.row[i] * stride;
  for (int j = threadIdx.x; j < p.n; j += THREADS) p.column_offset[j] = room ? j : p.column[j];
  p.cost = room ? room : matrix;
  __syncthreads();
}

// 2^(exponent - step cost), step = rounded + rest.
struct Step {
  float rounded, rest;
  __device__ explicit Step(double step) : rounded(float(step)), rest(float(step - double(rounded))) {}
  __device__ float power(float exponent, float cost) const {
    const float whole = rintf(rounded * cost);
    return exp2f((exponent - whole) - fmaf(rest, cost, fmaf(rounded, cost, -whole)));
  }
  __device__ float near(float exponent, float cost) const { return fmaf(-rounded, cost, exponent); }
};

__device__ __forceinline__ float some(float total) { return total == 0.f ? 1.f : total; }

// (exponent, factor) of 1 / (count * total * 2^top), the factor in [1, 2).
__device__ __forceinline__ void inverse(float top, float total, float weight, float& exponent, float& factor) {
  const float value = weight / some(total), shift = floorf(log2f(value));
  exponent = shift - top;
  factor = value * exp2f(-shift);
}

// sum_i x_i 2^(-step cost_ij) = total * 2^top for column j, by one thread.
__device__ inline float image_sum(const Pair& p, const Step& step, int j, const float* exponent, const float* factor,
                                  float& top) {
  top = LOWEST;
  const int column = p.column_offset[j];
#pragma unroll 4
  for (int i = 0; i < p.m; ++i) top = fmaxf(top, step.near(exponent[i], p.cost[p.row_offset[i] + column]));
  top = floorf(top);
  float total = 0;
#pragma unroll 4
  for (int i = 0; i < p.m; ++i) total += factor[i] * step.power(exponent[i] - top, p.cost[p.row_offset[i] + column]);
  return total;
}

// sum_j 2^(-step cost_ij) x_j = total * 2^top for row i, by one warp.
__device__ inline float text_sum(const Pair& p, const Step& step, int i, const float* exponent, const float* factor,
                                 float& top) {
  const int lane = threadIdx.x % 32, row = p.row_offset[i];
  top = LOWEST;
  for (int j = lane; j < p.n; j += 32) top = fmaxf(top, step.near(exponent[j], p.cost[row + p.column_offset[j]]));
  top = floorf(warp_max(top));
  float total = 0;
  for (int j = lane; j < p.n; j += 32)
    total += factor[j] * step.power(exponent[j] - top, p.cost[row + p.column_offset[j]]);
  return warp_sum(total);
}

__device__ inline void scaled_loop(Pair& p, double step, int iterations, int inner) {
  const float per_m = 1.f / p.m, per_n = 1.f / p.n;
  for (int i = threadIdx.x; i < p.m; i += THREADS)
    p.u_exponent[i] = p.a_exponent[i] = 0.f, p.u[i] = 1.f, p.a[i] = per_m;
  __syncthreads();
  for (int t = 1; t <= iterations; ++t) {
    const Step now(step * t);
    for (int k = 0; k < inner; ++k) {
      for (int j = threadIdx.x; j < p.n; j += THREADS) {
        float top;
        const float total = image_sum(p, now, j, p.a_exponent, p.a, top);
        inverse(top, total, per_n, p.v_exponent[j], p.v[j]);
      }
      __syncthreads();
      for (int i = threadIdx.x / 32; i < p.m; i += WARPS) {
        float top, exponent, factor;
        const float total = text_sum(p, now, i, p.v_exponent, p.v, top);
        inverse(top, total, per_m, exponent, factor);
        if (threadIdx.x % 32 == 0) {
          // What a is next depends on u before this iteration: keep that u until the last inner step.
          const bool last = k == inner - 1;
          p.a_exponent[i] = last ? 2.f * exponent - p.u_exponent[i] : exponent;
          p.a[i] = last ? factor * (factor / p.u[i]) : factor;
          if (last) p.u_exponent[i] = exponent, p.u[i] = factor;
        }
      }
      __syncthreads();
    }
  }
}

constexpr size_t PARTIAL_BYTES = size_t(WARPS) * 32 * COLUMNS * 4;

// Thread (warp w, lane l) holds rows w + WARPS r and columns l + 32 c. `partial` holds WARPS x 32 COLUMNS floats.
template <int R>
__device__ void linear_loop(Pair& p, double step, int window, int iterations, int inner, float* partial) {
  constexpr int C = COLUMNS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float per_m = 1.f / p.m, per_n = 1.f / p.n;
  float q[R][C], decay[R][C], a[R], u[R], u_exponent[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    a[r] = per_m, u[r] = 1.f, u_exponent[r] = 0.f;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int i = warp + WARPS * r, j = lane + 32 * c;
      decay[r][c] = i < p.m && j < p.n ? exp2f(-float(step) * p.at(i, j)) : 0.f;
    }
  }
  for (int j = threadIdx.x; j < p.n; j += THREADS) p.v_exponent[j] = 0.f, p.v[j] = 1.f;
  for (int done = 0; done < iterations;) {
    // Move whole powers of two from the factors into the exponents, then build q anew.
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float shift = floorf(log2f(u[r])), scale = exp2f(-shift);
      u_exponent[r] += shift, u[r] *= scale, a[r] *= scale;
    }
    for (int j = threadIdx.x; j < p.n; j += THREADS) p.v_exponent[j] += floorf(log2f(p.v[j]));
    __syncthreads();
    const Step now(step * (done + 1));
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int i = warp + WARPS * r, j = lane + 32 * c;
        q[r][c] = i < p.m && j < p.n ? now.power(u_exponent[r] + p.v_exponent[j], p.at(i, j)) : 0.f;
      }
    const int stop = min(done + window, max(iterations - 1, done + 1));  // the last iteration has a new q
    for (; done < stop; ++done) {
      float old[R];
#pragma unroll
      for (int r = 0; r < R; ++r) old[r] = u[r];
      for (int k = 0; k < inner; ++k) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          float sum = 0;
#pragma unroll
          for (int r = 0; r < R; ++r) sum = fmaf(q[r][c], a[r], sum);
          partial[warp * (32 * C) + lane + 32 * c] = sum;
        }
        __syncthreads();
        for (int j = threadIdx.x; j < p.n; j += THREADS) {
          float sum = 0;
#pragma unroll
          for (int w = 0; w < WARPS; ++w) sum += partial[w * (32 * C) + j];
          p.v[j] = per_n / some(sum);
        }
        __syncthreads();
        float sums[R];
#pragma unroll
        for (int r = 0; r < R; ++r) sums[r] = 0;
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const int j = lane + 32 * c;
          const float v = j < p.n ? p.v[j] : 0.f;
#pragma unroll
          for (int r = 0; r < R; ++r) sums[r] = fmaf(q[r][c], v, sums[r]);
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
          u[r] = per_m / some(warp_sum(sums[r]));
          a[r] = u[r];
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        a[r] = u[r] * (u[r] / old[r]);
#pragma unroll
        for (int c = 0; c < C; ++c) q[r][c] *= decay[r][c];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int i = warp + WARPS * r;
    if (lane == 0 && i < p.m) p.u_exponent[i] = u_exponent[r], p.u[i] = u[r];
  }
  __syncthreads();
}

// u and v of the pair after all iterations. Begins and ends with the block in step.
template <int R>
__device__ void transport(Pair& p, double step, int iterations, int inner, float* partial) {
  if (p.m == 0) return;
  if (p.m <= R * WARPS && p.n <= 32 * COLUMNS) {
    float furthest = 0;
    for (int i = threadIdx.x / 32; i < p.m; i += WARPS)
      for (int j = threadIdx.x % 32; j < p.n; j += 32) furthest = fmaxf(furthest, fabsf(p.at(i, j)));
    furthest = block_all(furthest, p.buffer, [](float x) { return warp_max(x); }, 0.f);
    const float reach = furthest * float(step);  // by so many powers of two an iteration can change an entry
    if (reach <= REACH) {
      linear_loop<R>(p, step, int(fminf(REACH / fmaxf(reach, 1.f), LONGEST)), iterations, inner, partial);
      return;
    }
  }
  scaled_loop(p, step, iterations, inner);
}

// Writes T = diag(u) 2^(-step cost) diag(v) unless plan is null (zero on padding) and returns this thread's share of <C, T>.
__device__ inline float finish_plan(const Pair& p, double step, float* plan, int M, int N) {
  if (plan)
    for (int64_t i = threadIdx.x; i < int64_t(M) * N; i += THREADS) plan[i] = 0.f;
  __syncthreads();
  const Step now(step);
  float distance = 0;
  for (int i = threadIdx.x / 32; i < p.m; i += WARPS)
    for (int j = threadIdx.x % 32; j < p.n; j += 32) {
      const float cost = p.at(i, j);
      const float value = now.power(p.u_exponent[i] + p.v_exponent[j], cost) * p.u[i] * p.v[j];
      if (plan) plan[int64_t(p.row[i]) * N + p.column[j]] = value;
      distance = fmaf(cost, value, distance);
    }
  return distance;
}

// --- host side --------------------------------------------------------------------------------------------------------

inline int shared_limit(size_t* bytes) {
  int device = 0, value = 0;
  if (cudaError_t e = cudaGetDevice(&device)) return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return e;
  *bytes = size_t(value);
  return 0;
}

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), int64_t blocks, size_t bytes, void* stream, Args... args) {
  if (blocks == 0) return 0;
  if (cudaError_t e = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)))
    return e;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

}  // namespace
}  // namespace vf
