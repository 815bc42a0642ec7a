// Gradients of y = x W^T + b, or of gelu of it, with g the gradient of y (times gelu'(y)):
//
//   dx[M, K] = g W          left g as it lies, right W: rows of W are summed over (gemm_t.h)
//   dW[N, K] = g^T x        left g turned around, 192 of its columns at a time, right x
//   db[N] = sum over rows of g, while g^T is in L2
//
// Phases: (g times gelu', or padded to whole units, into scratch) | items of dx: 516 rows x 64 columns, and of dW: 192 x 384,
// in one phase, so that threads wait once. Each sum goes over the same blocks in the same order whatever the threads.
#include "gemm_t.h"
#include "linear_bwd_args.h"

namespace vf::VF_ISA {

namespace {

constexpr int64_t kLeftRows = 192, kColumns = 384;  // of dW: its sums and g^T take 480 KB

struct Space {  // per thread
  uint32_t *panel, *left, *rows;
  float* acc;
};

Space lay_out(Arena& arena) {
  const int64_t dx = kMaxRows * kPanel, dw = kLeftRows * kColumns;
  Space s;
  s.panel = arena.take<uint32_t>(kMaxUnits * kPanel);
  s.left = arena.take<uint32_t>(kLeftRows * kMaxUnits);
  s.rows = arena.take<uint32_t>(kMaxUnits * kLeftRows);
  s.acc = arena.take<float>(dx > dw ? dx : dw);
  return s;
}

template <class T>
void input_item(const LinearBwdArgs& a, int64_t r0, int64_t r1, int64_t column, const Space& s) {
  constexpr int u = T::kUnit, dtype = u == 1 ? F32 : BF16;
  const int64_t ld = a.ld_grad / u, width = min64(kPanel, a.K - column);
  const uint32_t* g = (const uint32_t*)a.grad.data + r0 * ld;
  const Store<Finish::kPlain> epi{(char*)a.dx + (r0 * a.K + column) * (dtype == BF16 ? 2 : 4), dtype, a.K, nullptr};
  product<T>(
      r1 - r0, width, ceil_div(a.N, u), [&](int64_t u0, int64_t) { return Operand{g + u0, ld}; },
      [&](int64_t u0, int64_t u1, int64_t, uint32_t* panel) {
        pair_rows<T>(advance(a.w.data, a.w.dtype, u0 * u * a.K + column), a.w.dtype, a.K, min64(a.N, u1 * u) - u0 * u,
                     width, panel, kPanel);
      },
      s.panel, s.acc, epi);
}

template <class T>
void weight_item(const LinearBwdArgs& a, int64_t n0, int64_t n1, int64_t column, const Space& s) {
  constexpr int u = T::kUnit, dtype = u == 1 ? F32 : BF16;
  const int64_t rows = n1 - n0;
  alignas(64) float sums[kLeftRows] = {};
  const bool summed = a.db && column == 0;
  auto left = [&](int64_t u0, int64_t u1) {
    const int64_t units = u1 - u0;
    const void* g = advance(a.grad.data, dtype, u0 * u * a.ld_grad + n0);
    if (u == 1 && units % kLanes == 0 && rows % kChunk == 0) {
      turn((const uint32_t*)g, a.ld_grad, units, rows, s.left, kMaxUnits);
    } else {
      pair_rows<T>(g, dtype, a.ld_grad, min64(a.M, u1 * u) - u0 * u, rows, s.rows, kLeftRows);
      turn(s.rows, kLeftRows, units, rows, s.left, kMaxUnits);
    }
    for (int64_t r = 0; summed && r < rows; ++r) {
      F sum = set1(0);
      for (int64_t i = 0; i < units; i += kLanes) {
        const int n = (int)min64(kLanes, units - i);
        const I x = loadi(s.left + r * kMaxUnits + i);
        sum = sum + keep_first(u == 1 ? as_float(x) : as_float(bf16_low(x)) + as_float(bf16_high(x)), n);
      }
      sums[r] += reduce_add(sum);
    }
    return Operand{s.left, kMaxUnits};
  };
  const int64_t width = min64(kColumns, a.K - column), all = ceil_div(a.M, u);
  const Store<Finish::kPlain> epi{(void*)advance(a.dw, a.w.dtype, n0 * a.K + column), a.w.dtype, a.K, nullptr};
  auto right = [&](int64_t u0, int64_t u1, int64_t j, uint32_t* panel) {
    pair_rows<T>(advance(a.x.data, dtype, u0 * u * a.ldx + column + j), dtype, a.ldx, min64(a.M, u1 * u) - u0 * u,
                 min64(kPanel, width - j), panel, kPanel);
  };
  if (a.dw) product<T>(rows, width, all, left, right, s.panel, s.acc, epi);
  const int64_t block = sum_block(all);  // as product() does
  for (int64_t u0 = 0; !a.dw && u0 < all; u0 += block) left(u0, min64(all, u0 + block));
  for (int64_t i = 0; summed && i < rows; i += kLanes)
    store_any(a.db, a.w.dtype, n0 + i, load(sums + i), (int)min64(kLanes, rows - i));
}

template <class T>
void run(const LinearBwdArgs& given) {
  LinearBwdArgs a = given;
  constexpr int u = T::kUnit, dtype = u == 1 ? F32 : BF16;
  const bool ready = !a.pre.data && (u == 1 || (a.N % 2 == 0 && a.ld_grad % 2 == 0 && (uintptr_t)a.grad.data % 4 == 0));
  const int64_t ld = round_up(a.N, u);
  Arena measure{nullptr, 0};
  lay_out(measure);
  char *converted, *spaces;
  Phase* phases;
  auto layout = [&](Arena arena) {
    converted = arena.take<char>(ready ? 0 : a.M * ld * (4 / u));
    phases = arena.take<Phase>(3);
    spaces = arena.take<char>((int64_t)measure.used * a.threads);
    return arena.used;
  };
  void* buffer = scratch_acquire(layout({nullptr, 0}));
  layout({(char*)buffer, 0});
  memset(phases, 0, 3 * sizeof(Phase));

#pragma omp parallel num_threads(a.threads)
  {
    LinearBwdArgs mine = a;
    Team team{team_size(), team_rank(), nullptr};
    Phase own{};
    team.phase = team.size > 1 ? phases : &own;
    Arena arena{spaces + (size_t)team.rank * measure.used, 0};
    const Space space = lay_out(arena);
    if (!ready) {
      constexpr int64_t kRows = 8;
      for (int64_t item; (item = team.take()) * kRows < a.M;)
        for (int64_t r = item * kRows; r < min64(a.M, (item + 1) * kRows); ++r) {
          void* to = converted + r * ld * (4 / u);
          if (u == 2 && a.N % 2) ((bf16*)to)[a.N] = 0;
          for (int64_t i = 0; i < a.N; i += kLanes) {
            const int n = (int)min64(kLanes, a.N - i);
            F g = load_any(a.grad.data, dtype, r * a.ld_grad + i, n);
            if (a.pre.data) g = g * gelu_slope(load_any(a.pre.data, dtype, r * a.ld_pre + i, n));
            store_any(to, dtype, i, g, n);
          }
        }
      team.barrier();
      mine.grad.data = converted, mine.ld_grad = ld;
    }
    const int64_t panels = mine.dx ? ceil_div(a.K, kPanel) : 0;
    const int64_t block = panels ? row_block(a.M, panels, team.size) : 1, blocks = ceil_div(a.M, block);
    const int64_t wide = mine.dw ? ceil_div(a.K, kColumns) : 1;
    int64_t part = kLeftRows;
    while (part > 48 && ceil_div(a.N, part) * wide < 3 * team.size) part /= 2;
    const int64_t inputs = panels * blocks, weights = mine.dw || mine.db ? ceil_div(a.N, part) * wide : 0;
    for (int64_t item; (item = team.take()) < inputs + weights;) {
      if (item < weights) {  // the larger ones first
        const int64_t n0 = item / wide * part;
        weight_item<T>(mine, n0, min64(a.N, n0 + part), item % wide * kColumns, space);
      } else {
        const int64_t i = item - weights, r0 = i % blocks * block;
        input_item<T>(mine, r0, min64(a.M, r0 + block), i / blocks * kPanel, space);
      }
    }
  }
  scratch_release(buffer);
}

}  // namespace

void linear_bwd(const LinearBwdArgs& given) {
  LinearBwdArgs a = given;
  a.threads = worthwhile(a.threads, a.M * a.N * a.K);
  if (a.x.dtype == F32) run<f32>(a);
  else run<bf16x2>(a);
}

}  // namespace vf::VF_ISA
