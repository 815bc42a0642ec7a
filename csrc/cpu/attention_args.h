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
  float* lse;    // [H, rows_q] or null
  float* stats;  // [2, H, rows_q] or null: of each row the largest score in units of log2, and 1 / (sum relative to it)
  int threads;
};

}  // namespace vf
