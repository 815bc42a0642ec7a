// What the bindings share. Pointers arrive as integers, so the module needs no torch headers and one build serves every
// torch. Arguments are checked in the bindings, once; the kernels trust them. The GIL is released while a kernel runs.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/masks.h"

namespace vf {

namespace py = pybind11;
using Address = uintptr_t;

template <class T>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

[[noreturn]] inline void fail(const std::string& message) { throw py::value_error(message); }

inline void require(bool ok, const char* message) {
  if (!ok) fail(message);
}

inline int dtype_of(const std::string& name, const char* argument, bool allow_q8 = false) {
  if (name == "f32") return F32;
  if (name == "bf16") return BF16;
  if (allow_q8 && name == "q8") return Q8;
  fail(std::string(argument) + " is \"" + name + "\"; expected \"f32\"" +
       (allow_q8 ? ", \"bf16\" or \"q8\"" : " or \"bf16\""));
}

inline int compute_of(const std::string& name) {
  if (name == "f32") return F32;
  if (name == "bf16") return BF16;
  if (name == "int8") return Q8;
  fail("compute is \"" + name + "\"; expected \"f32\", \"bf16\" or \"int8\"");
}

inline Param param(Address data, const std::string& dtype, const char* argument, bool allow_q8 = false) {
  return {reinterpret_cast<const void*>(data), dtype_of(dtype, argument, allow_q8)};
}

inline void check_weight(int compute, int dtype, int64_t K) {
  require((compute == Q8) == (dtype == Q8),
          "int8 compute needs q8 weights (quantize_linear), and q8 weights need int8 compute");
  require(compute != Q8 || K <= 65536, "int8 compute supports K <= 65536 (int32 accumulation)");
}

inline int threads_of(int n) {
  require(n >= 1 && n <= 1024, "num_threads must be between 1 and 1024");
  return n;
}

inline void check_offsets(const int32_t* cu, int B, const char* message) {
  bool ok = cu != nullptr && cu[0] == 0;
  for (int b = 0; ok && b < B; ++b) ok = cu[b + 1] >= cu[b];
  require(ok, message);
}

// Samples of packed queries and keys.
inline void check_samples(const int32_t* cu_q, const int32_t* cu_k, const int32_t* seqused_k, int B) {
  check_offsets(cu_q, B, "cu_q must start at 0 and not decrease");
  check_offsets(cu_k, B, "cu_k must start at 0 and not decrease");
  for (int b = 0; seqused_k && b < B; ++b)
    require(seqused_k[b] >= 0 && seqused_k[b] <= cu_k[b + 1] - cu_k[b],
            "seqused_k must lie between 0 and the sample's rows");
}

// Masks are uint8 [B, M] and [B, N], 1 where padded; what else transport takes is dense unless strides are given.
inline Masks masks_of(Address text_pad, Address image_pad, int64_t B, int64_t M, int64_t N) {
  require(B >= 1 && M >= 0 && N >= 0, "needs B >= 1 and M, N >= 0");
  return {pointer<uint8_t>(text_pad), pointer<uint8_t>(image_pad), B, M, N};
}

inline void check_steps(double step, int64_t iterations, int64_t inner) {
  require(step > 1e-30 && step < 1e30 && iterations >= 1 && inner >= 1,
          "needs 1e-30 < beta or epsilon < 1e30, iterations >= 1 and inner >= 1");
}

inline void check_costs(const char* op, const std::vector<uint8_t>& broken) {
  std::string samples;
  for (size_t b = 0; b < broken.size(); ++b)
    if (broken[b]) samples += (samples.empty() ? "" : ", ") + std::to_string(b);
  if (!samples.empty())
    fail(std::string(op) + ": cost is NaN or infinite on real entries of samples [" + samples + "]; expected finite.");
}

// The table of the level in use.
inline const Kernels& kernels() {
  const Kernels* k = active_kernels();
  if (!k) {
    std::string names;
    for (int i = 0; i < isa_count(); ++i) names += std::string(i ? ", " : "") + isa_table(i)->isa;
    const char* asked = getenv("VILT_FAST_CPU_ISA");
    fail("VILT_FAST_CPU_ISA is '" + std::string(asked ? asked : "") +
         "', an instruction set that this machine or build does not have; available: " + names);
  }
  return *k;
}

template <class Args>
void call(void (*kernel)(const Args&), const Args& args) {
  const py::gil_scoped_release release;
  kernel(args);
}

}  // namespace vf
