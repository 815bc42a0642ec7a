// y[M, N] = x[M, K] W[N, K]^T with W a plain row-major Linear weight: packed as it is used, so never stale.
//
// Work item: (row block, panel of 64 output columns). For each block of K the panel of W is transposed into a
// per-thread L2 buffer [K/u][64][u] (u = values per 32-bit unit; see units.h), then all rows stream past it:
//
//   tile   kTileRows x (kTileVecs vectors) accumulators in registers; x is broadcast one unit at a time from L1
//   panel  at most kMaxUnits x 64 units = 64 KB, in L2; re-read once per tile of rows
//   acc    when K takes several blocks, [rows][64] partial sums in L2; otherwise one tile in L1
//
// Packing costs about 0.3 cycle per unit and is used M times: 2.5 % at 185 rows. int8 weights arrive already in panel
// form (quantize.h). Finished tiles go to an epilogue functor `epi(row, column, x, n)` as float vectors, bias added;
// rows and columns past the end never reach it.
#pragma once
#include "quantize.h"
#include "rows.h"
#include "team.h"

namespace vf::VF_ISA {

constexpr int kPanel = 64;
// Partial sums over 256 units keep the float32 rounding error at that of the BLAS libraries (one long sum has 1.6x
// of it), and the smaller panel leaves L2 to the activations: no slower.
constexpr int64_t kMaxUnits = 256;
// Rows per item: 516, whole tiles, so that rounding a block up never exceeds it.
constexpr int64_t kMaxRows = 86 * kTileRows;
constexpr int kTileCols = kTileVecs * kLanes;

struct Rows {  // left operand: units, leading dimension in units; scale and offset per row for u8
  const uint32_t* data;
  int64_t ld;
  const float *scale, *offset;
};

struct Weight {
  Param w, bias;
  int64_t N, K;
};

struct Workspace {  // per thread
  uint32_t* panel;  // [kMaxUnits][64]
  uint32_t* acc;    // [kMaxRows][64]
};
constexpr size_t kWorkspaceBytes = (kMaxUnits + kMaxRows) * kPanel * 4;
VF_INLINE Workspace workspace(void* base) {
  uint32_t* p = (uint32_t*)base;
  return {p, p + kMaxUnits * kPanel};
}

// ---- microkernel ----------------------------------------------------------------------------------------------------
template <class T, int R, int V>
static __attribute__((noinline)) void tile(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t units,
                                           typename T::acc* c, int64_t ldc, bool add) {
  typename T::V sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = typename T::V{};
  for (int64_t k = 0; k < units; ++k) {
    typename T::B bv[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) bv[v] = T::get(b + k * kPanel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename T::A av = T::bcast(a + r * lda + k);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = T::dot(sum[r][v], av, bv[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      typename T::acc* p = c + r * ldc + v * kLanes;
      store_acc(p, add ? plus(sum[r][v], load_acc(p)) : sum[r][v]);
    }
}

template <class T, int R>
VF_INLINE void tile_vecs(int vecs, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t units, typename T::acc* c,
                         int64_t ldc, bool add) {
  switch (vecs) {
    case 1: return tile<T, R, 1>(a, lda, b, units, c, ldc, add);
    case 2: return tile<T, R, 2>(a, lda, b, units, c, ldc, add);
#if VF_LEVEL >= 2
    case 3: return tile<T, R, 3>(a, lda, b, units, c, ldc, add);
    case 4: return tile<T, R, 4>(a, lda, b, units, c, ldc, add);
#endif
  }
}

// rows <= kTileRows, columns <= 64: c[rows][columns rounded up to vectors] (+)= a b
template <class T>
static void tile_any(int rows, int columns, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t units,
                     typename T::acc* c, int64_t ldc, bool add) {
  for (int j = 0; j < columns; j += kTileCols) {
    const int vecs = (int)ceil_div(min64(kTileCols, columns - j), kLanes);
    switch (rows) {
      case 1: tile_vecs<T, 1>(vecs, a, lda, b + j, units, c + j, ldc, add); break;
      case 2: tile_vecs<T, 2>(vecs, a, lda, b + j, units, c + j, ldc, add); break;
      case 3: tile_vecs<T, 3>(vecs, a, lda, b + j, units, c + j, ldc, add); break;
      case 4: tile_vecs<T, 4>(vecs, a, lda, b + j, units, c + j, ldc, add); break;
      case 5: tile_vecs<T, 5>(vecs, a, lda, b + j, units, c + j, ldc, add); break;
      case 6: tile_vecs<T, 6>(vecs, a, lda, b + j, units, c + j, ldc, add); break;
    }
  }
}

// ---- packing --------------------------------------------------------------------------------------------------------
template <class T, int dtype>
VF_INLINE Chunk chunk_at(const char* p) {  // kChunk units of one row; f32 is rounded on the way to bf16 units
  return T::kUnit == 2 && dtype == F32 ? round_chunk((const float*)p) : load_chunk(p);
}

// kLanes columns, whole chunks: the fast path, nothing but loads, shuffles and stores. Columns past `last` repeat it.
template <class T, int dtype, bool full>
static void pack_chunks(const char* w, int64_t stride, int last, int64_t chunks, uint32_t* panel) {
  constexpr int kBytes = kChunk * T::kUnit * (dtype == F32 ? 4 : 2);
  for (int64_t c = 0; c < chunks; ++c, w += kBytes, panel += kChunk * kPanel) {
    auto chunk = [&](int i) { return chunk_at<T, dtype>(w + (full || i < last ? i : last) * stride); };
    I r[kChunk];
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) r[i] = join(chunk(i), kLanes > kChunk ? chunk(i + kChunk) : Chunk{});
    transpose(r);
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; ++i) storei(panel + i * kPanel, r[i]);
  }
}

// Rows [0, columns) of w, values [k0, k1) -> panel[unit][64]. Columns up to the next whole vector are filled with
// something finite or not, but never read; units past k1 are zeros.
template <class T>
static void pack(const void* w, int dtype, int64_t ldw, int columns, int64_t k0, int64_t k1, uint32_t* panel) {
  constexpr int kValues = kChunk * T::kUnit;
  const bool widen = T::kUnit == 1 && dtype == BF16;
  const int64_t chunks = widen ? 0 : (k1 - k0) / kValues, units = ceil_div(k1 - k0, T::kUnit);
  const int64_t stride = ldw * (dtype == BF16 ? 2 : 4);
  for (int c = 0; c < columns; c += kLanes) {
    const int last = (int)min64(kLanes, columns - c) - 1;
    const char* rows = (const char*)advance(w, dtype, c * ldw + k0);
    if (dtype == BF16) {
      if (last == kLanes - 1) pack_chunks<T, BF16, true>(rows, stride, last, chunks, panel + c);
      else pack_chunks<T, BF16, false>(rows, stride, last, chunks, panel + c);
    } else {
      if (last == kLanes - 1) pack_chunks<T, F32, true>(rows, stride, last, chunks, panel + c);
      else pack_chunks<T, F32, false>(rows, stride, last, chunks, panel + c);
    }
    for (int64_t u = chunks * kChunk; u < units; u += kChunk) {  // the last units: gather each row's as floats
      alignas(64) float t[kValues];
      auto chunk = [&](int i) {
        for (int j = 0; j < kValues; ++j) {
          const int64_t k = u * T::kUnit + j;
          t[j] = k0 + k < k1 ? load_one(rows + (i < last ? i : last) * stride, dtype, k) : 0.f;
        }
        return chunk_at<T, F32>((const char*)t);
      };
      I r[kChunk];
      for (int i = 0; i < kChunk; ++i) {
        const Chunk lo = chunk(i);
        r[i] = join(lo, kLanes > kChunk ? chunk(i + kChunk) : lo);
      }
      transpose(r);
      for (int i = 0; i < min64(kChunk, units - u); ++i) storei(panel + (u + i) * kPanel + c, r[i]);
    }
  }
}

// ---- one item -------------------------------------------------------------------------------------------------------
// The part of W that is needed next, fetched into L2 a slice at a time while the current one is being used.
struct Ahead {
  const char* row;
  int64_t stride, bytes, rows, at;
  void fetch(int64_t lines) {
    for (; lines > 0 && rows > 0; --lines) {
      __builtin_prefetch(row + at, 0, 2);
      at += 64;
      if (at < bytes) continue;
      at = 0, row += stride, --rows;
    }
  }
  int64_t lines() const { return rows * ceil_div(bytes, 64); }
};

template <class T>
VF_INLINE int64_t unit_block(int64_t K) {  // units per block of K
  const int64_t units = ceil_div(K, T::kUnit);
  return round_up(ceil_div(units, ceil_div(units, kMaxUnits)), kLanes);
}

template <class T>
VF_INLINE Ahead ahead_of(const Weight& w, int64_t panel, int64_t u0) {
  const int64_t units = ceil_div(w.K, T::kUnit), u1 = min64(units, u0 + unit_block<T>(w.K));
  if (T::kUnit == 4) return {};  // one straight run of memory: the hardware sees it coming
  const int64_t size = w.w.dtype == BF16 ? 2 : 4;
  return {(const char*)w.w.data + (panel * kPanel * w.K + u0 * T::kUnit) * size, w.K * size,
          (u1 - u0) * T::kUnit * size, min64(kPanel, w.N - panel * kPanel), 0};
}

template <class T, class Epi>
static void gemm_panel(const Rows& x, int64_t row0, int64_t row1, const Weight& w, int64_t panel, Ahead next,
                       Workspace ws, const Epi& epi) {
  using acc = typename T::acc;
  constexpr bool kQuantized = T::kUnit == 4;
  const int64_t column = panel * kPanel;
  const int columns = (int)min64(kPanel, w.N - column);
  const int64_t units = ceil_div(w.K, T::kUnit), block = unit_block<T>(w.K);
  const bool blocks = block < units;
  alignas(64) float bias[kPanel] = {};
  if (w.bias.data)
    for (int j = 0; j < columns; ++j) bias[j] = load_one(w.bias.data, w.bias.dtype, column + j);
  const QuantizedView q = kQuantized ? quantized_view((void*)w.w.data, w.N, w.K) : QuantizedView{};

  for (int64_t u0 = 0; u0 < units; u0 += block) {
    const int64_t u1 = min64(units, u0 + block);
    const uint32_t* b = ws.panel;
    if constexpr (kQuantized) {
      b = q.panels + (panel * units + u0) * kPanel;
    } else {
      pack<T>(advance(w.w.data, w.w.dtype, column * w.K), w.w.dtype, w.K, columns, u0 * T::kUnit,
              min64(w.K, u1 * T::kUnit), ws.panel);
    }
    Ahead ahead = u1 < units ? ahead_of<T>(w, panel, u1) : next;
    const int64_t slice = ceil_div(ahead.lines() * kTileRows, row1 - row0);
    for (int64_t r0 = row0; r0 < row1; r0 += kTileRows) {
      const int rows = (int)min64(kTileRows, row1 - r0);
      acc* c = (acc*)ws.acc + (blocks ? (r0 - row0) * kPanel : 0);
      ahead.fetch(slice);
      tile_any<T>(rows, columns, x.data + r0 * x.ld + u0, x.ld, b, u1 - u0, c, kPanel, u0 > 0);
      if (u1 < units) continue;
      typename Epi::Row out[kTileRows];
      for (int r = 0; r < rows; ++r) out[r] = epi.row(r0 + r);
      for (int j = 0; j < columns; j += kLanes) {
        const int n = (int)min64(kLanes, columns - j);
        const F b = load(bias + j);
        F scale, sum;
        if constexpr (kQuantized) scale = load(q.scale + column + j), sum = load(q.scaled_sum + column + j);
        for (int r = 0; r < rows; ++r) {
          F v;
          if constexpr (kQuantized) {  // sum over k of (s q + o) (t w) = t s (q . w) + o t sum(w)
            v = fma(to_float(loadi(c + r * kPanel + j)) * set1(x.scale[r0 + r]), scale,
                    fma(set1(x.offset[r0 + r]), sum, b));
          } else {
            v = load(c + r * kPanel + j) + b;
          }
          epi(out[r], column + j, v, n);
        }
      }
    }
  }
}

// ---- a whole product, shared by a team ------------------------------------------------------------------------------
// Rows are split only when the panels alone do not give every thread a few items; each split packs the weights again.
VF_INLINE int64_t row_block(int64_t m, int64_t panels, int threads) {
  int64_t blocks = ceil_div(m, kMaxRows);
  if (threads > 1)
    while (panels * blocks < 3 * threads && m > blocks * 4 * kTileRows) ++blocks;
  return round_up(ceil_div(m, blocks), kTileRows);
}

// `then` is the weight of the product that follows, if known: its first panels are fetched during the last ones here.
template <class T, class Epi>
static void gemm(Team& team, const Rows& x, int64_t m, const Weight* w, const Epi* epi, int products,
                 const Weight* then, Workspace ws) {
  int64_t panels = 0;
  for (int i = 0; i < products; ++i) panels += ceil_div(w[i].N, kPanel);
  if (m == 0 || panels == 0) return;
  const int64_t block = row_block(m, panels, team.size), blocks = ceil_div(m, block), items = panels * blocks;
  auto locate = [&](int64_t panel, int& i) {  // of all products -> of product i
    for (i = 0; panel >= ceil_div(w[i].N, kPanel); ++i) panel -= ceil_div(w[i].N, kPanel);
    return panel;
  };
  for (int64_t item; (item = team.take()) < items;) {
    int i, j;
    const int64_t panel = locate(item / blocks, i), r0 = item % blocks * block;
    Ahead next{};  // a guess: teammates take the items in between
    const int64_t guess = (item + team.size) / blocks;
    if (guess < panels) {
      const int64_t p = locate(guess, j);
      next = ahead_of<T>(w[j], p, 0);
    } else if (then && guess - panels < ceil_div(then->N, kPanel)) {
      next = ahead_of<T>(*then, guess - panels, 0);
    }
    gemm_panel<T>(x, r0, min64(m, r0 + block), w[i], panel, next, ws, epi[i]);
  }
}

// The usual epilogues: store as f32 or bf16, after an exact GELU or not, or add to a float32 residual (copied on to
// `copy` if that is wanted).
enum class Finish { kPlain, kGelu, kResidual };

template <Finish kind>
struct Store {
  void* out;
  int dtype;
  int64_t ld;
  float* copy;
  struct Row {
    void* out;
    float* copy;
  };
  Row row(int64_t r) const { return {(char*)out + r * ld * (dtype == BF16 ? 2 : 4), copy ? copy + r * ld : nullptr}; }
  void operator()(const Row& r, int64_t column, F x, int n) const {
    if (kind == Finish::kGelu) x = gelu(x);
    if (kind == Finish::kResidual) {
      x = x + load_any(r.out, F32, column, n);
      store_any(r.out, F32, column, x, n);
      if (r.copy) store_any(r.copy, F32, column, x, n);
    } else {
      store_any(r.out, dtype, column, x, n);
    }
  }
};

}  // namespace vf::VF_ISA
