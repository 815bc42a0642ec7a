// The CUDA sources as they are, compiled by a C++ compiler, behind C functions for ctypes.
#include <cuda_runtime.h>

namespace vf {
namespace {
alignas(128) char memory[232448];  // what `extern __shared__` finds
}
}  // namespace vf

#include "../../../csrc/cuda/ipot.cu"
#include "../../../csrc/cuda/sinkhorn.cu"
#include "../../../csrc/cuda/word_patch_distance.cu"

extern "C" {
void start() { emulated_shared_memory = vf::memory; }
void set_shared_limit(int bytes) { emulated_shared_limit = bytes; }

int ipot(const uint8_t* text_pad, const uint8_t* image_pad, int64_t B, int M, int N, const float* cost, float* plan,
         double beta, int iterations, int inner) {
  return vf::cuda_ipot({text_pad, image_pad, B, M, N}, cost, plan, beta, iterations, inner, nullptr);
}

int sinkhorn(const uint8_t* text_pad, const uint8_t* image_pad, int64_t B, int M, int N, const float* cost,
             const float* text_weight, const float* image_weight, float* plan, float* value, int64_t* used,
             float* error, double epsilon, int iterations, double tolerance) {
  return vf::cuda_sinkhorn({text_pad, image_pad, B, M, N}, cost, text_weight, image_weight, plan, value, used, error,
                           epsilon, iterations, tolerance, nullptr);
}

int word_patch_distance(const uint8_t* text_pad, const uint8_t* image_pad, int64_t B, int M, int N, const void* text,
                        const void* image, int dtype, int D, float* distance, float* plan, float* scratch, double beta,
                        int iterations, int inner) {
  return vf::cuda_word_patch_distance({text_pad, image_pad, B, M, N}, text, image, dtype, D, distance, plan, scratch,
                                      beta, iterations, inner, nullptr);
}

int scratch_needed(int M, int N) {
  int needed = -1;
  vf::cuda_word_patch_scratch(M, N, &needed);
  return needed;
}
}
