// What the bindings of word_patch_distance and its gradient share.
#pragma once
#include <pybind11/stl.h>

#include <array>

#include "../binding.h"
#include "word_patch_args.h"

namespace vf {

// text and image are (address, stride of samples, stride of rows), both of dtype.
using Strided = std::array<int64_t, 3>;

inline WordPatch word_patch(const Strided& text, const Strided& image, const std::string& dtype, Address text_pad, Address image_pad, int64_t B,
                         int64_t M, int64_t N, int64_t D, int num_threads) {
  require(D >= 1, "needs D >= 1");
  const Rows3 rows[2] = {{param(static_cast<Address>(text[0]), dtype, "dtype"), text[1], text[2]},
                             {param(static_cast<Address>(image[0]), dtype, "dtype"), image[1], image[2]}};
  return {rows[0], rows[1], masks_of(text_pad, image_pad, B, M, N), D, threads_of(num_threads)};
}

}  // namespace vf
