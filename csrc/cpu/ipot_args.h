#pragma once
#include "masks.h"

namespace vf {

struct IpotArgs {
  const float* cost;  // [B, M, N]
  float* plan;        // [B, M, N]
  uint8_t* broken;    // [B], set to 1 where a real cost is NaN or infinite: no plan for that sample
  Masks masks;
  double beta;
  int64_t iterations, inner;
  int threads;
};

}  // namespace vf
