// The int8 weight blob of one Linear: W[n, k] ~ scale[n] q[n, k], q in [-127, 127], scale = max |W[n, :]| / 127.
//
//   panels      [ceil(N/64)][ceil(K/4)][64][4] int8, zeros where padded: the product's right operand as it is
//   scale       [ceil(N/64)*64] float32
//   scaled_sum  [ceil(N/64)*64] float32: scale[n] * sum_k q[n, k], which carries the activations' offset
#pragma once
#include "rows.h"

namespace vf::VF_ISA {

struct QuantizedView {
  uint32_t* panels;
  float *scale, *scaled_sum;
};

VF_INLINE QuantizedView quantized_view(void* blob, int64_t N, int64_t K) {
  const int64_t columns = round_up(N, 64);
  uint32_t* panels = (uint32_t*)blob;
  float* scale = (float*)(panels + columns * ceil_div(K, 4));
  return {panels, scale, scale + columns};
}

}  // namespace vf::VF_ISA
