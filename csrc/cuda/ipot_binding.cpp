#include "binding.h"
#include "ipot.h"

namespace vf {

static void ipot(Address text_pad, Address image_pad, int64_t B, int M, int N, Address cost, Address plan, double beta,
                 int iterations, int inner, Address stream) {
  check_iterations(beta, iterations, inner);
  cuda_check(cuda_ipot(cuda_pairs(text_pad, image_pad, B, M, N), pointer<const float>(cost), pointer<float>(plan), beta,
                       iterations, inner, pointer<void>(stream)));
}

void bind_cuda_ipot(py::module_& m) {
  using py::arg;
  m.def("cuda_ipot", &ipot, arg("text_pad"), arg("image_pad"), arg("B"), arg("M"), arg("N"), arg("cost"), arg("plan"),
        arg("beta"), arg("iterations"), arg("inner"), arg("stream"),
        "plan f32 [B, M, N] from cost f32 [B, M, N], both dense.");
}

}  // namespace vf
