// The contract between the Python module and the CPU kernels: plain argument structs and one table of functions.
//
// Every source in csrc/cpu that includes vec.h is compiled once per instruction-set level into its own namespace and
// exports one entry per op; dispatch.cpp chooses a table at run time. This header is shared by translation units
// built with different flags, so it holds declarations and plain data only: an inline function here could be merged
// by the linker into its AVX-512 copy and crash an older machine.
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

struct LinearArgs {  // out[M, N] = act(x[M, K] w[N, K]^T + bias[N])
  Param x, w, bias;
  void* out;
  int out_dtype;
  int64_t M, N, K, ldx, ldo;
  bool gelu;
  int compute, threads;
};

struct QuantizeArgs {  // w[N, K] -> blob (see quantize.h)
  Param w;
  int64_t N, K;
  void* blob;
  int threads;
};

struct AttentionArgs {  // per sample and head: out = softmax(scale q k^T) v
  const void *q, *k, *v;
  void* out;
  int dtype;
  int H, d, B;
  int64_t ldq, ldk, ldv, ldo;
  const int32_t *cu_q, *cu_k, *seqused_k;  // seqused_k may be null
  float scale;
  float* lse;  // [H, rows_q] or null
  int threads;
};

constexpr int kLayerParams = 16;  // ln1.w ln1.b q.w q.b k.w k.b v.w v.b o.w o.b ln2.w ln2.b fc1.w fc1.b fc2.w fc2.b

struct EncoderArgs {
  const float* x;
  float* out;
  float* hidden;  // [layers, N, D] or null
  int64_t N, D, inner;
  int layers, H, B;
  const Param* params;  // [layers][kLayerParams]
  const float* eps;     // [layers][2]
  const int32_t *cu_seqlens, *seqused_k;
  int compute, threads;
};

struct PatchEmbedArgs {
  Param pixels;
  int64_t stride[4];  // elements, [B, C, H, W]
  int64_t P, C, D;
  Param weight, bias;            // [D, C*P*P], [D]
  const int64_t* patch_source;   // [n] flat b*(gh*gw) + y*gw + x
  int64_t gh, gw;
  const int64_t* patch_rows;     // [n] row of out
  const int64_t* pos_index;      // [n, 4] rows of position
  const float* pos_weight;       // [n, 4]
  Param position;                // [G*G + 1, D]
  Param cls_token;               // [D]
  const int64_t* cls_rows;       // [B] row of out
  Param modality;                // table [*, D]
  const int64_t* modality_rows;  // [B] row of the table
  const int64_t* sample_of_patch;  // [n]
  float* out;                    // [N, D]
  int64_t n, B;
  int compute, threads;
};

struct Masks {  // which tokens and patches of each sample count; 1 where padded
  const uint8_t *text_pad, *image_pad;  // [B, M], [B, N]
  int64_t B, M, N;
};

struct IpotArgs {
  const float* cost;  // [B, M, N]
  float* plan;        // [B, M, N]
  uint8_t* broken;    // [B], set to 1 where a real cost is NaN or infinite: no plan for that sample
  Masks masks;
  double beta;
  int64_t iterations, inner;
  int threads;
};

struct SinkhornArgs {
  const float *cost, *text_marginal, *image_marginal;  // [B, M, N]; [B, M], [B, N] or null (uniform)
  float *plan, *value, *error;                         // [B, M, N], [B], [B]
  int64_t* used;                                       // [B]
  uint8_t* broken;                                     // [B], see IpotArgs
  Masks masks;
  double epsilon, tolerance;  // tolerance < 0: none
  int64_t iterations;
  int threads;
};

struct Rows3 {  // [B, rows, D], the last dimension dense
  Param x;
  int64_t by_sample, by_row;  // strides in elements
};

struct WordPatch {
  Rows3 text, image;
  Masks masks;
  int64_t D;
  int threads;
};

struct WordPatchArgs {
  WordPatch in;
  float *distance, *plan;  // [B]; [B, M, N] or null
  double beta;
  int64_t iterations, inner;
};

struct WordPatchGradientArgs {
  WordPatch in;
  const float *grad, *plan;  // [B], [B, M, N]
  Param text, image;         // gradients, dense; data == nullptr: not wanted
};

struct Kernels {
  const char* isa;
  void (*linear)(const LinearArgs&);
  void (*quantize_linear)(const QuantizeArgs&);
  void (*attention)(const AttentionArgs&);
  void (*encoder)(const EncoderArgs&);
  void (*patch_embed)(const PatchEmbedArgs&);
  void (*ipot)(const IpotArgs&);
  void (*sinkhorn)(const SinkhornArgs&);
  void (*word_patch_distance)(const WordPatchArgs&);
  void (*word_patch_gradient)(const WordPatchGradientArgs&);
};

// ---- dispatch.cpp -------------------------------------------------------------------------------------------------
struct Feature {
  const char* name;
  bool present;
};
const Feature* cpu_features(int* count);
int isa_count();                       // levels built into this binary that this machine can run, slowest first
const Kernels* isa_table(int i);
const Kernels* active_kernels();       // set_isa, else VILT_FAST_CPU_ISA, else the fastest; null if the name is unknown
bool select_isa(const char* name);     // null: back to automatic; false if unavailable

// One 2 MB-aligned scratch buffer, reused between calls because faulting fresh pages in costs more than a small op.
// Buffers above the retention limit are freed at once.
void* scratch_acquire(size_t bytes);
void scratch_release(void* buffer);

size_t quantized_bytes(int64_t N, int64_t K);

}  // namespace vf
