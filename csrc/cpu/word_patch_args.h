#pragma once
#include "kernels.h"
#include "masks.h"

namespace vf {

struct Rows3 {  // [B, rows, D], the last dimension dense
  Param x;
  int64_t by_sample, by_row;  // strides in elements
};

struct WordPatch {
  Rows3 text, image;
  Masks masks;
  int64_t D;
  int threads;
};

}  // namespace vf
