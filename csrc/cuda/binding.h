// What the bindings of the CUDA ops share. Device addresses and a stream come as integers; what they hold is never looked at.
// The kernels run on the current device and the given stream, without waiting.
#pragma once
#include <stdexcept>

#include "../binding.h"
#include "device.h"
#include "pairs.h"

namespace vf {

// RuntimeError that says what to do when CUDA refuses.
inline void cuda_check(int error) {
  if (error) throw std::runtime_error(cuda_message(error));
}

inline CudaPairs cuda_pairs(Address text_pad, Address image_pad, int64_t B, int M, int N) {
  require(B >= 0 && B < (int64_t(1) << 31) && M >= 1 && N >= 1 && int64_t(M) * N < (int64_t(1) << 31),
          "B, M or N is out of range");
  return {pointer<const uint8_t>(text_pad), pointer<const uint8_t>(image_pad), B, M, N};
}

inline void check_iterations(double unit, int iterations, int inner) {
  require(unit > 0 && iterations >= 1 && inner >= 1, "beta or epsilon must be > 0, iterations and inner >= 1");
}

}  // namespace vf
