#pragma once
#include "kernels.h"

namespace vf {

struct LinearArgs {  // out[M, N] = act(x[M, K] w[N, K]^T + bias[N])
  Param x, w, bias;
  void* out;
  int out_dtype;
  int64_t M, N, K, ldx, ldo;
  bool gelu;
  int compute, threads;
  void* pre;  // what goes into the GELU, as out; or null
};

}  // namespace vf
