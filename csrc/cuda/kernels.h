// What module.cpp may call when the library is built with CUDA. Plain C++: no CUDA types, no torch, no pybind11.
// Pointers are device addresses, `stream` is a cudaStream_t. Nothing waits for the device. Every function returns 0 or a
// cudaError_t, which `cuda_message` turns into a sentence that says what to do.
#pragma once
#include <cstdint>
#include <string>

namespace vf {

enum CudaDtype { CUDA_F32 = 0, CUDA_F16 = 1, CUDA_BF16 = 2 };

int cuda_devices(int* count);
std::string cuda_message(int error);

// Sizes that all three share: B pairs of at most M words and N patches; pads are uint8 [B, M] and [B, N], 1 where padded.
struct CudaPairs {
  const uint8_t* text_pad;
  const uint8_t* image_pad;
  int64_t B;
  int M, N;
};

// plan f32 [B, M, N] from cost f32 [B, M, N].
int cuda_ipot(CudaPairs pairs, const float* cost, float* plan, double beta, int iterations, int inner, void* stream);

// weights: f32 [B, M] and [B, N] or null for uniform; tolerance < 0: none. plan f32 [B, M, N], value and error f32 [B], used i64 [B].
int cuda_sinkhorn(CudaPairs pairs, const float* cost, const float* text_weight, const float* image_weight, float* plan, float* value, int64_t* used,
                  float* error, double epsilon, int iterations, double tolerance, void* stream);

// distance f32 [B] from text [B, M, D] and image [B, N, D], dense, 16-byte aligned rows; plan f32 [B, M, N] or null.
// scratch: f32 [B, M, N] when cuda_word_patch_scratch says so, else null: costs that do not fit into shared memory.
int cuda_word_patch_distance(CudaPairs pairs, const void* text, const void* image, int dtype, int D, float* distance, float* plan, float* scratch,
                             double beta, int iterations, int inner, void* stream);
int cuda_word_patch_scratch(int M, int N, int* needed);

}  // namespace vf
