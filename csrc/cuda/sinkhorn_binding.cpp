#include "binding.h"
#include "sinkhorn.h"

namespace vf {

static void sinkhorn(Address text_pad, Address image_pad, int64_t B, int M, int N, Address cost, Address text_weight,
                     Address image_weight, Address plan, Address value, Address used, Address error, double epsilon,
                     int iterations, double tolerance, Address stream) {
  check_iterations(epsilon, iterations, 1);
  cuda_check(cuda_sinkhorn(cuda_pairs(text_pad, image_pad, B, M, N), pointer<const float>(cost),
                           pointer<const float>(text_weight), pointer<const float>(image_weight), pointer<float>(plan),
                           pointer<float>(value), pointer<int64_t>(used), pointer<float>(error), epsilon, iterations,
                           tolerance, pointer<void>(stream)));
}

void bind_cuda_sinkhorn(py::module_& m) {
  using py::arg;
  m.def(
      "cuda_sinkhorn", &sinkhorn, arg("text_pad"), arg("image_pad"), arg("B"), arg("M"), arg("N"), arg("cost"),
      arg("text_weight"), arg("image_weight"), arg("plan"), arg("value"), arg("used"), arg("error"), arg("epsilon"),
      arg("iterations"), arg("tolerance"), arg("stream"),
      "weights f32 [B, M], [B, N] or 0; tolerance < 0: none; plan f32 [B, M, N], value and error f32 [B], used int64 [B].");
}

}  // namespace vf
