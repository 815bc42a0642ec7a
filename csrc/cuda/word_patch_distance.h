#pragma once
#include "pairs.h"

namespace vf {

enum CudaDtype { CUDA_F32 = 0, CUDA_F16 = 1, CUDA_BF16 = 2 };

// distance f32 [B] from text [B, M, D] and image [B, N, D], dense, 16-byte aligned rows; plan f32 [B, M, N] or null.
// scratch: f32 [B, M, N] when cuda_word_patch_scratch says so, else null: costs that do not fit into shared memory.
int cuda_word_patch_distance(CudaPairs pairs, const void* text, const void* image, int dtype, int D, float* distance,
                             float* plan, float* scratch, double beta, int iterations, int inner, void* stream);
int cuda_word_patch_scratch(int M, int N, int* needed);

}  // namespace vf
