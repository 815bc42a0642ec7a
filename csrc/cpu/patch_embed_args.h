#pragma once
#include "kernels.h"

namespace vf {

struct PatchEmbedArgs {
  Param pixels;
  int64_t stride[4];  // elements, [B, C, H, W]
  int64_t P, C, D;
  Param weight, bias;           // [D, C*P*P], [D]
  const int64_t* patch_source;  // [n] flat b*(gh*gw) + y*gw + x
  int64_t gh, gw;
  const int64_t* patch_rows;       // [n] row of out
  const int64_t* pos_index;        // [n, 4] rows of position
  const float* pos_weight;         // [n, 4]
  Param position;                  // [G*G + 1, D]
  Param cls_token;                 // [D]
  const int64_t* cls_rows;         // [B] row of out
  Param modality;                  // table [*, D]
  const int64_t* modality_rows;    // [B] row of the table
  const int64_t* sample_of_patch;  // [n]
  float* out;                      // [N, D]
  int64_t n, B;
  int compute, threads;
};

}  // namespace vf
