#include "../binding.h"
#include "attention_bwd_args.h"

namespace vf {

static void attention_bwd(Address q, Address k, Address v, Address out, Address grad, Address dq, Address dk,
                          Address dv, const std::string& dtype, int H, int d, int B, int64_t ldq, int64_t ldk,
                          int64_t ldv, int64_t ldo, int64_t ldg, Address cu_q, Address cu_k, Address seqused_k,
                          float scale, Address stats, Address grad_lse, int num_threads) {
  AttentionBwdArgs a{};
  a.q = pointer<void>(q), a.k = pointer<void>(k), a.v = pointer<void>(v), a.out = pointer<void>(out);
  a.grad = pointer<void>(grad), a.dq = pointer<void>(dq), a.dk = pointer<void>(dk), a.dv = pointer<void>(dv);
  a.dtype = dtype_of(dtype, "dtype"), a.H = H, a.d = d, a.B = B;
  a.ldq = ldq, a.ldk = ldk, a.ldv = ldv, a.ldo = ldo, a.ldg = ldg;
  a.cu_q = pointer<int32_t>(cu_q), a.cu_k = pointer<int32_t>(cu_k), a.seqused_k = pointer<int32_t>(seqused_k);
  a.scale = scale, a.stats = pointer<float>(stats), a.grad_lse = pointer<float>(grad_lse);
  a.threads = threads_of(num_threads);
  require(H >= 1 && d >= 1 && d <= 256 && B >= 0, "attention_bwd needs H >= 1, 1 <= d <= 256 and B >= 0");
  check_samples(a.cu_q, a.cu_k, a.seqused_k, B);
  call(kernels().attention_bwd, a);
}

void bind_attention_bwd(py::module_& m) {
  using py::arg;
  m.def(
      "attention_bwd", &attention_bwd, arg("q"), arg("k"), arg("v"), arg("out"), arg("grad"), arg("dq"), arg("dk"),
      arg("dv"), arg("dtype"), arg("H"), arg("d"), arg("B"), arg("ldq"), arg("ldk"), arg("ldv"), arg("ldo"), arg("ldg"),
      arg("cu_q"), arg("cu_k"), arg("seqused_k"), arg("scale"), arg("stats"), arg("grad_lse"), arg("num_threads"),
      "Gradients dq, dk, dv (dense) of attention from its inputs, its output, the stats that it left and the gradients of out (row stride\n"
      "ldg) and of lse (f32 [H, rows_q] or 0). Keys that do not count get zeros. Sums do not depend on the number of threads.");
}

}  // namespace vf
