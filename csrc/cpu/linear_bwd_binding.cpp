#include "../binding.h"
#include "linear_bwd_args.h"

namespace vf {

static void linear_bwd(Address grad, Address x, Address pre, const std::string& dtype, Address w,
                       const std::string& w_dtype, Address dx, Address dw, Address db, int64_t M, int64_t N, int64_t K,
                       int64_t ld_grad, int64_t ldx, int64_t ld_pre, int num_threads) {
  LinearBwdArgs a{};
  a.grad = param(grad, dtype, "dtype"), a.x = param(x, dtype, "dtype"), a.pre = param(pre, dtype, "dtype");
  a.w = param(w, w_dtype, "w_dtype");
  a.dx = pointer<void>(dx), a.dw = pointer<void>(dw), a.db = pointer<void>(db);
  a.M = M, a.N = N, a.K = K, a.ld_grad = ld_grad, a.ldx = ldx, a.ld_pre = ld_pre, a.threads = threads_of(num_threads);
  require(M >= 1 && N >= 1 && K >= 1 && ld_grad >= N && ldx >= K && (!pre || ld_pre >= N),
          "linear_bwd needs M, N, K >= 1, ld_grad >= N, ldx >= K and ld_pre >= N");
  call(kernels().linear_bwd, a);
}

void bind_linear_bwd(py::module_& m) {
  using py::arg;
  m.def(
      "linear_bwd", &linear_bwd, arg("grad"), arg("x"), arg("pre"), arg("dtype"), arg("w"), arg("w_dtype"), arg("dx"),
      arg("dw"), arg("db"), arg("M"), arg("N"), arg("K"), arg("ld_grad"), arg("ldx"), arg("ld_pre"), arg("num_threads"),
      "Gradients of linear from grad[M, N], that of its result (after the GELU if pre[M, N], what went into it, is not 0): dx[M, K] of\n"
      "`dtype`, dw[N, K] and db[N] of w_dtype, dense, each unless 0. w[N, K] is contiguous and is rounded to `dtype`, in which products are\n"
      "multiplied. Sums do not depend on the number of threads.");
}

}  // namespace vf
