#pragma once
#include "word_patch_args.h"

namespace vf {

struct WordPatchGradientArgs {
  WordPatch in;
  const float *grad, *plan;  // [B], [B, M, N]
  Param text, image;         // gradients, dense; data == nullptr: not wanted
};

}  // namespace vf
