// out = act(x W^T + b) for one Linear. Phases: (convert x rows to the compute type, unless they can be used in place)
// | product with its epilogue. Scratch: the converted rows and one workspace per thread.
#include "gemm.h"
#include "linear_args.h"

namespace vf::VF_ISA {

// Stores what goes into the GELU too.
struct StoreBoth {
  void *out, *pre;
  int dtype;
  int64_t ld;
  using Row = int64_t;
  Row row(int64_t r) const { return r * ld; }
  void operator()(Row r, int64_t column, F x, int n) const {
    store_any(pre, dtype, r + column, x, n);
    store_any(out, dtype, r + column, gelu(x), n);
  }
};

template <class T>
static void run(const LinearArgs& a) {
  constexpr int kUnit = T::kUnit;
  const int64_t units = ceil_div(a.K, kUnit);
  const bool in_place = kUnit != 4 && a.x.dtype == (kUnit == 1 ? F32 : BF16) && a.K % kUnit == 0 &&
                        a.ldx % kUnit == 0 && (uintptr_t)a.x.data % 4 == 0;
  uint32_t* converted;
  float *scale, *offset;
  Phase* phases;
  char* spaces;
  auto layout = [&](Arena arena) {
    converted = arena.take<uint32_t>(in_place ? 0 : a.M * units);
    scale = arena.take<float>(kUnit == 4 ? a.M : 0);
    offset = arena.take<float>(kUnit == 4 ? a.M : 0);
    phases = arena.take<Phase>(3);
    spaces = arena.take<char>((int64_t)kWorkspaceBytes * a.threads);
    return arena.used;
  };
  void* buffer = scratch_acquire(layout({nullptr, 0}));
  layout({(char*)buffer, 0});
  memset(phases, 0, 3 * sizeof(Phase));

#pragma omp parallel num_threads(a.threads)
  {
    Team team{team_size(), team_rank(), nullptr};
    Phase own{};
    team.phase = team.size > 1 ? phases : &own;
    const Workspace ws = workspace(spaces + (size_t)team.rank * kWorkspaceBytes);
    if (!in_place) {
      constexpr int64_t kRows = 8;
      for (int64_t item; (item = team.take()) * kRows < a.M;)
        for (int64_t r = item * kRows; r < min64(a.M, (item + 1) * kRows); ++r)
          to_units<T>(advance(a.x.data, a.x.dtype, r * a.ldx), a.x.dtype, a.K, converted + r * units, scale + r,
                      offset + r);
      team.barrier();
    }
    const Rows rows = in_place ? Rows{(const uint32_t*)a.x.data, a.ldx / kUnit, nullptr, nullptr}
                               : Rows{converted, units, scale, offset};
    const Weight w{a.w, a.bias, a.N, a.K};
    const Store<Finish::kPlain> plain{a.out, a.out_dtype, a.ldo, nullptr};
    const Store<Finish::kGelu> with_gelu{a.out, a.out_dtype, a.ldo, nullptr};
    const StoreBoth both{a.out, a.pre, a.out_dtype, a.ldo};
    if (a.gelu && a.pre) gemm<T>(team, rows, a.M, &w, &both, 1, nullptr, ws);
    else if (a.gelu) gemm<T>(team, rows, a.M, &w, &with_gelu, 1, nullptr, ws);
    else gemm<T>(team, rows, a.M, &w, &plain, 1, nullptr, ws);
  }
  scratch_release(buffer);
}

void linear(const LinearArgs& given) {
  LinearArgs a = given;
  a.threads = worthwhile(a.threads, a.M * a.N * a.K);
  if (a.compute == F32) run<f32>(a);
  else if (a.compute == BF16) run<bf16x2>(a);
  else run<u8s8x4>(a);
}

}  // namespace vf::VF_ISA
