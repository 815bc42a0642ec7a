#pragma once
#include <stdint.h>

namespace vf {

// Which tokens and patches of each sample count.
struct Masks {
  const uint8_t *text_pad, *image_pad;  // [B, M], [B, N], 1 where padded
  int64_t B, M, N;
};

}  // namespace vf
