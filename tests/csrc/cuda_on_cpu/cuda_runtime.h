// Runs CUDA kernels on a CPU, for tests: just enough of the language and the runtime for the sources in csrc/cuda.
// Every thread of a block is a fiber; they take turns, in a different order after each barrier, and only change at barriers and
// shuffles. Blocks run one after another. Shared memory is full of NaN when a block starts. Slow, and blind to what depends
// on timing; what it shows is that indices, masks, barriers and arithmetic are right.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __align__(n)
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess = 0 };
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned a = 1) : x(a) {}
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline int emulated_shared_limit = 232448;  // tests make it small to see the paths of large pairs
inline char* emulated_shared_memory;  // of that many bytes, all `extern __shared__` arrays in one; the harness has it

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = emulated_shared_limit, cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline dim3 threadIdx, blockIdx, blockDim;
inline std::function<void()> body;

struct Barrier { int waiting = 0, generation = 0; };
inline Barrier block_barrier, warp_barriers[32];
inline uint64_t slots[32][32];

inline void wait(Barrier& barrier, int all) {
  const int generation = barrier.generation;
  if (++barrier.waiting == all) {
    barrier.waiting = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

inline void fiber_main() {
  body();
  fibers[threadIdx.x].done = true;
}

inline void run_block(unsigned threads) {
  fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(1 << 17);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (unsigned left = threads, turn = 0; left; ++turn)
    for (unsigned k = 0; k < threads; ++k) {
      const unsigned i = turn % 2 ? threads - 1 - k : k;  // now upwards, now downwards: a missing barrier shows
      if (fibers[i].done) continue;
      threadIdx.x = i;
      swapcontext(&scheduler, &fibers[i].context);
      left -= fibers[i].done;
    }
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  if (config->dynamicSmemBytes > size_t(emulated_shared_limit)) std::abort();
  blockDim = config->blockDim;
  for (unsigned b = 0; b < config->gridDim.x; ++b) {
    blockIdx = dim3(b);
    blockIdx.x = b;
    std::memset(emulated_shared_memory, 0xff, size_t(emulated_shared_limit));
    body = [&] { kernel(args...); };
    run_block(blockDim.x);
  }
  return cudaSuccess;
}

inline void __syncthreads() { wait(block_barrier, int(blockDim.x)); }
inline void __syncwarp() { wait(warp_barriers[threadIdx.x / 32], 32); }

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  std::memcpy(&slots[warp][lane], &x, 4);
  __syncwarp();
  float y;
  std::memcpy(&y, &slots[warp][lane ^ mask], 4);
  __syncwarp();
  return y;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const int warp = threadIdx.x / 32;
  slots[warp][threadIdx.x % 32] = vote;
  __syncwarp();
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= unsigned(slots[warp][i]) << i;
  __syncwarp();
  return votes;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
using std::max;
using std::min;
