#pragma once
#include "pairs.h"

namespace vf {

// plan f32 [B, M, N] from cost f32 [B, M, N].
int cuda_ipot(CudaPairs pairs, const float* cost, float* plan, double beta, int iterations, int inner, void* stream);

}  // namespace vf
