// What the host entry points of all CUDA ops share: pointers are device addresses, `stream` is a cudaStream_t. Nothing waits
// for the device. They return 0 or a cudaError_t, see device.h.
#pragma once
#include <cstdint>

namespace vf {

// B pairs of at most M words and N patches; pads are uint8 [B, M] and [B, N], 1 where padded.
struct CudaPairs {
  const uint8_t* text_pad;
  const uint8_t* image_pad;
  int64_t B;
  int M, N;
};

}  // namespace vf
