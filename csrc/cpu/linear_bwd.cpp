// Gradients of y = x W^T + b, or of gelu of it, with g the gradient of y (times gelu'(y)):
//
//   dx[M, K] = g W          left g as it lies, right W: rows of W are summed over (gemm_t.h)
//   dW[N, K] = g^T x        left g turned around, right x
//   db[N] = sum over rows of g, read as g^T
//
// Phases: g times gelu', or padded to whole units; g turned around; x and W packed, rounded on the way: each once, into
// scratch, 2 (M N + M K + N K) bytes in bf16 | items of dx: 516 rows x 64 columns, and of dW: 192 x 384, in one phase, so that
// threads wait once. Each sum goes over the same blocks in the same order whatever the threads.
#include "gemm_t.h"
#include "linear_bwd_args.h"

namespace vf::VF_ISA {

namespace {

constexpr int64_t kLeftRows = 192, kColumns = 384;  // of dW: its sums and g^T take 480 KB
constexpr int64_t kSums = kLeftRows * kColumns > kMaxRows* kPanel ? kLeftRows * kColumns : kMaxRows * kPanel;
constexpr int64_t kStrip = 192;

template <class T>
constexpr int kOwn = T::kUnit == 1 ? F32 : BF16;  // what products are multiplied in

struct Packed {
  char* grad;  // [M][ld] of the own dtype: g, if it cannot be read as it lies
  int64_t ld;
  uint32_t* turned;  // [units of M / block][columns][block]: g^T
  int64_t columns, block;
  Right x, w;  // over units of M and of N
};

// Rows of g from r0, one group of kLanes units of M: times gelu', and turned around; a strip of columns at a time, in L1.
template <class T>
void gradient_group(const LinearBwdArgs& a, const Packed& p, int64_t r0, uint32_t* pairs) {
  constexpr int u = T::kUnit, dtype = kOwn<T>;
  const int64_t n = min64(a.M - r0, kLanes * u), unit = r0 / u;
  for (int64_t c = 0; c < a.N; c += kStrip) {
    const int64_t width = min64(kStrip, a.N - c);
    const void* g = advance(a.grad.data, dtype, r0 * a.ld_grad + c);
    int64_t ldg = a.ld_grad;
    if (p.grad) {
      void* to = (void*)advance(p.grad, dtype, r0 * p.ld + c);
      for (int64_t r = 0; r < n; ++r) {
        void* row = (void*)advance(to, dtype, r * p.ld);
        if (u == 2 && width % 2) ((bf16*)row)[width] = 0;
        for (int64_t i = 0; i < width; i += kLanes) {
          const int w = (int)min64(kLanes, width - i);
          F x = load_any(g, dtype, r * ldg + i, w);
          if (a.pre.data) x = x * gelu_slope(load_any(a.pre.data, dtype, (r0 + r) * a.ld_pre + c + i, w));
          store_any(row, dtype, i, x, w);
        }
      }
      g = to, ldg = p.ld;
    }
    if (!p.turned) continue;
    uint32_t* out = p.turned + (unit / p.block * p.columns + c) * p.block + unit % p.block;
    if (u == 1 && n == kLanes && width % kChunk == 0) {
      turn((const uint32_t*)g, ldg, kLanes, width, out, p.block);
    } else {
      pair_rows<T>(g, dtype, ldg, n, width, pairs, kStrip, kPanel);
      turn(pairs, kStrip, kLanes, width, out, p.block);
    }
  }
}

// Units [u0, u1) of a matrix [rows][K] that is summed over its rows.
template <class T>
void pack_units(const void* x, int dtype, int64_t ldx, int64_t rows, int64_t K, int64_t u0, int64_t u1,
                const Right& to) {
  constexpr int u = T::kUnit;
  pair_rows<T>(advance(x, dtype, u0 * u * ldx), dtype, ldx, min64(rows, u1 * u) - u0 * u, K, to.at(u0, 0), kPanel,
               to.units * kPanel);
}

template <class T>
void input_item(const LinearBwdArgs& a, const Packed& p, int64_t r0, int64_t r1, int64_t column, float* acc) {
  constexpr int u = T::kUnit, dtype = kOwn<T>;
  const uint32_t* g = (const uint32_t*)(p.grad ? p.grad : a.grad.data);
  const int64_t ld = (p.grad ? p.ld : a.ld_grad) / u;
  const Store<Finish::kPlain> epi{(void*)advance(a.dx, dtype, r0 * a.K + column), dtype, a.K, nullptr};
  product<T>(r1 - r0, column, min64(a.K, column + kPanel), {g + r0 * ld, ld, sum_block(p.w.units)}, p.w, acc, epi);
}

template <class T>
void weight_item(const LinearBwdArgs& a, const Packed& p, int64_t n0, int64_t n1, int64_t column, float* acc) {
  const Left left{p.turned + n0 * p.block, p.block, p.columns * p.block};
  if (a.dw) {
    const Store<Finish::kPlain> epi{(void*)advance(a.dw, a.w.dtype, n0 * a.K + column), a.w.dtype, a.K, nullptr};
    product<T>(n1 - n0, column, min64(a.K, column + kColumns), left, p.x, acc, epi);
  }
  if (!a.db || column > 0) return;
  const int64_t units = ceil_div(a.M, T::kUnit);
  for (int64_t n = n0; n < n1; n += kLanes) {
    alignas(64) float sums[kLanes] = {};
    for (int64_t u0 = 0; u0 < units; u0 += p.block)
      for (int64_t r = n; r < min64(n1, n + kLanes); ++r) {
        const uint32_t* row = p.turned + u0 * p.columns + r * p.block;
        F sum = set1(0);
        for (int64_t i = 0; i < min64(p.block, units - u0); i += kLanes) {
          const I x = loadi(row + i);
          sum = sum + keep_first(T::kUnit == 1 ? as_float(x) : as_float(bf16_low(x)) + as_float(bf16_high(x)),
                                 (int)min64(kLanes, units - u0 - i));
        }
        sums[r - n] += reduce_add(sum);
      }
    store_any(a.db, a.w.dtype, n, load(sums), (int)min64(kLanes, n1 - n));
  }
}

template <class T>
void run(const LinearBwdArgs& a) {
  constexpr int u = T::kUnit, dtype = kOwn<T>;
  constexpr int64_t kUnits = 16;  // of x and w packed at once
  const bool summed = a.dw || a.db;
  const bool ready = !a.pre.data && (u == 1 || (a.N % 2 == 0 && a.ld_grad % 2 == 0 && (uintptr_t)a.grad.data % 4 == 0));
  const int64_t over_m = ceil_div(a.M, u), over_n = ceil_div(a.N, u), wide = round_up(a.K, kPanel);
  Packed p;
  Phase* phases;
  uint32_t* pairs;
  float* sums;
  p.ld = round_up(a.N, u), p.columns = round_up(a.N, kChunk), p.block = sum_block(over_m);
  auto layout = [&](Arena arena) {
    p.grad = arena.take<char>(ready ? 0 : a.M * p.ld * (4 / u));
    p.turned = arena.take<uint32_t>(summed ? round_up(over_m, p.block) * p.columns : 0);
    p.x = {arena.take<uint32_t>(a.dw ? over_m * wide : 0), over_m};
    p.w = {arena.take<uint32_t>(a.dx ? over_n * wide : 0), over_n};
    phases = arena.take<Phase>(3);
    pairs = arena.take<uint32_t>(kLanes * kStrip * a.threads);
    sums = arena.take<float>(kSums * a.threads);
    return arena.used;
  };
  void* buffer = scratch_acquire(layout({nullptr, 0}));
  layout({(char*)buffer, 0});
  memset(phases, 0, 3 * sizeof(Phase));
  if (ready) p.grad = nullptr;
  if (!summed) p.turned = nullptr;

#pragma omp parallel num_threads(a.threads)
  {
    Team team{team_size(), team_rank(), nullptr};
    Phase own{};
    team.phase = team.size > 1 ? phases : &own;
    uint32_t* pair = pairs + kLanes * kStrip * team.rank;
    float* acc = sums + kSums * team.rank;
    const int64_t groups = summed || !ready ? ceil_div(over_m, kLanes) : 0, of_x = a.dw ? ceil_div(over_m, kUnits) : 0,
                  of_w = a.dx ? ceil_div(over_n, kUnits) : 0;
    for (int64_t item; (item = team.take()) < groups + of_x + of_w;) {
      if (item < groups) {
        gradient_group<T>(a, p, item * kLanes * u, pair);
      } else if (item < groups + of_x) {
        const int64_t u0 = (item - groups) * kUnits;
        pack_units<T>(a.x.data, dtype, a.ldx, a.M, a.K, u0, min64(over_m, u0 + kUnits), p.x);
      } else {
        const int64_t u0 = (item - groups - of_x) * kUnits;
        pack_units<T>(a.w.data, a.w.dtype, a.K, a.N, a.K, u0, min64(over_n, u0 + kUnits), p.w);
      }
    }
    team.barrier();
    const int64_t panels = a.dx ? ceil_div(a.K, kPanel) : 0;
    const int64_t block = panels ? row_block(a.M, panels, team.size) : 1, blocks = ceil_div(a.M, block);
    const int64_t across = a.dw ? ceil_div(a.K, kColumns) : 1;
    int64_t part = kLeftRows;
    while (part > 48 && ceil_div(a.N, part) * across < 3 * team.size) part /= 2;
    const int64_t inputs = panels * blocks, weights = summed ? ceil_div(a.N, part) * across : 0;
    for (int64_t item; (item = team.take()) < inputs + weights;) {
      if (item < weights) {  // the larger ones first
        const int64_t n0 = item / across * part;
        weight_item<T>(a, p, n0, min64(a.N, n0 + part), item % across * kColumns, acc);
      } else {
        const int64_t i = item - weights, r0 = i % blocks * block;
        input_item<T>(a, p, r0, min64(a.M, r0 + block), i / blocks * kPanel, acc);
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
