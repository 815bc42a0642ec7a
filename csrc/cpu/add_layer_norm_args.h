#pragma once
#include "kernels.h"

namespace vf {

struct AddLayerNormArgs {  // s = dropout(x) + residual; y = (s - mean) rstd weight + bias
  Param x, residual, weight, bias;
  void *s, *y;  // dense
  int s_dtype, y_dtype;
  float *mean, *rstd;  // [N] or null
  int64_t N, D, ldx, ldr;
  float eps, dropout_p;
  uint64_t seed;
  int threads;
};

}  // namespace vf
