// Gradients of attention over packed rows, from what the forward keeps of each query row: its largest score `top` (in units
// of log2) and `share` = 1 / (sum of the exponentials relative to it). With g the gradient of the output:
//
//   p = share 2^(scale log2(e) q.k - top),  dp = g.v,  delta = g.out - grad_lse,  ds = p (dp - delta)
//   dv = p^T g,  dk = scale ds^T q,  dq = scale ds k
//
// g.out is summed in the order of g.v: where nearly all of p is one key, the two cancel.
//
// Item: one head of one sample, so that nothing is shared between threads and sums do not depend on their number. All of
// its queries and gradients are packed twice, as right operands of q.k and g.v and of the sums over queries (4 m d units,
// 300 KB at 288 x 64: in L2). Scores are made transposed, 6 keys x m queries in L1, where p and ds are the left operands of
// dv and dk as they are; ds of 64 keys is turned around for its share of dq, which waits in L2 for all keys.
#include "attention.h"
#include "attention_bwd_args.h"

namespace vf::VF_ISA {

namespace {

struct Space {
  uint32_t *q, *g, *out;       // per 64 queries [d/u][64]; out of 64 alone
  uint32_t *q_sums, *g_sums;   // per 64 dims [m/u][64]
  uint32_t* k_sums;            // the same of 64 keys
  uint32_t *key, *value;       // kTileRows keys [d/u]
  uint32_t *probs, *ds;        // kTileRows and 64 keys [ld]
  uint32_t *pairs, *turned;    // [64/u][ld] and [m][64]: ds with units along keys
  float *scores, *dp, *sum;    // kTileRows keys [ld_scores], [ld_scores], [wide]
  float* dq;                   // [m][wide]
  float *top, *share, *delta;  // [m rounded up]
  int64_t ld, ld_scores, wide;
};

template <class T>
Space lay_out(Arena& arena, int64_t m, int64_t d) {
  constexpr int u = T::kUnit;
  const int64_t panels = round_up(m, kPanel), wide = round_up(d, kPanel), du = ceil_div(d, u), mu = ceil_div(m, u);
  Space s;
  s.ld_scores = panels + 16;  // not a power of two: rows of a tile fall into different cache sets
  s.ld = s.ld_scores / u;
  s.wide = wide;
  s.q = arena.take<uint32_t>(panels * du);
  s.g = arena.take<uint32_t>(panels * du);
  s.out = arena.take<uint32_t>(du * kPanel);
  s.q_sums = arena.take<uint32_t>(mu * wide);
  s.g_sums = arena.take<uint32_t>(mu * wide);
  s.k_sums = arena.take<uint32_t>(kPanel / u * wide);
  s.key = arena.take<uint32_t>(kTileRows * du);
  s.value = arena.take<uint32_t>(kTileRows * du);
  s.scores = arena.take<float>(kTileRows * s.ld_scores);
  s.probs = u == 1 ? (uint32_t*)s.scores : arena.take<uint32_t>(kTileRows * s.ld);
  s.dp = arena.take<float>(kTileRows * s.ld_scores);
  s.ds = arena.take<uint32_t>(kPanel * s.ld);
  s.pairs = u == 1 ? s.ds : arena.take<uint32_t>(kPanel / u * s.ld_scores);
  s.turned = arena.take<uint32_t>(m * kPanel);
  s.sum = arena.take<float>(kTileRows * wide);
  s.dq = arena.take<float>(m * wide);
  s.top = arena.take<float>(panels);
  s.share = arena.take<float>(panels);
  s.delta = arena.take<float>(panels);
  return s;
}

template <class T>
void store_rows(const float* x, int64_t ldx, int64_t rows, int64_t d, float factor, void* to, int64_t ld) {
  constexpr int dtype = T::kUnit == 1 ? F32 : BF16;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < d; c += kLanes)
      store_any((void*)advance(to, dtype, r * ld), dtype, c, load(x + r * ldx + c) * set1(factor),
                (int)min64(kLanes, d - c));
}

// Scores and dp of a few keys -> p as a left operand, ds as one.
template <class T>
void weigh(const Space& s, int rows, int64_t m, float factor, uint32_t* ds) {
  const F f = set1(factor);
  for (int r = 0; r < rows; ++r) {
    float *score = s.scores + r * s.ld_scores, *dp = s.dp + r * s.ld_scores;
    for (int64_t i = 0; i < m; i += kLanes) {
      F p = exp2_clamped(fma(load(score + i), f, set1(0) - load(s.top + i))) * load(s.share + i);
      F d = p * (load(dp + i) - load(s.delta + i));
      if (i + kLanes > m) p = keep_first(p, (int)(m - i)), d = keep_first(d, (int)(m - i));
      if constexpr (T::kUnit == 1) {
        store(score + i, p);
        store((float*)(ds + r * s.ld) + i, d);
      } else {
        store((bf16*)(s.probs + r * s.ld) + i, p);
        store((bf16*)(ds + r * s.ld) + i, d);
      }
    }
  }
}

template <class T>
void item(const AttentionBwdArgs& a, int b, int h, const Space& s) {
  constexpr int u = T::kUnit, dtype = u == 1 ? F32 : BF16;
  const int64_t d = a.d, head = (int64_t)h * d, du = ceil_div(d, u), ld = (int64_t)a.H * d, all = a.cu_q[a.B];
  const int64_t row = a.cu_q[b], m = a.cu_q[b + 1] - row, mu = ceil_div(m, u);
  const int64_t first = a.cu_k[b], keys = a.cu_k[b + 1] - first;
  const int64_t n = m == 0 ? 0 : a.seqused_k ? a.seqused_k[b] : keys;
  auto at = [&](const void* x, int64_t r, int64_t ldx) { return (void*)advance(x, dtype, r * ldx + head); };
  auto clear = [&](void* x, int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) memset(at(x, r, ld), 0, (size_t)d * (dtype == BF16 ? 2 : 4));
  };
  clear(a.dk, first + n, first + keys);
  clear(a.dv, first + n, first + keys);
  if (n == 0) return clear(a.dq, row, row + m);

  const void *q = at(a.q, row, a.ldq), *g = at(a.grad, row, a.ldg);
  for (int64_t j = 0; j < m; j += kPanel) {
    const int columns = (int)min64(kPanel, m - j);
    pack<T>(advance(q, dtype, j * a.ldq), dtype, a.ldq, columns, 0, d, s.q + j * du);
    pack<T>(advance(g, dtype, j * a.ldg), dtype, a.ldg, columns, 0, d, s.g + j * du);
  }
  pack_values<T>(q, a.ldq, m, d, s.q_sums);
  pack_values<T>(g, a.ldg, m, d, s.g_sums);
  for (int64_t j = 0; j < m; j += kPanel) {
    const int columns = (int)min64(kPanel, m - j);
    pack<T>(at(a.out, row + j, a.ldo), dtype, a.ldo, columns, 0, d, s.out);
    for (int64_t c = 0; c < columns; c += kLanes) {
      F sum = set1(0);
      for (int64_t i = 0; i < du; i += kChain) {
        F chain = set1(0);
        for (int64_t k = i; k < min64(du, i + kChain); ++k)
          chain = T::dot(chain, T::get(s.g + j * du + k * kPanel + c), T::get(s.out + k * kPanel + c));
        sum = i ? chain + sum : chain;
      }
      store(s.delta + j + c, sum);
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    const int64_t place = h * all + row + i;
    if (a.grad_lse) s.delta[i] -= a.grad_lse[place];
    s.top[i] = a.stats[place], s.share[i] = a.stats[a.H * all + place];
  }
  for (int64_t i = m; i < round_up(m, kLanes); ++i) s.delta[i] = s.top[i] = s.share[i] = 0;

  for (int64_t j = 0; j < n; j += kPanel) {
    const int64_t chunk = min64(kPanel, n - j), units = ceil_div(chunk, u);
    for (int64_t k0 = 0; k0 < chunk; k0 += kTileRows) {
      const int rows = (int)min64(kTileRows, chunk - k0);
      const int64_t key = first + j + k0;
      for (int r = 0; r < rows; ++r) {
        to_units<T>(at(a.k, key + r, a.ldk), dtype, d, s.key + r * du, nullptr, nullptr);
        to_units<T>(at(a.v, key + r, a.ldv), dtype, d, s.value + r * du, nullptr, nullptr);
      }
      uint32_t* ds = s.ds + k0 * s.ld;
      tile_panels<T>(rows, m, s.key, du, s.q, du, s.scores, s.ld_scores, false);
      tile_panels<T>(rows, m, s.value, du, s.g, du, s.dp, s.ld_scores, false);
      weigh<T>(s, rows, m, a.scale * 1.44269504088896341f, ds);
      tile_panels<T>(rows, d, s.probs, s.ld, s.g_sums, mu, s.sum, s.wide, false);
      store_rows<T>(s.sum, s.wide, rows, d, 1.f, at(a.dv, key, ld), ld);
      tile_panels<T>(rows, d, ds, s.ld, s.q_sums, mu, s.sum, s.wide, false);
      store_rows<T>(s.sum, s.wide, rows, d, a.scale, at(a.dk, key, ld), ld);
    }
    if constexpr (u == 2) {
      if (chunk % 2) memset(s.ds + chunk * s.ld, 0, (size_t)s.ld * 4);
      for (int64_t i = 0; i < units; ++i)
        for (int64_t c = 0; c < m; c += kLanes)
          storei(s.pairs + i * s.ld_scores + c,
                 interleave_bf16((bf16*)(s.ds + 2 * i * s.ld) + c, (bf16*)(s.ds + (2 * i + 1) * s.ld) + c));
    }
    pack<f32>(s.pairs, F32, u == 1 ? s.ld : s.ld_scores, (int)units, 0, m, s.turned);
    pack_values<T>(at(a.k, first + j, a.ldk), a.ldk, chunk, d, s.k_sums);
    for (int64_t r = 0; r < m; r += kTileRows)
      tile_panels<T>((int)min64(kTileRows, m - r), d, s.turned + r * kPanel, kPanel, s.k_sums, units, s.dq + r * s.wide,
                     s.wide, j > 0);
  }
  store_rows<T>(s.dq, s.wide, m, d, a.scale, at(a.dq, row, ld), ld);
}

template <class T>
void run(const AttentionBwdArgs& a) {
  const int64_t most = most_rows(a.cu_q, 0, a.B);
  share_out(
      a.threads, [&](Arena& arena) { return lay_out<T>(arena, most, a.d); },
      [&](Team& team, const Space& space) {
        for (int64_t i; (i = team.take()) < (int64_t)a.B * a.H;) item<T>(a, (int)(i / a.H), (int)(i % a.H), space);
      });
}

}  // namespace

void attention_bwd(const AttentionBwdArgs& given) {
  AttentionBwdArgs a = given;
  a.threads = worthwhile(a.threads, pairs(a.cu_q, a.cu_k, a.B) * 5 * a.H * a.d);
  if (a.dtype == F32) run<f32>(a);
  else run<bf16x2>(a);
}

}  // namespace vf::VF_ISA
