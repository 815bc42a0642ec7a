#pragma once
#include "kernels.h"

namespace vf {

struct QuantizeArgs {  // w[N, K] -> blob (see quantize.h)
  Param w;
  int64_t N, K;
  void* blob;
  int threads;
};

}  // namespace vf
