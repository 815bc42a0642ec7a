#pragma once
#include "kernels.h"

namespace vf {

struct AttentionBwdArgs {  // gradients of attention_args.h; stats [2, H, rows_q] as its forward keeps them
  const void *q, *k, *v, *out, *grad;
  void *dq, *dk, *dv;  // dense
  int dtype;
  int H, d, B;
  int64_t ldq, ldk, ldv, ldo, ldg;
  const int32_t *cu_q, *cu_k, *seqused_k;  // seqused_k may be null
  float scale;
  const float *stats, *grad_lse;  // grad_lse [H, rows_q] or null
  int threads;
};

}  // namespace vf
