#include "../binding.h"
#include "add_layer_norm_args.h"

namespace vf {

static void add_layer_norm(Address x, const std::string& x_dtype, Address residual, const std::string& residual_dtype,
                           Address weight, Address bias, const std::string& weight_dtype, Address s,
                           const std::string& s_dtype, Address y, const std::string& y_dtype, Address mean,
                           Address rstd, int64_t N, int64_t D, int64_t ldx, int64_t ldr, float eps, float dropout_p,
                           uint64_t seed, int num_threads) {
  AddLayerNormArgs a{};
  a.x = param(x, x_dtype, "x_dtype"), a.residual = param(residual, residual_dtype, "residual_dtype");
  a.weight = param(weight, weight_dtype, "weight_dtype"), a.bias = param(bias, weight_dtype, "weight_dtype");
  a.s = pointer<void>(s), a.s_dtype = dtype_of(s_dtype, "s_dtype");
  a.y = pointer<void>(y), a.y_dtype = dtype_of(y_dtype, "y_dtype");
  a.mean = pointer<float>(mean), a.rstd = pointer<float>(rstd);
  a.N = N, a.D = D, a.ldx = ldx, a.ldr = ldr, a.eps = eps, a.dropout_p = dropout_p, a.seed = seed;
  a.threads = threads_of(num_threads);
  require(N >= 0 && D >= 1 && ldx >= D && ldr >= D, "add_layer_norm needs N >= 0, D >= 1, ldx >= D and ldr >= D");
  require(dropout_p >= 0 && dropout_p < 1, "add_layer_norm needs 0 <= dropout_p < 1");
  require(!mean == !rstd, "add_layer_norm needs mean and rstd, or neither");
  call(kernels().add_layer_norm, a);
}

void bind_add_layer_norm(py::module_& m) {
  using py::arg;
  m.def(
      "add_layer_norm", &add_layer_norm, arg("x"), arg("x_dtype"), arg("residual"), arg("residual_dtype"),
      arg("weight"), arg("bias"), arg("weight_dtype"), arg("s"), arg("s_dtype"), arg("y"), arg("y_dtype"), arg("mean"),
      arg("rstd"), arg("N"), arg("D"), arg("ldx"), arg("ldr"), arg("eps"), arg("dropout_p"), arg("seed"),
      arg("num_threads"),
      "s[N, D] = dropout(x) + residual (row strides ldx, ldr); y[N, D] = LayerNorm(s) weight + bias, which may be 0; f32 mean, rstd [N] or 0.\n"
      "What is dropped depends on (seed, row, column) alone.");
}

}  // namespace vf
