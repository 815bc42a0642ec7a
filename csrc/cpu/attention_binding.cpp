#include "../binding.h"
#include "attention_args.h"

namespace vf {

static void attention(Address q, Address k, Address v, Address out, const std::string& dtype, int H, int d, int B,
                      int64_t ldq, int64_t ldk, int64_t ldv, int64_t ldo, Address cu_q, Address cu_k, Address seqused_k,
                      float scale, Address lse, int num_threads, Address stats) {
  AttentionArgs a{};
  a.q = pointer<void>(q), a.k = pointer<void>(k), a.v = pointer<void>(v), a.out = pointer<void>(out);
  a.dtype = dtype_of(dtype, "dtype"), a.H = H, a.d = d, a.B = B;
  a.ldq = ldq, a.ldk = ldk, a.ldv = ldv, a.ldo = ldo;
  a.cu_q = pointer<int32_t>(cu_q), a.cu_k = pointer<int32_t>(cu_k), a.seqused_k = pointer<int32_t>(seqused_k);
  a.scale = scale, a.lse = pointer<float>(lse), a.stats = pointer<float>(stats), a.threads = threads_of(num_threads);
  require(H >= 1 && d >= 1 && d <= 256 && B >= 0, "attention needs H >= 1, 1 <= d <= 256 and B >= 0");
  check_samples(a.cu_q, a.cu_k, a.seqused_k, B);
  call(kernels().attention, a);
}

void bind_attention(py::module_& m) {
  using py::arg;
  m.def(
      "attention", &attention, arg("q"), arg("k"), arg("v"), arg("out"), arg("dtype"), arg("H"), arg("d"), arg("B"),
      arg("ldq"), arg("ldk"), arg("ldv"), arg("ldo"), arg("cu_q"), arg("cu_k"), arg("seqused_k"), arg("scale"),
      arg("lse"), arg("num_threads"), arg("stats") = 0,
      "out = softmax(scale q k^T) v per sample and head. q, out [rows_q, H, d], k, v [rows_k, H, d]: d contiguous, heads d apart, row strides ld*.\n"
      "cu_q, cu_k int32 [B+1] row offsets; seqused_k int32 [B] or 0: how many leading rows of each sample are keys. lse f32 [H, rows_q] or 0:\n"
      "log sum exp of the scaled scores; stats f32 [2, H, rows_q] or 0, for attention_bwd. A sample without keys gives zeros and lse -inf. d <= 256. bf16: f32 softmax, bf16 products.");
}

}  // namespace vf
