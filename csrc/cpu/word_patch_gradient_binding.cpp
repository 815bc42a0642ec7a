#include "../binding.h"
#include "word_patch_binding.h"
#include "word_patch_gradient_args.h"

namespace vf {

static void word_patch_gradient(const Strided& text, const Strided& image, const std::string& dtype, Address text_pad,
                                Address image_pad, Address grad, Address plan, Address text_grad, Address image_grad,
                                int64_t B, int64_t M, int64_t N, int64_t D, int num_threads) {
  WordPatchGradientArgs a{};
  a.in = word_patch(text, image, dtype, text_pad, image_pad, B, M, N, D, num_threads);
  a.grad = pointer<float>(grad), a.plan = pointer<float>(plan);
  a.text = param(text_grad, dtype, "dtype"), a.image = param(image_grad, dtype, "dtype");
  call(kernels().word_patch_gradient, a);
}

void bind_word_patch_gradient(py::module_& m) {
  using py::arg;
  m.def(
      "word_patch_gradient", &word_patch_gradient, arg("text"), arg("image"), arg("dtype"), arg("text_pad"),
      arg("image_pad"), arg("grad"), arg("plan"), arg("text_grad"), arg("image_grad"), arg("B"), arg("M"), arg("N"),
      arg("D"), arg("num_threads"),
      "grad f32 [B] and the plan of word_patch_distance -> gradients [B, M, D] and [B, N, D] of dtype, either address 0: not wanted.");
}

}  // namespace vf
