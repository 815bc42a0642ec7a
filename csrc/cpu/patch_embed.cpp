// Patch projection written straight into packed rows:
//   out[patch_rows[i]] = W patch_i + bias + sum_j pos_weight[i, j] position[pos_index[i, j]] + modality[sample]
//   out[cls_rows[b]]   = cls_token + position[0] + modality[b]
// Only the patches that are asked for are read; patch_i is C x P x P pixels at grid cell patch_source[i], gathered with
// any strides into product rows, 480 patches at a time (6 MB of scratch), each chunk: gather (+ convert) | product with
// the embedding as its epilogue.
#include "gemm.h"
#include "patch_embed_args.h"

namespace vf::VF_ISA {

constexpr int64_t kPatchRows = 480;

struct Embed {  // epilogue: r counts from the first patch of the chunk
  const PatchEmbedArgs* a;
  int64_t first;
  struct Row {
    float* out;
    const void *position[4], *modality;
    float weight[4];
  };
  Row row(int64_t r) const {
    const int64_t i = first + r;
    Row o;
    o.out = a->out + a->patch_rows[i] * a->D;
    for (int j = 0; j < 4; ++j) {
      o.position[j] = advance(a->position.data, a->position.dtype, a->pos_index[4 * i + j] * a->D);
      o.weight[j] = a->pos_weight[4 * i + j];
    }
    o.modality = a->modality.data
                     ? advance(a->modality.data, a->modality.dtype, a->modality_rows[a->sample_of_patch[i]] * a->D)
                     : nullptr;
    return o;
  }
  void operator()(const Row& r, int64_t column, F x, int n) const {
    F p = load_any(r.position[0], a->position.dtype, column, n) * set1(r.weight[0]);
    for (int j = 1; j < 4; ++j) p = fma(load_any(r.position[j], a->position.dtype, column, n), set1(r.weight[j]), p);
    x = x + p;
    if (r.modality) x = x + load_any(r.modality, a->modality.dtype, column, n);
    store_any(r.out, F32, column, x, n);
  }
};

static void gather(const PatchEmbedArgs& a, int64_t source, float* row) {
  const int64_t b = source / (a.gh * a.gw), y = source / a.gw % a.gh, x = source % a.gw;
  const int dtype = a.pixels.dtype;
  const void* patch = advance(a.pixels.data, dtype, b * a.stride[0] + y * a.P * a.stride[2] + x * a.P * a.stride[3]);
  for (int64_t c = 0; c < a.C; ++c)
    for (int64_t i = 0; i < a.P; ++i, row += a.P) {
      const void* line = advance(patch, dtype, c * a.stride[1] + i * a.stride[2]);
      if (a.stride[3] == 1) {
        for (int64_t j = 0; j < a.P; j += kLanes) {
          const int n = (int)min64(kLanes, a.P - j);
          store_any(row, F32, j, load_any(line, dtype, j, n), n);
        }
      } else {
        for (int64_t j = 0; j < a.P; ++j) row[j] = load_one(line, dtype, j * a.stride[3]);
      }
    }
}

static void cls_row(const PatchEmbedArgs& a, int64_t b) {
  float* out = a.out + a.cls_rows[b] * a.D;
  const void* modality =
      a.modality.data ? advance(a.modality.data, a.modality.dtype, a.modality_rows[b] * a.D) : nullptr;
  for (int64_t j = 0; j < a.D; j += kLanes) {
    const int n = (int)min64(kLanes, a.D - j);
    F x = load_any(a.cls_token.data, a.cls_token.dtype, j, n) + load_any(a.position.data, a.position.dtype, j, n);
    if (modality) x = x + load_any(modality, a.modality.dtype, j, n);
    store_any(out, F32, j, x, n);
  }
}

template <class T>
static void run(const PatchEmbedArgs& a) {
  const int64_t K = a.C * a.P * a.P, units = ceil_div(K, T::kUnit), most = min64(a.n, kPatchRows);
  const int64_t chunks = ceil_div(a.n, kPatchRows);
  uint32_t* rows;
  float *scale, *offset, *lines;
  Phase* phases;
  char* spaces;
  auto layout = [&](Arena arena) {
    phases = arena.take<Phase>(2 * chunks + 2);
    rows = arena.take<uint32_t>(most * units);
    scale = arena.take<float>(most);
    offset = arena.take<float>(most);
    lines = arena.take<float>(a.threads * round_up(K, kLanes));
    spaces = arena.take<char>((int64_t)kWorkspaceBytes * a.threads);
    return arena.used;
  };
  void* buffer = scratch_acquire(layout({nullptr, 0}));
  layout({(char*)buffer, 0});
  memset(phases, 0, (size_t)(2 * chunks + 2) * sizeof(Phase));

#pragma omp parallel num_threads(a.threads)
  {
    Team team{team_size(), team_rank(), nullptr};
    Phase own{};
    team.phase = team.size > 1 ? phases : &own;
    const Workspace ws = workspace(spaces + (size_t)team.rank * kWorkspaceBytes);
    float* line = lines + team.rank * round_up(K, kLanes);
    for (int64_t b; (b = team.take()) < a.B;) cls_row(a, b);
    team.barrier();
    for (int64_t first = 0; first < a.n; first += kPatchRows) {
      const int64_t n = min64(kPatchRows, a.n - first);
      for (int64_t i; (i = team.take()) < n;) {
        if constexpr (T::kUnit == 1) {
          gather(a, a.patch_source[first + i], (float*)(rows + i * units));
        } else {
          gather(a, a.patch_source[first + i], line);
          to_units<T>(line, F32, K, rows + i * units, scale + i, offset + i);
        }
      }
      team.barrier();
      const Weight w{a.weight, a.bias, a.D, K};
      const Embed epi{&a, first};
      gemm<T>(team, {rows, units, scale, offset}, n, &w, &epi, 1, nullptr, ws);
      team.barrier();
    }
  }
  scratch_release(buffer);
}

void patch_embed(const PatchEmbedArgs& given) {
  PatchEmbedArgs a = given;
  a.threads = worthwhile(a.threads, a.n * a.D * a.C * a.P * a.P);
  if (a.compute == F32) run<f32>(a);
  else if (a.compute == BF16) run<bf16x2>(a);
  else run<u8s8x4>(a);
}

}  // namespace vf::VF_ISA
