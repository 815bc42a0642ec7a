#include "../binding.h"
#include "linear_args.h"

namespace vf {

static void linear(Address x, const std::string& x_dtype, Address w, const std::string& w_dtype, Address bias,
                   const std::string& bias_dtype, Address out, const std::string& out_dtype, int64_t M, int64_t N,
                   int64_t K, int64_t ldx, int64_t ldo, bool gelu, const std::string& compute, int num_threads,
                   Address pre) {
  LinearArgs a{};
  a.x = param(x, x_dtype, "x_dtype"), a.w = param(w, w_dtype, "w_dtype", true),
  a.bias = param(bias, bias_dtype, "bias_dtype");
  a.out = pointer<void>(out), a.pre = pointer<void>(pre), a.out_dtype = dtype_of(out_dtype, "out_dtype");
  a.M = M, a.N = N, a.K = K, a.ldx = ldx, a.ldo = ldo, a.gelu = gelu;
  a.compute = compute_of(compute), a.threads = threads_of(num_threads);
  require(M >= 0 && N >= 0 && K >= 1 && ldx >= K && ldo >= N, "linear needs M, N >= 0, K >= 1, ldx >= K and ldo >= N");
  require(gelu || !pre, "pre is what goes into the GELU: it needs gelu");
  check_weight(a.compute, a.w.dtype, K);
  const auto kernel = kernels().linear;
  if (M && N) call(kernel, a);
}

void bind_linear(py::module_& m) {
  using py::arg;
  m.def(
      "linear", &linear, arg("x"), arg("x_dtype"), arg("w"), arg("w_dtype"), arg("bias"), arg("bias_dtype"), arg("out"),
      arg("out_dtype"), arg("M"), arg("N"), arg("K"), arg("ldx"), arg("ldo"), arg("gelu"), arg("compute"),
      arg("num_threads"), arg("pre") = 0,
      "out[M, N] = act(x[M, K] w[N, K]^T + bias[N]); act is exact (erf) GELU if gelu. Row strides ldx, ldo; w is contiguous;\n"
      "bias may be 0; pre, unless 0, receives what goes into the GELU.\n"
      "compute 'int8' takes w_dtype 'q8' and quantises x per row; x and out may be f32 or bf16 with any compute.");
}

}  // namespace vf
