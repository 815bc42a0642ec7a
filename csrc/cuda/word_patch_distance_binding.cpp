#include "binding.h"
#include "word_patch_distance.h"

namespace vf {

static void word_patch_distance(Address text_pad, Address image_pad, int64_t B, int M, int N, Address text,
                                Address image, const std::string& dtype, int D, Address distance, Address plan,
                                Address scratch, double beta, int iterations, int inner, Address stream) {
  check_iterations(beta, iterations, inner);
  require(dtype == "f32" || dtype == "f16" || dtype == "bf16", "dtype must be \"f32\", \"f16\" or \"bf16\"");
  require(D >= 1 && D % (dtype == "f32" ? 4 : 8) == 0, "rows of D entries must be multiples of 16 bytes");
  const int code = dtype == "f32" ? CUDA_F32 : dtype == "f16" ? CUDA_F16 : CUDA_BF16;
  cuda_check(cuda_word_patch_distance(cuda_pairs(text_pad, image_pad, B, M, N), pointer<const void>(text),
                                      pointer<const void>(image), code, D, pointer<float>(distance),
                                      pointer<float>(plan), pointer<float>(scratch), beta, iterations, inner,
                                      pointer<void>(stream)));
}

static bool word_patch_scratch(int M, int N) {
  int needed = 0;
  cuda_check(cuda_word_patch_scratch(M, N, &needed));
  return needed != 0;
}

void bind_cuda_word_patch_distance(py::module_& m) {
  using py::arg;
  m.def(
      "cuda_word_patch_distance", &word_patch_distance, arg("text_pad"), arg("image_pad"), arg("B"), arg("M"), arg("N"),
      arg("text"), arg("image"), arg("dtype"), arg("D"), arg("distance"), arg("plan"), arg("scratch"), arg("beta"),
      arg("iterations"), arg("inner"), arg("stream"),
      "distance f32 [B] from text [B, M, D], image [B, N, D], dense; plan f32 [B, M, N] or 0; scratch f32 [B, M, N] if needed, else 0.");
  m.def("cuda_word_patch_scratch", &word_patch_scratch, arg("M"), arg("N"),
        "Do M x N costs not fit into shared memory of the current device?");
}

}  // namespace vf
