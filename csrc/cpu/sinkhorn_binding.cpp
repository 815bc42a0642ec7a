#include "../binding.h"
#include "sinkhorn_args.h"

namespace vf {

static void sinkhorn(Address cost, Address text_pad, Address image_pad, Address text_marginal, Address image_marginal,
                     Address plan, Address value, Address error, Address used, int64_t B, int64_t M, int64_t N,
                     double epsilon, double tolerance, int64_t iterations, int num_threads) {
  SinkhornArgs a{};
  a.cost = pointer<float>(cost), a.text_marginal = pointer<float>(text_marginal),
  a.image_marginal = pointer<float>(image_marginal);
  a.plan = pointer<float>(plan), a.value = pointer<float>(value), a.error = pointer<float>(error),
  a.used = pointer<int64_t>(used);
  a.masks = masks_of(text_pad, image_pad, B, M, N);
  a.epsilon = epsilon, a.tolerance = tolerance, a.iterations = iterations, a.threads = threads_of(num_threads);
  check_steps(epsilon, iterations, 1);
  std::vector<uint8_t> broken(static_cast<size_t>(B));
  a.broken = broken.data();
  call(kernels().sinkhorn, a);
  check_costs("sinkhorn", broken);
}

void bind_sinkhorn(py::module_& m) {
  using py::arg;
  m.def(
      "sinkhorn", &sinkhorn, arg("cost"), arg("text_pad"), arg("image_pad"), arg("text_marginal"),
      arg("image_marginal"), arg("plan"), arg("value"), arg("error"), arg("used"), arg("B"), arg("M"), arg("N"),
      arg("epsilon"), arg("tolerance"), arg("iterations"), arg("num_threads"),
      "cost f32 [B, M, N] -> plan f32 [B, M, N], value and error f32 [B], used int64 [B]. Marginals f32 [B, M] and [B, N], any scale, or 0:\n"
      "uniform. tolerance < 0: none.");
}

}  // namespace vf
