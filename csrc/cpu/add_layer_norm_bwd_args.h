#pragma once
#include "kernels.h"

namespace vf {

struct AddLayerNormBwdArgs {        // gradients of add_layer_norm_args.h
  Param grad_s, grad_y, s, weight;  // dense; grad_s, grad_y and weight may be absent
  const float *mean, *rstd;         // [N]
  void *dx, *dresidual;             // dense; dx may be null
  int dx_dtype, dresidual_dtype;
  float* sums;  // [2, D]: of weight and bias; or null
  int64_t N, D;
  float dropout_p;
  uint64_t seed;
  int threads;
};

}  // namespace vf
