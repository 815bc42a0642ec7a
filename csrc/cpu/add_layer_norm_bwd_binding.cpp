#include "../binding.h"
#include "add_layer_norm_bwd_args.h"

namespace vf {

static void add_layer_norm_bwd(Address grad_s, Address grad_y, const std::string& y_dtype, Address s,
                               const std::string& s_dtype, Address weight, const std::string& weight_dtype,
                               Address mean, Address rstd, Address dx, const std::string& dx_dtype, Address dresidual,
                               const std::string& dresidual_dtype, Address sums, int64_t N, int64_t D, float dropout_p,
                               uint64_t seed, int num_threads) {
  AddLayerNormBwdArgs a{};
  a.grad_s = param(grad_s, s_dtype, "s_dtype"), a.grad_y = param(grad_y, y_dtype, "y_dtype");
  a.s = param(s, s_dtype, "s_dtype"), a.weight = param(weight, weight_dtype, "weight_dtype");
  a.mean = pointer<float>(mean), a.rstd = pointer<float>(rstd);
  a.dx = pointer<void>(dx), a.dx_dtype = dtype_of(dx_dtype, "dx_dtype");
  a.dresidual = pointer<void>(dresidual), a.dresidual_dtype = dtype_of(dresidual_dtype, "dresidual_dtype");
  a.sums = pointer<float>(sums), a.N = N, a.D = D, a.dropout_p = dropout_p, a.seed = seed;
  a.threads = threads_of(num_threads);
  require(N >= 0 && D >= 1, "add_layer_norm_bwd needs N >= 0 and D >= 1");
  require(dropout_p >= 0 && dropout_p < 1, "add_layer_norm_bwd needs 0 <= dropout_p < 1");
  call(kernels().add_layer_norm_bwd, a);
}

void bind_add_layer_norm_bwd(py::module_& m) {
  using py::arg;
  m.def(
      "add_layer_norm_bwd", &add_layer_norm_bwd, arg("grad_s"), arg("grad_y"), arg("y_dtype"), arg("s"), arg("s_dtype"),
      arg("weight"), arg("weight_dtype"), arg("mean"), arg("rstd"), arg("dx"), arg("dx_dtype"), arg("dresidual"),
      arg("dresidual_dtype"), arg("sums"), arg("N"), arg("D"), arg("dropout_p"), arg("seed"), arg("num_threads"),
      "Gradients of add_layer_norm from those of s and y (either may be 0), all dense [N, D]: dresidual, and dx unless it is 0; sums f32\n"
      "[2, D] of weight and bias, or 0. Sums do not depend on the number of threads.");
}

}  // namespace vf
