// The contract between the Python module and the CPU kernels: one table of functions, of plain argument structs.
//
// Every kernel in csrc/cpu is compiled once per instruction-set level into its own namespace; dispatch.cpp chooses a
// table at run time. This header and the `_args.h` are shared by translation units built with different flags, so they
// hold declarations and plain data only: an inline function here could be merged by the linker into its AVX-512 copy
// and crash an older machine.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace vf {

// Storage types and compute types share one numbering. Q8 as storage is the blob written by quantize_linear;
// as a compute type it means u8 activations times s8 weights, accumulated exactly in int32.
enum DType : int { F32 = 0, BF16 = 1, Q8 = 2 };

struct Param {  // a tensor of a stored type; data == nullptr means "absent"
  const void* data;
  int dtype;
};

#define VF_OP(name, Args) struct Args;
#include "ops.def"

struct Kernels {  // of one instruction-set level
  const char* isa;
#define VF_OP(name, Args) void (*name)(const Args&);
#include "ops.def"
};

// ---- dispatch.cpp -------------------------------------------------------------------------------------------------
struct Feature {
  const char* name;
  bool present;
};
const Feature* cpu_features(int* count);
int isa_count();  // levels built into this binary that this machine can run, slowest first
const Kernels* isa_table(int i);
const Kernels* active_kernels();    // set_isa, else VILT_FAST_CPU_ISA, else the fastest; null if the name is unknown
bool select_isa(const char* name);  // null: back to automatic; false if unavailable

// One 2 MB-aligned scratch buffer, reused between calls because faulting fresh pages in costs more than a small op.
// Buffers above the retention limit are freed at once.
void* scratch_acquire(size_t bytes);
void scratch_release(void* buffer);

size_t quantized_bytes(int64_t N, int64_t K);

}  // namespace vf
