#pragma once
#include "kernels.h"

namespace vf {

struct AttentionArgs {  // per sample and head: out = softmax(scale q k^T) v
  const void *q, *k, *v;
  void* out;
  int dtype;
  int H, d, B;
  int64_t ldq, ldk, ldv, ldo;
  const int32_t *cu_q, *cu_k, *seqused_k;  // seqused_k may be null
  float scale;
  float* lse;  // [H, rows_q] or null
  int threads;
};

}  // namespace vf
