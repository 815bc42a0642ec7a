#pragma once
#include "word_patch_args.h"

namespace vf {

struct WordPatchArgs {
  WordPatch in;
  float *distance, *plan;  // [B]; [B, M, N] or null
  double beta;
  int64_t iterations, inner;
};

}  // namespace vf
