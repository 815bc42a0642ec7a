#pragma once
#include "pairs.h"

namespace vf {

// weights: f32 [B, M] and [B, N] or null for uniform; tolerance < 0: none. plan f32 [B, M, N], value and error f32 [B], used i64 [B].
int cuda_sinkhorn(CudaPairs pairs, const float* cost, const float* text_weight, const float* image_weight, float* plan,
                  float* value, int64_t* used, float* error, double epsilon, int iterations, double tolerance,
                  void* stream);

}  // namespace vf
