#pragma once
#include "kernels.h"

namespace vf {

struct Affine {
  Param weight, bias;  // bias.data == nullptr: none
};

struct Layer { Affine norm1, query, key, value, out, norm2, fc1, fc2; };

struct EncoderArgs {
  const float* x;
  float* out;
  float* hidden;  // [layers, N, D] or null
  int64_t N, D, inner;
  int layers, H, B;
  const Layer* layer;  // [layers]
  const float* eps;    // [layers][2]: of norm1 and norm2
  const int32_t *cu_seqlens, *seqused_k;
  const int64_t* wanted;     // rows that are wanted of the last layer, increasing, or null: all; `out` holds just them
  const int32_t* cu_wanted;  // [B+1] where those of each sample begin among them
  int compute, threads;
};

}  // namespace vf
