#pragma once
#include "masks.h"

namespace vf {

struct SinkhornArgs {
  const float *cost, *text_marginal, *image_marginal;  // [B, M, N]; [B, M], [B, N] or null (uniform)
  float *plan, *value, *error;                         // [B, M, N], [B], [B]
  int64_t* used;                                       // [B]
  uint8_t* broken;  // [B], set to 1 where a real cost is NaN or infinite: no plan for that sample
  Masks masks;
  double epsilon, tolerance;  // tolerance < 0: none
  int64_t iterations;
  int threads;
};

}  // namespace vf
