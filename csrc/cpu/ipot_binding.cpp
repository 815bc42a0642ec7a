#include "../binding.h"
#include "ipot_args.h"

namespace vf {

static void ipot(Address cost, Address text_pad, Address image_pad, Address plan, int64_t B, int64_t M, int64_t N,
                 double beta, int64_t iterations, int64_t inner, int num_threads) {
  IpotArgs a{};
  a.cost = pointer<float>(cost), a.plan = pointer<float>(plan), a.masks = masks_of(text_pad, image_pad, B, M, N);
  a.beta = beta, a.iterations = iterations, a.inner = inner, a.threads = threads_of(num_threads);
  check_steps(beta, iterations, inner);
  std::vector<uint8_t> broken(static_cast<size_t>(B));
  a.broken = broken.data();
  call(kernels().ipot, a);
  check_costs("ipot", broken);
}

void bind_ipot(py::module_& m) {
  using py::arg;
  m.def("ipot", &ipot, arg("cost"), arg("text_pad"), arg("image_pad"), arg("plan"), arg("B"), arg("M"), arg("N"),
        arg("beta"), arg("iterations"), arg("inner"), arg("num_threads"),
        "cost f32 [B, M, N] -> plan f32 [B, M, N], 0 on padding.");
}

}  // namespace vf
