#include "../binding.h"
#include "word_patch_binding.h"
#include "word_patch_distance_args.h"

namespace vf {

static void word_patch_distance(const Strided& text, const Strided& image, const std::string& dtype, Address text_pad,
                                Address image_pad, Address distance, Address plan, int64_t B, int64_t M, int64_t N,
                                int64_t D, double beta, int64_t iterations, int64_t inner, int num_threads) {
  WordPatchArgs a{};
  a.in = word_patch(text, image, dtype, text_pad, image_pad, B, M, N, D, num_threads);
  a.distance = pointer<float>(distance), a.plan = pointer<float>(plan);
  a.beta = beta, a.iterations = iterations, a.inner = inner;
  check_steps(beta, iterations, inner);
  call(kernels().word_patch_distance, a);
}

void bind_word_patch_distance(py::module_& m) {
  using py::arg;
  m.def(
      "word_patch_distance", &word_patch_distance, arg("text"), arg("image"), arg("dtype"), arg("text_pad"),
      arg("image_pad"), arg("distance"), arg("plan"), arg("B"), arg("M"), arg("N"), arg("D"), arg("beta"),
      arg("iterations"), arg("inner"), arg("num_threads"),
      "text [B, M, D] and image [B, N, D] as (address, stride of samples, stride of rows) -> distance f32 [B], plan f32 [B, M, N] or 0.");
}

}  // namespace vf
