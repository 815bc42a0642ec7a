// out = softmax(scale q k^T) v for one sample, one head and a block of query rows: the work item of attention.cpp and
// of the encoder.
//
// Keys come in blocks of up to 512 (256 above head dim 128). A block's K and V are packed into the same panels as a
// weight (k^T [d/u][64][u] per 64 keys, v [keys/u][64][u] per 64 dims), so scores and outputs are two ordinary tile
// products. Per tile of 6 query rows, the scores of a whole key block stay in L1: maximum, exp2 and sum are three
// sweeps over it. Several key blocks use the online softmax: running maximum m, sum l and unnormalised output per row.
// Scratch per thread: packed keys and values, one tile of q, scores and probabilities, and [rows][d] outputs.
#pragma once
#include "attention_args.h"
#include "gemm.h"

namespace vf::VF_ISA {

constexpr int64_t kQueryRows = 384;  // most query rows per item

VF_INLINE int64_t key_block(int64_t d) { return d <= 128 ? 512 : 256; }

struct AttentionSpace {
  uint32_t *keys, *values, *q, *probs;
  float *scores, *out, *top, *sum;
  int64_t ld_scores, ld_out;
};

VF_INLINE AttentionSpace attention_space(Arena& arena, int64_t d) {
  const int64_t dp = round_up(d, kPanel), nk = key_block(d);
  AttentionSpace s;
  s.ld_scores = nk + 16;  // not a power of two: rows of a tile fall into different cache sets
  s.ld_out = dp;
  s.keys = arena.take<uint32_t>(nk * dp);
  s.values = arena.take<uint32_t>(nk * dp);
  s.q = arena.take<uint32_t>(kTileRows * dp);
  s.probs = arena.take<uint32_t>(kTileRows * s.ld_scores);
  s.scores = arena.take<float>(kTileRows * s.ld_scores);
  s.out = arena.take<float>(kQueryRows * dp);
  s.top = arena.take<float>(kQueryRows);
  s.sum = arena.take<float>(kQueryRows);
  return s;
}

// A tile product summed in chains of at most so many units, for accuracy: shorter chains of rounding errors.
constexpr int64_t kChain = 128;
template <class T>
VF_INLINE void tile_chains(int rows, int columns, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t units,
                           float* c, int64_t ldc, bool add) {
  for (int64_t u = 0; u < units; u += kChain)
    tile_any<T>(rows, columns, a + u, lda, b + u * kPanel, min64(kChain, units - u), c, ldc, add || u > 0);
}

// c[rows][columns] = a b for a right operand of any number of columns, in panels of 64; added to what is there if `add`.
template <class T>
VF_INLINE void tile_panels(int rows, int64_t columns, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t units,
                           float* c, int64_t ldc, bool add) {
  for (int64_t j = 0; j < columns; j += kPanel)
    tile_chains<T>(rows, (int)min64(kPanel, columns - j), a, lda, b + j * units, units, c + j, ldc, add);
}

// values [n keys][d] -> per 64 dims a panel [ceil(n/u)][64][u]
template <class T>
static void pack_values(const void* v, int64_t ldv, int64_t n, int64_t d, uint32_t* out) {
  constexpr int u = T::kUnit;
  const int64_t units = ceil_div(n, u);
  alignas(64) bf16 zero[kLanes] = {}, even[kLanes] = {}, odd[kLanes] = {};
  for (int64_t c = 0; c < d; c += kLanes) {
    const int width = (int)min64(kLanes, d - c);
    uint32_t* to = out + c / kPanel * units * kPanel + c % kPanel;
    if constexpr (u == 1) {
      for (int64_t i = 0; i < n; ++i)
        storei(to + i * kPanel, as_int(load_any((const float*)v + i * ldv, F32, c, width)));
    } else {
      for (int64_t i = 0; i < units; ++i) {
        const bf16 *a = (const bf16*)v + 2 * i * ldv + c, *b = 2 * i + 1 < n ? a + ldv : zero;
        if (width < kLanes) {
          memcpy(even, a, (size_t)width * 2);
          memcpy(odd, b, (size_t)width * 2);
          a = even, b = odd;
        }
        storei(to + i * kPanel, interleave_bf16(a, b));
      }
    }
  }
}

// One tile of scores -> probabilities relative to each row's running maximum `top` (in units of log2), as a product
// operand, and running sums. `shrink` receives the factor for everything accumulated before. Rows are independent, so
// the maxima of all rows come first: their latency chains overlap.
template <class T>
static void softmax_tile(float* scores, int64_t ld, int rows, int64_t n, float factor, float* top, float* sum,
                         float* shrink, uint32_t* probs) {
  const F f = set1(factor);
  const int64_t padded = round_up(n, kLanes);
  float next[kTileRows];
  for (int r = 0; r < rows; ++r) {
    float* s = scores + r * ld;
    for (int64_t i = n; i < padded; ++i) s[i] = s[0];
    F m0 = set1(top[r]), m1 = m0;
    int64_t i = 0;
    for (; i + 2 * kLanes <= padded; i += 2 * kLanes) {
      m0 = max(m0, load(s + i) * f);
      m1 = max(m1, load(s + i + kLanes) * f);
    }
    if (i < padded) m0 = max(m0, load(s + i) * f);
    next[r] = reduce_max(max(m0, m1));
  }
  for (int r = 0; r < rows; ++r) {
    shrink[r] = top[r] == next[r] ? 1.f : top[r] == -INFINITY ? 0.f : exp2f(top[r] - next[r]);
    top[r] = next[r];
    const float* s = scores + r * ld;
    uint32_t* out = probs + r * ld;
    const F shift = set1(-next[r]);
    F total = set1(0);
    for (int64_t i = 0; i < padded; i += kLanes) {
      F p = exp2_clamped(fma(load(s + i), f, shift));
      if (i + kLanes > n) p = keep_first(p, (int)(n - i));
      total = total + p;
      if constexpr (T::kUnit == 1) store((float*)out + i, p);
      else store((bf16*)out + i, p);
    }
    if (T::kUnit == 2 && n % 2) ((bf16*)out)[n] = 0;
    sum[r] = sum[r] * shrink[r] + reduce_add(total);
  }
}

template <class T>
static void attention_item(const AttentionArgs& a, int b, int h, int64_t q0, int64_t q1, const AttentionSpace& s) {
  constexpr int u = T::kUnit, dtype = u == 1 ? F32 : BF16;
  const int64_t d = a.d, head = (int64_t)h * d, units = ceil_div(d, u);
  const int64_t row = a.cu_q[b], key = a.cu_k[b], rows_q = a.cu_q[a.B];
  const int64_t n = a.seqused_k ? a.seqused_k[b] : a.cu_k[b + 1] - key;
  const float factor = a.scale * 1.44269504088896341f;  // exp(scale s) = 2^(factor s)
  for (int64_t r = q0; r < q1; ++r) s.top[r - q0] = -INFINITY, s.sum[r - q0] = 0;

  for (int64_t k0 = 0; k0 < n; k0 += key_block(d)) {
    const int64_t keys = min64(key_block(d), n - k0), key_units = ceil_div(keys, u);
    const bool first_block = k0 == 0, last_block = k0 + keys == n;
    const void* k = advance(a.k, dtype, (key + k0) * a.ldk + head);
    for (int64_t j = 0; j < keys; j += kPanel)
      pack<T>(advance(k, dtype, j * a.ldk), dtype, a.ldk, (int)min64(kPanel, keys - j), 0, d, s.keys + j * units);
    pack_values<T>(advance(a.v, dtype, (key + k0) * a.ldv + head), a.ldv, keys, d, s.values);

    for (int64_t r0 = q0; r0 < q1; r0 += kTileRows) {
      const int rows = (int)min64(kTileRows, q1 - r0);
      for (int r = 0; r < rows; ++r)
        to_units<T>(advance(a.q, dtype, (row + r0 + r) * a.ldq + head), dtype, d, s.q + r * units, nullptr, nullptr);
      tile_panels<T>(rows, keys, s.q, units, s.keys, units, s.scores, s.ld_scores, false);
      float* out = s.out + (r0 - q0) * s.ld_out;
      float shrink[kTileRows];
      softmax_tile<T>(s.scores, s.ld_scores, rows, keys, factor, s.top + r0 - q0, s.sum + r0 - q0, shrink, s.probs);
      for (int r = 0; !first_block && r < rows; ++r)
        if (shrink[r] != 1.f)
          for (int64_t c = 0; c < d; c += kLanes)
            store(out + r * s.ld_out + c, load(out + r * s.ld_out + c) * set1(shrink[r]));
      tile_panels<T>(rows, d, s.probs, s.ld_scores, s.values, key_units, out, s.ld_out, !first_block);
      if (!last_block) continue;
      for (int r = 0; r < rows; ++r) {
        const F inverse = set1(1.f / s.sum[r0 - q0 + r]);
        void* to = (char*)a.out + ((row + r0 + r) * a.ldo + head) * (dtype == BF16 ? 2 : 4);
        for (int64_t c = 0; c < d; c += kLanes)
          store_any(to, dtype, c, load(out + r * s.ld_out + c) * inverse, (int)min64(kLanes, d - c));
      }
    }
  }
  if (n == 0)
    for (int64_t r = q0; r < q1; ++r)
      memset((char*)a.out + ((row + r) * a.ldo + head) * (dtype == BF16 ? 2 : 4), 0,
             (size_t)d * (dtype == BF16 ? 2 : 4));
  if (a.lse)
    for (int64_t r = q0; r < q1; ++r)
      a.lse[h * rows_q + row + r] = n ? (s.top[r - q0] + log2f(s.sum[r - q0])) * 0.693147180559945309f : -INFINITY;
  for (int64_t r = q0; a.stats && r < q1; ++r) {
    float* of_row = a.stats + h * rows_q + row + r;
    of_row[0] = s.top[r - q0], of_row[a.H * rows_q] = n ? 1.f / s.sum[r - q0] : 0.f;
  }
}

// Pairs of a query and a key.
VF_INLINE int64_t pairs(const int32_t* cu_q, const int32_t* cu_k, int B) {
  int64_t sum = 0;
  for (int b = 0; b < B; ++b) sum += (int64_t)(cu_q[b + 1] - cu_q[b]) * (cu_k[b + 1] - cu_k[b]);
  return sum;
}

// Most rows of one of samples [b0, b1).
VF_INLINE int64_t most_rows(const int32_t* cu, int b0, int b1) {
  int64_t most = 0;
  for (int b = b0; b < b1; ++b) most = cu[b + 1] - cu[b] > most ? cu[b + 1] - cu[b] : most;
  return most;
}

// Items of one call: (sample, head, query block), in that order. Returns the number of blocks of a sample.
VF_INLINE int64_t query_blocks(int64_t rows, int64_t block) { return ceil_div(rows, block); }

// Query rows per item: whole samples when (samples x heads) already keeps the threads busy.
VF_INLINE int64_t query_block(int64_t longest, int64_t samples_heads, int threads) {
  int64_t parts = ceil_div(longest, kQueryRows);
  if (threads > 1)
    while (samples_heads * parts < 4 * threads && longest > parts * 4 * kTileRows) ++parts;
  return parts ? round_up(ceil_div(longest, parts), kTileRows) : kTileRows;
}

// All items of samples [b0, b1).
template <class T>
static void attention_phase(Team& team, const AttentionArgs& a, int b0, int b1, const AttentionSpace& space) {
  const int64_t block = query_block(most_rows(a.cu_q, b0, b1), (int64_t)(b1 - b0) * a.H, team.size);
  int64_t passed = 0, item = team.take();
  for (int b = b0; b < b1; ++b) {
    const int64_t rows = a.cu_q[b + 1] - a.cu_q[b], items = query_blocks(rows, block) * a.H;
    for (; item < passed + items; item = team.take()) {
      const int64_t local = item - passed, q0 = local / a.H * block;
      attention_item<T>(a, b, (int)(local % a.H), q0, min64(rows, q0 + block), space);
    }
    passed += items;
  }
}

}  // namespace vf::VF_ISA
