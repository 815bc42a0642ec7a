#pragma once
#include "kernels.h"

namespace vf {

struct LinearBwdArgs {    // gradients of linear_args.h, or of its GELU if there is `pre`
  Param grad, x, w, pre;  // grad [M, N], x [M, K], pre [M, N] of one dtype, in which products are multiplied; w [N, K]
  void *dx, *dw, *db;     // [M, K] of the dtype of x; [N, K] and [N] of that of w; dense, any may be null
  int64_t M, N, K, ld_grad, ldx, ld_pre;
  int threads;
};

}  // namespace vf
