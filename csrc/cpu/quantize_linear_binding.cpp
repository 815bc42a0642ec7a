#include "../binding.h"
#include "quantize_linear_args.h"

namespace vf {

static void quantize_linear(Address w, const std::string& w_dtype, int64_t N, int64_t K, Address blob,
                            int num_threads) {
  QuantizeArgs a{param(w, w_dtype, "w_dtype"), N, K, pointer<void>(blob), threads_of(num_threads)};
  require(N >= 1 && K >= 1 && K <= 65536, "quantize_linear needs N >= 1 and 1 <= K <= 65536");
  require(blob % 64 == 0, "blob must be 64-byte aligned");
  call(kernels().quantize_linear, a);
}

void bind_quantize_linear(py::module_& m) {
  using py::arg;
  m.def("quantized_bytes", &quantized_bytes, arg("N"), arg("K"),
        "Size of the blob that quantize_linear writes for w[N, K].");
  m.def(
      "quantize_linear", &quantize_linear, arg("w"), arg("w_dtype"), arg("N"), arg("K"), arg("blob"),
      arg("num_threads"),
      "Quantise w[N, K] per output row (symmetric int8) into blob: quantized_bytes(N, K) bytes, 64-byte aligned. The blob is the same at every\n"
      "instruction-set level.");
}

}  // namespace vf
