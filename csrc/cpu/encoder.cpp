// The whole stack of pre-norm ViT blocks over packed rows: per layer x += O(attention(QKV(LN1 x))), then
// x += FC2(gelu(FC1(LN2 x))). Sequences lie end to end; only attention knows where they begin.
//
// Rows are processed in chunks of whole samples, all layers of a chunk before the next, so that a chunk's activations
// (about 14 MB at 896 rows in float32) stay in the last-level cache while the weights stream past once per chunk.
// Either the whole team works on one chunk (a barrier after each phase), or, when the samples divide evenly enough,
// every thread takes chunks of its own and never waits. In int8, whose weights need no packing, a team that works on one
// chunk shares out its rows: those of a thread stay in its cache through all products of a layer, and nobody waits but
// for attention and for a buffer to be read. Phases of a layer:
//   LN1 (+ quantise) | QKV | attention | (quantise) | O + residual | LN2 (+ quantise) | FC1 + GELU | (quantise) | FC2 + residual
//
// Residual stream and norms are float32. Operands between products: float32, or bf16 in bf16 and int8 mode, where the
// inputs of the products are quantised per row. Scratch per chunk: LN output, and one buffer that holds q, k, v and the
// attention output first and the FFN hidden rows later.
//
// Where only some rows are wanted, the last layer computes keys and values for all and everything else for those: they
// are copied out of the stream, which then lies in scratch too, to the result, and stay there end to end.
#include <stdlib.h>

#include "attention.h"
#include "encoder_args.h"

namespace vf::VF_ISA {

constexpr int64_t kChunkRows = 896;
constexpr int kPhases = 10;
constexpr int64_t kOwnRows = 64;  // of a thread, from which on they are worth the weights being read by each

struct Buffers {  // for the rows of one chunk
  uint32_t *normed, *hidden_units;
  float *scale, *offset;
  char* wide;     // [rows][3 D] q k v, then [rows][D] attention output; later [rows][inner]
  float* stream;  // of all rows, and the norm of the wanted ones, if there are such
  uint32_t* picked;
  float *picked_scale, *picked_offset;
};

template <class T>
struct Between {  // what attention computes in
  using type = bf16x2;
};
template <>
struct Between<f32> {
  using type = f32;
};

template <class T>
static Buffers chunk_buffers(Arena& arena, const EncoderArgs& a, int64_t rows) {
  constexpr int64_t size = T::kUnit == 1 ? 4 : 2;
  const int64_t ld = round_up(a.D, 4), ld_inner = round_up(a.inner, 4);
  Buffers c;
  c.normed = arena.take<uint32_t>(rows * ceil_div(a.D, T::kUnit));
  c.hidden_units = arena.take<uint32_t>(T::kUnit == 4 ? rows * ceil_div(a.inner, 4) : 0);
  c.scale = arena.take<float>(T::kUnit == 4 ? rows : 0);
  c.offset = arena.take<float>(T::kUnit == 4 ? rows : 0);
  c.wide = arena.take<char>(rows * (4 * ld > ld_inner ? 4 * ld : ld_inner) * size);
  const int64_t wanted = a.wanted ? rows : 0;
  c.stream = arena.take<float>(wanted * a.D);
  c.picked = arena.take<uint32_t>(wanted * ceil_div(a.D, T::kUnit));
  c.picked_scale = arena.take<float>(T::kUnit == 4 ? wanted : 0);
  c.picked_offset = arena.take<float>(T::kUnit == 4 ? wanted : 0);
  return c;
}

template <class Fn>
VF_INLINE void each_row(Team& team, int64_t rows, Fn fn) {
  constexpr int64_t kRows = 4;
  for (int64_t item; (item = team.take()) * kRows < rows;)
    for (int64_t r = item * kRows; r < min64(rows, (item + 1) * kRows); ++r) fn(r);
}

template <class T>
static void run_chunk(Team& team, const EncoderArgs& a, int b0, int b1, const Buffers& c, Workspace ws,
                      const AttentionSpace& space, float* row_buffer) {
  using Attn = typename Between<T>::type;
  constexpr int kUnit = T::kUnit, dtype = kUnit == 1 ? F32 : BF16;
  constexpr int64_t size = kUnit == 1 ? 4 : 2;
  const int64_t base = a.cu_seqlens[b0], n = a.cu_seqlens[b1] - base, D = a.D;
  const int64_t ld = round_up(D, 4), ld_inner = round_up(a.inner, 4), units = ceil_div(D, kUnit);
  const int64_t inner_units = ceil_div(a.inner, kUnit);
  char* const ctx = c.wide + n * 3 * ld * size;
  float* const all_rows = a.wanted ? c.stream : a.out + base * D;

  AttentionArgs attn{};
  attn.q = c.wide - base * 3 * ld * size;
  attn.k = (const char*)attn.q + ld * size;
  attn.v = (const char*)attn.k + ld * size;
  attn.out = ctx - base * ld * size;
  attn.dtype = dtype, attn.H = a.H, attn.d = (int)(D / a.H), attn.B = a.B;
  attn.ldq = attn.ldk = attn.ldv = 3 * ld, attn.ldo = ld;
  attn.cu_q = attn.cu_k = a.cu_seqlens, attn.seqused_k = a.seqused_k;
  attn.scale = 1.f / sqrtf((float)attn.d);

  const Rows normed{c.normed, units, c.scale, c.offset}, picked{c.picked, units, c.picked_scale, c.picked_offset};
  auto operand = [&](const void* rows, int64_t ldr, uint32_t* quantised, int64_t quantised_ld) {
    return kUnit == 4 ? Rows{quantised, quantised_ld, c.scale, c.offset}
                      : Rows{(const uint32_t*)rows, ldr / kUnit, nullptr, nullptr};
  };
  auto norm = [&](const float* x, const Affine& p, float eps, const Rows& to, int64_t r) {
    uint32_t* const row = (uint32_t*)to.data + r * units;
    float* y = kUnit == 1 ? (float*)row : row_buffer;
    layer_norm(x, p.weight, p.bias, eps, D, y);
    if (kUnit != 1) to_units<T>(y, F32, D, row, (float*)to.scale + r, (float*)to.offset + r);
  };
  auto linear = [](const Affine& p, int64_t N, int64_t K) { return Weight{p.weight, p.bias, N, K}; };
  // An operand of odd width ends in half a unit that is nobody's. Its weight is 0, but what lay there before may be NaN.
  auto close = [&](char* rows, int64_t ldr, int64_t K, int64_t r) {
    if (kUnit == 2 && K % 2) ((bf16*)(rows + r * ldr * size))[K] = 0;
  };

  const bool shared_out = kUnit == 4 && team.size > 1 && team.size <= 4 && n >= kOwnRows * team.size;
  Phase phase{};
  Team alone{1, 0, &phase};

  for (int layer = 0; layer < a.layers; ++layer) {
    const Layer &p = a.layer[layer], &following = layer + 1 < a.layers ? a.layer[layer + 1] : p;
    float* copy = a.hidden ? a.hidden + ((int64_t)layer * a.N + base) * D : nullptr;

    const bool some = a.wanted && layer + 1 == a.layers, own = shared_out && !some;
    const int64_t first = some ? a.cu_wanted[b0] : base, m = some ? a.cu_wanted[b1] - first : n;
    float* const stream = some ? a.out + first * D : all_rows;  // of the rows that go on

    // Who takes which rows of those, with a barrier that all of the team need or only who shares them.
    Team& by = own ? alone : team;
    const int64_t from = own ? n * team.rank / team.size : 0, to = own ? n * (team.rank + 1) / team.size : m;
    auto done = [&](bool everybody = false) {
      by.barrier();
      if (own && everybody) team.barrier();
    };
    auto rows = [&](const Rows& x) {
      return Rows{x.data + from * x.ld, x.ld, x.scale ? x.scale + from : nullptr, x.offset ? x.offset + from : nullptr};
    };
    auto requantise = [&](const char* x, int64_t ldx, int64_t K, uint32_t* out) {
      each_row(by, to - from, [&](int64_t i) {
        const int64_t r = from + i;
        to_units<T>(x + r * ldx * size, dtype, K, out + r * ceil_div(K, kUnit), c.scale + r, c.offset + r);
      });
      done(true);
    };

    if (some && shared_out && layer) team.barrier();
    each_row(by, own ? to - from : n + (some ? m : 0), [&](int64_t i) {
      if (i < n) {
        const int64_t r = from + i;
        if (layer == 0) memcpy(all_rows + r * D, a.x + (base + r) * D, (size_t)D * 4);
        norm(all_rows + r * D, p.norm1, a.eps[2 * layer], normed, r);
        close(ctx, ld, D, r);
        return;
      }
      i -= n;
      const int64_t row = a.wanted[first + i];  // a copy of its own: who makes that row's may not be done
      memcpy(stream + i * D, layer == 0 ? a.x + row * D : all_rows + (row - base) * D, (size_t)D * 4);
      norm(stream + i * D, p.norm1, a.eps[2 * layer], picked, i);
    });
    done();

    const Weight qkv[3] = {linear(p.query, D, D), linear(p.key, D, D), linear(p.value, D, D)};
    const Weight o = linear(p.out, D, D), fc1 = linear(p.fc1, a.inner, D), fc2 = linear(p.fc2, D, a.inner);
    const Weight next_q = linear(following.query, D, D);
    char* const q = c.wide + from * 3 * ld * size;
    const Store<Finish::kPlain> to_qkv[3] = {{q, dtype, 3 * ld, nullptr},
                                             {q + ld * size, dtype, 3 * ld, nullptr},
                                             {q + 2 * ld * size, dtype, 3 * ld, nullptr}};
    if (some) {
      gemm<T>(team, normed, n, qkv + 1, to_qkv + 1, 2, qkv, ws);
      team.barrier();
      gemm<T>(team, picked, m, qkv, to_qkv, 1, &o, ws);
      attn.cu_q = a.cu_wanted;
      attn.q = c.wide - first * 3 * ld * size;
      attn.out = ctx - first * ld * size;
    } else {
      gemm<T>(by, rows(normed), to - from, qkv, to_qkv, 3, &o, ws);
    }
    done(true);

    attention_phase<Attn>(team, attn, b0, b1, space);
    team.barrier();

    if (kUnit == 4) requantise(ctx, ld, D, c.normed);
    const Store<Finish::kResidual> add{stream + from * D, F32, D, nullptr};
    gemm<T>(by, rows(operand(ctx, ld, c.normed, units)), to - from, &o, &add, 1, &fc1, ws);
    done();

    each_row(by, to - from, [&](int64_t i) {
      norm(stream + (from + i) * D, p.norm2, a.eps[2 * layer + 1], normed, from + i);
      close(c.wide, ld_inner, a.inner, from + i);
    });
    done();

    const Store<Finish::kGelu> to_hidden{c.wide + from * ld_inner * size, dtype, ld_inner, nullptr};
    gemm<T>(by, rows(normed), to - from, &fc1, &to_hidden, 1, &fc2, ws);
    done();

    if (kUnit == 4) requantise(c.wide, ld_inner, a.inner, c.hidden_units);
    const Store<Finish::kResidual> add_copy{stream + from * D, F32, D, copy ? copy + from * D : nullptr};
    gemm<T>(by, rows(operand(c.wide, ld_inner, c.hidden_units, inner_units)), to - from, &fc2, &add_copy, 1, &next_q,
            ws);
    done(layer + 1 == a.layers);
  }
}

// Cuts the samples into at most `chunks` runs of about as many rows; bounds[i] is the first sample of run i. Returns their number.
static int cut(const EncoderArgs& a, int64_t chunks, int* bounds) {
  int count = 0;
  bounds[0] = 0;
  for (int b = 1; b <= a.B; ++b) {
    const int64_t end = a.cu_seqlens[b], goal = a.N * (count + 1) / chunks;
    const int64_t next = b < a.B ? a.cu_seqlens[b + 1] : end;
    if (b == a.B || (count + 1 < chunks && next - goal > goal - end)) bounds[++count] = b;
  }
  return count;
}

static int64_t chunk_rows(const EncoderArgs& a, const int* bounds, int chunk) {
  return a.cu_seqlens[bounds[chunk + 1]] - a.cu_seqlens[bounds[chunk]];
}

// Rows of the busiest thread if every thread takes the next chunk when it is free.
static int64_t makespan(const EncoderArgs& a, const int* bounds, int chunks) {
  int64_t load[64] = {}, worst = 0;
  if (a.threads > 64) return a.N;
  for (int i = 0; i < chunks; ++i) {
    int idle = 0;
    for (int t = 1; t < a.threads; ++t)
      if (load[t] < load[idle]) idle = t;
    load[idle] += chunk_rows(a, bounds, i);
    worst = load[idle] > worst ? load[idle] : worst;
  }
  return worst;
}

template <class T>
static void run(const EncoderArgs& a) {
  int* bounds = (int*)malloc(((size_t)a.B + 1) * sizeof(int));
  bool solo = a.threads > 1 && a.B >= a.threads;
  int chunks = 0;
  if (solo) {
    chunks = cut(a, a.threads * ceil_div(a.N, a.threads * kChunkRows), bounds);
    solo = makespan(a, bounds, chunks) * a.threads <= a.N + a.N / 16;
  }
  if (!solo) chunks = cut(a, ceil_div(a.N, a.threads > 4 ? kChunkRows * a.threads / 4 : kChunkRows), bounds);
  int64_t most = 0;
  for (int i = 0; i < chunks; ++i) most = chunk_rows(a, bounds, i) > most ? chunk_rows(a, bounds, i) : most;

  const int64_t phases = solo ? 1 : (int64_t)chunks * a.layers * kPhases + 1;
  Arena measure{nullptr, 0};
  measure.take<Phase>(phases);
  const size_t shared = measure.used;  // the phases, and the buffers of a chunk unless every thread has its own
  chunk_buffers<T>(measure, a, most);
  const size_t chunk_bytes = measure.used - shared;
  attention_space(measure, a.D / a.H);
  measure.take<float>(round_up(a.D, kLanes));
  measure.take<char>(kWorkspaceBytes);
  const size_t own_bytes = measure.used - shared - chunk_bytes;
  const size_t total = shared + own_bytes * a.threads + chunk_bytes * (solo ? a.threads : 1);
  char* buffer = (char*)scratch_acquire(total);
  memset(buffer, 0, shared);

#pragma omp parallel num_threads(a.threads)
  {
    const int rank = team_rank();
    Arena chunk{buffer + shared + (solo ? chunk_bytes * (size_t)rank : 0), 0};
    Arena own{buffer + shared + chunk_bytes * (solo ? (size_t)a.threads : 1) + own_bytes * (size_t)rank, 0};
    const Buffers buffers = chunk_buffers<T>(chunk, a, most);
    const AttentionSpace space = attention_space(own, a.D / a.H);
    float* row = own.take<float>(round_up(a.D, kLanes));
    const Workspace ws = workspace(own.take<char>(kWorkspaceBytes));
    Phase own_phase{};
    Team alone{1, 0, &own_phase}, all{team_size(), rank, (Phase*)buffer};
    if (all.size == 1) all = alone;
    if (solo) {
      for (int64_t i; (i = __atomic_fetch_add(&((Phase*)buffer)->taken, 1, __ATOMIC_RELAXED)) < chunks;)
        run_chunk<T>(alone, a, bounds[i], bounds[i + 1], buffers, ws, space, row);
    } else {
      for (int i = 0; i < chunks; ++i) run_chunk<T>(all, a, bounds[i], bounds[i + 1], buffers, ws, space, row);
    }
  }
  scratch_release(buffer);
  free(bounds);
}

void encoder(const EncoderArgs& given) {
  EncoderArgs a = given;
  a.threads = worthwhile(a.threads, a.N * a.D * (4 * a.D + 2 * a.inner));
  if (a.N == 0) return;
  if (a.layers == 0) {
    memcpy(a.out, a.x, (size_t)(a.N * a.D) * 4);
    return;
  }
  if (a.compute == F32) run<f32>(a);
  else if (a.compute == BF16) run<bf16x2>(a);
  else run<u8s8x4>(a);
}

}  // namespace vf::VF_ISA
