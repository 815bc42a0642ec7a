#pragma once
#include <stdint.h>

namespace vf {

struct Masks {  // which tokens and patches of each sample count; 1 where padded
  const uint8_t *text_pad, *image_pad;  // [B, M], [B, N]
  int64_t B, M, N;
};

}  // namespace vf
