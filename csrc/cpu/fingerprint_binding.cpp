#include <pybind11/stl.h>

#include <array>

#include "../binding.h"
#include "fingerprint_args.h"

namespace vf {

static std::vector<uint64_t> fingerprint(const std::vector<std::array<int64_t, 5>>& spans, int num_threads) {
  std::vector<Span> list;
  list.reserve(spans.size());
  for (const auto& s : spans) {
    require(s[1] >= 0 && s[2] >= 0 && s[4] >= 0, "fingerprint: a size is out of range");
    if (s[1] && s[2]) list.push_back({reinterpret_cast<const char*>(s[0]), s[1], s[2], s[3], s[4]});
    else list.push_back({nullptr, 0, 0, 0, 0});
  }
  std::vector<uint64_t> hashes(list.size());
  call(kernels().fingerprint, {list.data(), static_cast<int64_t>(list.size()), hashes.data(), threads_of(num_threads)});
  return hashes;
}

void bind_fingerprint(py::module_& m) {
  using py::arg;
  m.def(
      "fingerprint", &fingerprint, arg("spans"), arg("num_threads"),
      "spans: (address, rows, bytes of a row, bytes from row to row, step) each -> a 64-bit hash of each: of all bytes with step 0, else of\n"
      "the lines of memory (64 bytes) that hold every step-th byte of the rows end to end. The same at every instruction-set level and for\n"
      "any number of threads.");
}

}  // namespace vf
