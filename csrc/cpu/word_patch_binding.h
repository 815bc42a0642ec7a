// What the bindings of word_patch_distance and its gradient share.
#pragma once
#include <pybind11/stl.h>

#include <array>

#include "../binding.h"
#include "word_patch_args.h"

namespace vf {

// text and image are (address, stride of samples, stride of rows), both of dtype.
using Strided = std::array<int64_t, 3>;

inline WordPatch word_patch(const Strided& text, const Strided& image, const std::string& dtype, Address text_pad,
                            Address image_pad, int64_t B, int64_t M, int64_t N, int64_t D, int num_threads) {
  require(D >= 1, "needs D >= 1");
  auto rows = [&](const Strided& x) { return Rows3{param(static_cast<Address>(x[0]), dtype, "dtype"), x[1], x[2]}; };
  return {rows(text), rows(image), masks_of(text_pad, image_pad, B, M, N), D, threads_of(num_threads)};
}

}  // namespace vf
