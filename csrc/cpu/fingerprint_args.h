#pragma once
#include "kernels.h"

namespace vf {

struct Span {  // rows of so many bytes, `stride` bytes apart; seen are all, or one line of memory every `step` bytes
  const char* data;
  int64_t rows, bytes, stride, step;
};

struct FingerprintArgs {  // spans[count] -> hashes[count]
  const Span* spans;
  int64_t count;
  uint64_t* hashes;
  int threads;
};

}  // namespace vf
