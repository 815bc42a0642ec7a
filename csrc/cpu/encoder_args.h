#pragma once
#include "kernels.h"

namespace vf {

constexpr int kLayerParams = 16;  // ln1.w ln1.b q.w q.b k.w k.b v.w v.b o.w o.b ln2.w ln2.b fc1.w fc1.b fc2.w fc2.b

struct EncoderArgs {
  const float* x;
  float* out;
  float* hidden;  // [layers, N, D] or null
  int64_t N, D, inner;
  int layers, H, B;
  const Param* params;  // [layers][kLayerParams]
  const float* eps;     // [layers][2]
  const int32_t *cu_seqlens, *seqused_k;
  int compute, threads;
};

}  // namespace vf
