// word_patch_distance: from hidden states [B, M, D] and [B, N, D] to distances [B], one thread block a pair, one launch.
//
//   C_ij = 1 - t_i . v_j / (max(|t_i|, 1e-5) max(|v_j|, 1e-5));   T = ipot(C);   distance = sum_ij C_ij T_ij
//
// Products in tiles of 48 x 128 over slabs of D in shared memory, which are copied asynchronously, one or three ahead:
// float16 and bfloat16 in tensor cores, products exact, sums float32; float32 in ordinary multiply-adds. Norms come from the
// same slabs, so hidden states are read once a tile. Rows are the real ones only; padding is never read. Costs stay in
// shared memory, next to which IPOT runs (transport.cuh); only where M x N costs do not fit are they written to `scratch`.
// The plan is written only when asked for.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <mma.h>

#include "transport.cuh"
#include "word_patch_distance.h"

namespace vf {
namespace {

constexpr int ROWS = 5;  // rows a warp in the linear loop: up to 40 words
constexpr int TILE_M = 48, TILE_N = 128, SLAB_BYTES = 128,
              PAD_BYTES = 16;  // a slab row is 128 bytes of a hidden state, padded against bank conflicts
constexpr int STAGE_BYTES = (TILE_M + TILE_N) * (SLAB_BYTES + PAD_BYTES);
constexpr int PATCH = 16 * 16;  // one fragment a warp, on its way to the costs, where the slabs were
constexpr size_t SCALE_BYTES = (TILE_M + TILE_N) * 4;
constexpr int FEW = 2, MANY = 4;  // stages; many where shared memory allows

template <class T>
struct States {
  const T *text, *image;  // of one pair, rows of D
  int D;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Sum of squares of a slab row.
template <class T>
__device__ float squares(const char* row) {
  constexpr int CHUNK = 16 / sizeof(T);
  float sum = 0;
#pragma unroll
  for (int chunk = 0; chunk < SLAB_BYTES / 16; ++chunk) {
    alignas(16) T x[CHUNK];
    *reinterpret_cast<float4*>(x) = reinterpret_cast<const float4*>(row)[chunk];
    float part = 0;
#pragma unroll
    for (int k = 0; k < CHUNK; ++k) part = fmaf(widen(x[k]), widen(x[k]), part);
    sum += part;
  }
  return sum;
}

// Starts copying one slab of `rows` rows (real row first + r, zeros past the last) of SLAB_BYTES from column d.
template <class T>
__device__ void copy_slab(const T* states, int D, const int* at, int first, int count, int rows, int d, char* to) {
  constexpr int CHUNK = 16 / sizeof(T), CHUNKS = SLAB_BYTES / 16;
  for (int k = threadIdx.x; k < rows * CHUNKS; k += THREADS) {
    const int r = k / CHUNKS, chunk = k % CHUNKS, column = d + chunk * CHUNK;
    const bool real = first + r < count && column < D;
    const T* from = real ? states + int64_t(at[first + r]) * D + column : states;
    __pipeline_memcpy_async(to + r * (SLAB_BYTES + PAD_BYTES) + chunk * 16, from, 16, real ? 0 : 16);
  }
}

// One tile of dot products, given to store(i, j, value) with i, j relative to the tile.
template <class T>
struct TensorTile {  // warp w: columns 16 w .. 16 w + 15, three fragments of 16 rows
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sum[3];
  __device__ TensorTile() {
    for (auto& s : sum) nvcuda::wmma::fill_fragment(s, 0.f);
  }
  __device__ void add(const char* text, const char* image) {
    using namespace nvcuda;
    constexpr int LD = (SLAB_BYTES + PAD_BYTES) / 2;
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int k = 0; k < SLAB_BYTES / 2; k += 16) {
      wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> b;
      wmma::load_matrix_sync(b, reinterpret_cast<const T*>(image) + warp * 16 * LD + k, LD);
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> a;
        wmma::load_matrix_sync(a, reinterpret_cast<const T*>(text) + r * 16 * LD + k, LD);
        wmma::mma_sync(sum[r], a, b, sum[r]);
      }
    }
  }
  template <class Store>
  __device__ void give(float* patch, Store store) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int r = 0; r < 3; ++r) {
      nvcuda::wmma::store_matrix_sync(patch + warp * PATCH, sum[r], 16, nvcuda::wmma::mem_row_major);
      __syncwarp();
      for (int k = lane; k < PATCH; k += 32) store(r * 16 + k / 16, warp * 16 + k % 16, patch[warp * PATCH + k]);
      __syncwarp();
    }
  }
};

template <>
struct TensorTile<float> {  // thread (y, x) of 16 x 16: rows y + 16 r, columns x + 16 c
  float sum[3][8] = {};
  __device__ void add(const char* text, const char* image) {
    constexpr int LD = (SLAB_BYTES + PAD_BYTES) / 4;
    const float* a = reinterpret_cast<const float*>(text) + (threadIdx.x / 16) * LD;
    const float* b = reinterpret_cast<const float*>(image) + (threadIdx.x % 16) * LD;
#pragma unroll 2
    for (int k = 0; k < SLAB_BYTES / 4; k += 4) {
      float4 row[3];
#pragma unroll
      for (int r = 0; r < 3; ++r) row[r] = *reinterpret_cast<const float4*>(a + r * 16 * LD + k);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float4 column = *reinterpret_cast<const float4*>(b + c * 16 * LD + k);
#pragma unroll
        for (int r = 0; r < 3; ++r)
          sum[r][c] += fmaf(row[r].x, column.x, row[r].y * column.y) + fmaf(row[r].z, column.z, row[r].w * column.w);
      }
    }
  }
  template <class Store>
  __device__ void give(float*, Store store) {
#pragma unroll
    for (int r = 0; r < 3; ++r)
#pragma unroll
      for (int c = 0; c < 8; ++c) store(threadIdx.x / 16 + 16 * r, threadIdx.x % 16 + 16 * c, sum[r][c]);
  }
};

// Costs of all real pairs into costs[i n + j]; `scale` holds TILE_M + TILE_N floats. Ends with a barrier.
template <class T>
__device__ void cosine_costs(const Pair& p, const States<T>& s, int stages, char* memory, float* scale, float* costs) {
  constexpr int DEPTH = SLAB_BYTES / sizeof(T), ROW = SLAB_BYTES + PAD_BYTES;
  const int slabs = (s.D + DEPTH - 1) / DEPTH, mine = threadIdx.x;  // this thread squares that row of each slab
  for (int i0 = 0; i0 < p.m; i0 += TILE_M)
    for (int j0 = 0; j0 < p.n; j0 += TILE_N) {
      TensorTile<T> tile;
      float square = 0;
      auto copy = [&](int slab) {
        char* stage = memory + (slab % stages) * STAGE_BYTES;
        if (slab < slabs) {
          copy_slab(s.text, s.D, p.row, i0, p.m, TILE_M, slab * DEPTH, stage);
          copy_slab(s.image, s.D, p.column, j0, p.n, TILE_N, slab * DEPTH, stage + TILE_M * ROW);
        }
        __pipeline_commit();  // also of nothing, so that the count of later copies stays the same
      };
      for (int slab = 0; slab < stages - 1; ++slab) copy(slab);
      for (int slab = 0; slab < slabs; ++slab) {
        if (stages == FEW) {
          __pipeline_wait_prior(FEW - 2);
        } else {
          __pipeline_wait_prior(MANY - 2);
        }
        __syncthreads();  // this slab is there for all, and nobody needs the one before, whose place the next copy takes
        copy(slab + stages - 1);
        const char* stage = memory + (slab % stages) * STAGE_BYTES;
        tile.add(stage, stage + TILE_M * ROW);
        if (mine < TILE_M + TILE_N) square += squares<T>(stage + mine * ROW);
      }
      if (mine < TILE_M + TILE_N) scale[mine] = 1.f / fmaxf(sqrtf(square), 1e-5f);
      __syncthreads();
      tile.give(reinterpret_cast<float*>(memory), [&](int i, int j, float dot) {
        if (i0 + i < p.m && j0 + j < p.n) costs[(i0 + i) * p.n + j0 + j] = 1.f - dot * scale[i] * scale[TILE_M + j];
      });
      __syncthreads();
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1)
    word_patch_distance_kernel(CudaPairs pairs, const T* text, const T* image, int D, float* distance, float* plan,
                               float* scratch, double step, int iterations, int inner, int stages) {
  extern __shared__ __align__(128) char memory[];
  const int64_t b = blockIdx.x;
  const int M = pairs.M, N = pairs.N;
  char* free = memory + stages * STAGE_BYTES;
  float* scale = reinterpret_cast<float*>(free);
  free += SCALE_BYTES;
  Pair p = make_pair(free, pairs.text_pad + b * M, pairs.image_pad + b * N, nullptr, nullptr, M, N);
  float* costs = scratch ? scratch + b * M * N : reinterpret_cast<float*>(free);
  cosine_costs(p, States<T>{text + b * M * D, image + b * N * D, D}, stages, memory, scale, costs);
  for (int i = threadIdx.x; i < p.m; i += THREADS) p.row_offset[i] = i * p.n;
  for (int j = threadIdx.x; j < p.n; j += THREADS) p.column_offset[j] = j;
  p.cost = costs;
  __syncthreads();
  static_assert(PARTIAL_BYTES <= FEW * STAGE_BYTES, "the sums across warps take the place of the slabs");
  transport<ROWS>(p, step, iterations, inner, reinterpret_cast<float*>(memory));
  float share = finish_plan(p, step * iterations, plan ? plan + b * M * N : nullptr, M, N);
  share = block_sum(share, p.buffer);
  if (threadIdx.x == 0) distance[b] = share;
}

size_t bytes_without_costs(int M, int N, int stages) {
  return size_t(stages) * STAGE_BYTES + SCALE_BYTES + pair_bytes(M, N);
}

template <class T>
int run(const CudaPairs& pairs, const void* text, const void* image, int D, float* distance, float* plan,
        float* scratch, double step, int iterations, int inner, void* stream) {
  size_t limit;
  if (int e = shared_limit(&limit)) return e;
  const size_t costs = scratch ? 0 : size_t(pairs.M) * pairs.N * 4;
  const int stages = bytes_without_costs(pairs.M, pairs.N, MANY) + costs <= limit ? MANY : FEW;
  return launch(word_patch_distance_kernel<T>, pairs.B, bytes_without_costs(pairs.M, pairs.N, stages) + costs, stream,
                pairs, static_cast<const T*>(text), static_cast<const T*>(image), D, distance, plan, scratch, step,
                iterations, inner, stages);
}

}  // namespace

int cuda_word_patch_scratch(int M, int N, int* needed) {
  size_t limit;
  if (int e = shared_limit(&limit)) return e;
  *needed = bytes_without_costs(M, N, FEW) + size_t(M) * N * 4 > limit;
  return 0;
}

int cuda_word_patch_distance(CudaPairs pairs, const void* text, const void* image, int dtype, int D, float* distance,
                             float* plan, float* scratch, double beta, int iterations, int inner, void* stream) {
  const double step = 1.4426950408889634 / beta;
  auto* chosen = dtype == CUDA_F32 ? &run<float> : dtype == CUDA_F16 ? &run<__half> : &run<__nv_bfloat16>;
  return chosen(pairs, text, image, D, distance, plan, scratch, step, iterations, inner, stream);
}

}  // namespace vf
