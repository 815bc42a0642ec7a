// Every native op with a team of threads, from two callers at once, for ThreadSanitizer (`make sanitize`). What the ops give
// is looked at elsewhere.
#include <stdio.h>

#include <algorithm>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "../../../csrc/cpu/add_layer_norm_args.h"
#include "../../../csrc/cpu/add_layer_norm_bwd_args.h"
#include "../../../csrc/cpu/attention_args.h"
#include "../../../csrc/cpu/attention_bwd_args.h"
#include "../../../csrc/cpu/encoder_args.h"
#include "../../../csrc/cpu/fingerprint_args.h"
#include "../../../csrc/cpu/ipot_args.h"
#include "../../../csrc/cpu/linear_args.h"
#include "../../../csrc/cpu/linear_bwd_args.h"
#include "../../../csrc/cpu/patch_embed_args.h"
#include "../../../csrc/cpu/quantize_linear_args.h"
#include "../../../csrc/cpu/sinkhorn_args.h"
#include "../../../csrc/cpu/word_patch_distance_args.h"
#include "../../../csrc/cpu/word_patch_gradient_args.h"

using namespace vf;
using Floats = std::vector<float>;

namespace {

const Kernels& ops() { return *active_kernels(); }

Floats drawn(int64_t n, float scale = 1) {
  static thread_local std::mt19937 generator(1);
  std::normal_distribution<float> normal(0, scale);
  Floats values(static_cast<size_t>(n));
  for (float& v : values) v = normal(generator);
  return values;
}

Param of(const Floats& values) { return {values.data(), F32}; }

struct Blob {  // 64-byte aligned
  std::vector<char> memory;
  void* data;
  Blob(const Floats& w, int64_t N, int64_t K, int threads) : memory(quantized_bytes(N, K) + 64) {
    data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    ops().quantize_linear({of(w), N, K, data, threads});
  }
};

void linear(int compute, int threads) {
  const int64_t M = 700, N = 130, K = 300;
  const Floats x = drawn(M * K), w = drawn(N * K), bias = drawn(N);
  Floats out(M * N), pre(M * N);
  const Blob blob(w, N, K, threads);
  const Param weight = compute == Q8 ? Param{blob.data, Q8} : of(w);
  ops().linear({of(x), weight, of(bias), out.data(), F32, M, N, K, K, N, true, compute, threads, pre.data()});
}

void linear_bwd(int threads) {
  const int64_t M = 700, N = 130, K = 400;
  const Floats grad = drawn(M * N), x = drawn(M * K), w = drawn(N * K), pre = drawn(M * N);
  Floats dx(M * K), dw(N * K), db(N);
  for (const Param& through : {of(pre), Param{nullptr, F32}})
    ops().linear_bwd({of(grad), of(x), of(w), through, dx.data(), dw.data(), db.data(), M, N, K, N, K, N, threads});
}

void add_layer_norm(int threads) {
  const int64_t N = 300, D = 70;
  const Floats x = drawn(N * D), residual = drawn(N * D), vector = drawn(D), grad = drawn(N * D);
  Floats s(N * D), y(N * D), mean(N), rstd(N), dx(N * D), dresidual(N * D), sums(2 * D);
  AddLayerNormArgs a{};
  a.x = of(x), a.residual = of(residual), a.weight = a.bias = of(vector), a.s = s.data(), a.y = y.data();
  a.mean = mean.data(), a.rstd = rstd.data(), a.N = N, a.D = a.ldx = a.ldr = D, a.eps = 1e-6f, a.dropout_p = 0.1f;
  a.seed = 5, a.threads = threads;
  ops().add_layer_norm(a);
  AddLayerNormBwdArgs b{};
  b.grad_s = b.grad_y = of(grad), b.s = of(s), b.weight = of(vector), b.mean = mean.data(), b.rstd = rstd.data();
  b.dx = dx.data(), b.dresidual = dresidual.data(), b.sums = sums.data(), b.N = N, b.D = D, b.dropout_p = 0.1f;
  b.seed = 5, b.threads = threads;
  ops().add_layer_norm_bwd(b);
}

void encoder(int compute, const std::vector<int32_t>& offsets, int threads) {
  const int64_t D = 35, inner = 71, N = offsets.back();
  const int layers = 2, B = static_cast<int>(offsets.size()) - 1;
  const Floats x = drawn(N * D), vector = drawn(inner), matrix = drawn(inner * D, 0.1f);
  Floats out(N * D), hidden(layers * N * D);
  std::vector<Blob> blobs;
  blobs.reserve(3);
  for (auto [n, k] : {std::pair(D, D), std::pair(inner, D), std::pair(D, inner)})
    blobs.emplace_back(matrix, n, k, threads);
  auto part = [&](int blob) { return Affine{compute == Q8 ? Param{blobs[blob].data, Q8} : of(matrix), of(vector)}; };
  const Affine norm{of(vector), of(vector)};
  Layer layer{};
  layer.norm1 = layer.norm2 = norm;
  layer.query = layer.key = layer.value = layer.out = part(0);
  layer.fc1 = part(1), layer.fc2 = part(2);
  const Layer list[layers] = {layer, layer};
  const float eps[2 * layers] = {1e-6f, 1e-6f, 1e-6f, 1e-6f};
  EncoderArgs a{};
  a.x = x.data(), a.out = out.data(), a.hidden = hidden.data();
  a.N = N, a.D = D, a.inner = inner, a.layers = layers, a.H = 5, a.B = B;
  a.layer = list, a.eps = eps, a.cu_seqlens = offsets.data(), a.compute = compute, a.threads = threads;
  ops().encoder(a);
}

void attention(int threads) {
  const std::vector<int32_t> offsets = {0, 100, 100, 700};
  const Floats qkv = drawn(700 * 3 * 64);
  const Floats grad = drawn(700 * 64);
  Floats out(700 * 64), lse(2 * 700), stats(2 * 2 * 700), dq(700 * 64), dk(700 * 64), dv(700 * 64);
  AttentionArgs a{};
  a.q = qkv.data(), a.k = qkv.data() + 64, a.v = qkv.data() + 128, a.out = out.data(), a.dtype = F32;
  a.H = 2, a.d = 32, a.B = 3, a.ldq = a.ldk = a.ldv = 3 * 64, a.ldo = 64;
  a.cu_q = a.cu_k = offsets.data(), a.scale = 0.2f, a.lse = lse.data(), a.threads = threads;
  a.stats = stats.data();
  ops().attention(a);
  AttentionBwdArgs b{};
  b.q = a.q, b.k = a.k, b.v = a.v, b.out = out.data(), b.grad = grad.data();
  b.dq = dq.data(), b.dk = dk.data(), b.dv = dv.data(), b.dtype = F32, b.H = 2, b.d = 32, b.B = 3;
  b.ldq = b.ldk = b.ldv = 3 * 64, b.ldo = b.ldg = 64, b.cu_q = b.cu_k = offsets.data(), b.scale = 0.2f;
  b.stats = stats.data(), b.threads = threads;
  ops().attention_bwd(b);
}

void patch_embed(int compute, int threads) {
  const int64_t P = 4, C = 3, D = 70, side = 24, n = side * side, K = C * P * P;
  const Floats pixels = drawn(C * P * P * n), weight = drawn(D * K), row = drawn(D), weights = drawn(4 * n);
  const Blob blob(weight, D, K, threads);
  Floats out((n + 1) * D);
  std::vector<int64_t> source(n), rows(n), zeros(4 * n);
  for (int64_t i = 0; i < n; ++i) source[i] = i, rows[i] = i + 1;
  PatchEmbedArgs a{};
  a.pixels = of(pixels);
  const int64_t strides[] = {C * P * P * n, P * P * n, side * P, 1};
  std::copy(strides, strides + 4, a.stride);
  a.P = P, a.C = C, a.D = D, a.gh = a.gw = side, a.n = n, a.B = 1;
  a.weight = compute == Q8 ? Param{blob.data, Q8} : of(weight);
  a.bias = a.position = a.cls_token = a.modality = of(row);
  a.patch_source = source.data(), a.patch_rows = rows.data(), a.pos_index = zeros.data(), a.pos_weight = weights.data();
  a.cls_rows = a.modality_rows = a.sample_of_patch = zeros.data(), a.out = out.data();
  a.compute = compute, a.threads = threads;
  ops().patch_embed(a);
}

void transport(int threads) {
  const int64_t B = 9, M = 12, N = 40, D = 24;
  Floats cost = drawn(B * M * N), text = drawn(B * M * D), image = drawn(B * N * D), weight = drawn(B * N);
  for (Floats* values : {&cost, &weight})
    for (float& v : *values) v = v < 0 ? -v : v;
  std::vector<uint8_t> text_pad(B * M), image_pad(B * N), broken(B);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t j = 4 * b; j < N; ++j) image_pad[b * N + j] = 1;
  const Masks masks{text_pad.data(), image_pad.data(), B, M, N};
  Floats plan(B * M * N), value(B), error(B), distance(B), text_grad(B * M * D), image_grad(B * N * D);
  std::vector<int64_t> used(B);
  IpotArgs ipot{};
  ipot.cost = cost.data(), ipot.plan = plan.data(), ipot.masks = masks, ipot.beta = 0.5, ipot.iterations = 20;
  ipot.inner = 1, ipot.threads = threads, ipot.broken = broken.data();
  ops().ipot(ipot);
  SinkhornArgs sinkhorn{};
  sinkhorn.cost = cost.data(), sinkhorn.image_marginal = weight.data(), sinkhorn.plan = plan.data();
  sinkhorn.value = value.data(), sinkhorn.error = error.data(), sinkhorn.used = used.data(), sinkhorn.masks = masks;
  sinkhorn.epsilon = 0.1, sinkhorn.tolerance = -1, sinkhorn.iterations = 20, sinkhorn.threads = threads;
  sinkhorn.broken = broken.data();
  ops().sinkhorn(sinkhorn);
  const WordPatch pair{{of(text), M * D, D}, {of(image), N * D, D}, masks, D, threads};
  WordPatchArgs forward{};
  forward.in = pair, forward.distance = distance.data(), forward.plan = plan.data();
  forward.beta = 0.5, forward.iterations = 20, forward.inner = 1;
  ops().word_patch_distance(forward);
  WordPatchGradientArgs backward{};
  backward.in = pair, backward.grad = distance.data(), backward.plan = plan.data();
  backward.text = of(text_grad), backward.image = of(image_grad);
  ops().word_patch_gradient(backward);
}

void fingerprint(int threads) {
  const Floats data = drawn(1 << 20);
  const Span spans[] = {{reinterpret_cast<const char*>(data.data()), 1, 4 << 20, 0, 0},
                        {reinterpret_cast<const char*>(data.data()), 1, 4 << 20, 0, 64}};
  uint64_t hashes[2];
  ops().fingerprint({spans, 2, hashes, threads});
}

void everything() {
  for (int threads : {2, 4}) {
    for (int compute : {F32, BF16, Q8}) {
      linear(compute, threads);
      encoder(compute, {0, 300, 300, 640, 1000}, threads);                     // one team
      encoder(compute, {0, 120, 240, 360, 480, 600, 720, 840, 960}, threads);  // a chunk a thread
      patch_embed(compute, threads);
    }
    attention(threads);
    linear_bwd(threads);
    add_layer_norm(threads);
    transport(threads);
    fingerprint(threads);
  }
}

}  // namespace

int main() {
  std::thread other(everything);
  everything();
  other.join();
  puts("no race");
}
