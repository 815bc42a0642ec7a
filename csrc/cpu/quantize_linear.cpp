// Packs a Linear weight once into the int8 blob described in quantize.h: a whole-row pass finds the scale, so unlike
// float weights it cannot be done panel by panel at every use. Parallel over panels; no scratch.
#include "quantize.h"
#include "quantize_linear_args.h"
#include "team.h"

namespace vf::VF_ISA {

static void quantize_panel(const QuantizeArgs& a, const QuantizedView& q, int64_t panel) {
  const int64_t units = ceil_div(a.K, 4);
  int8_t* out = (int8_t*)(q.panels + panel * units * 64);
  memset(out, 0, (size_t)units * 256);
  for (int64_t j = 0; j < 64; ++j) {
    const int64_t n = panel * 64 + j;
    q.scale[n] = q.scaled_sum[n] = 0;
    if (n >= a.N) continue;
    const void* row = advance(a.w.data, a.w.dtype, n * a.K);
    F top = set1(0), poison = set1(0);
    for (int64_t k = 0; k < a.K; k += kLanes) {
      const F v = load_any(row, a.w.dtype, k, (int)min64(kLanes, a.K - k));
      top = max(top, abs(v));
      poison = fma(v, set1(0), poison);
    }
    const float maximum = reduce_max(top), inverse = maximum > 0 ? 127.f / maximum : 0.f;
    int32_t sum = 0;
    for (int64_t k = 0; k < a.K; k += kLanes) {
      alignas(64) int32_t t[kLanes];
      const int count = (int)min64(kLanes, a.K - k);
      storei(t, round_int(load_any(row, a.w.dtype, k, count) * set1(inverse)));
      for (int i = 0; i < count; ++i) {
        const int8_t v = (int8_t)t[i];
        out[((k + i) / 4 * 64 + j) * 4 + (k + i) % 4] = v;
        sum += v;
      }
    }
    q.scale[n] = maximum / 127.f + reduce_add(poison);
    q.scaled_sum[n] = q.scale[n] * (float)sum;
  }
}

void quantize_linear(const QuantizeArgs& a) {
  const QuantizedView q = quantized_view(a.blob, a.N, a.K);
  const int64_t panels = ceil_div(a.N, 64);
  Phase phase{};
#pragma omp parallel num_threads(worthwhile(a.threads, 16 * a.N * a.K))
  {
    Team team{team_size(), 0, &phase};
    for (int64_t panel; (panel = team.take()) < panels;) quantize_panel(a, q, panel);
  }
}

}  // namespace vf::VF_ISA
