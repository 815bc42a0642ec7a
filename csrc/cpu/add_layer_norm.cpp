// s = dropout(x) + residual and its LayerNorm, in one pass over memory: a row is added up in L1 and read there again for
// mean, variance (both of s as it is rounded) and result. Items: a few rows. See philox.h for dropout.
#include "add_layer_norm_args.h"
#include "philox.h"
#include "rows.h"
#include "team.h"

namespace vf::VF_ISA {

void add_layer_norm(const AddLayerNormArgs& a) {
  constexpr int64_t kRows = 8;
  const int64_t D = a.D, wide = round_up(D, 64);
  share_out(
      worthwhile(a.threads, a.N * D * 16), [&](Arena& arena) { return arena.take<float>(2 * wide); },
      [&](Team& team, float* row) {
        float* factor = row + wide;
        for (int64_t item; (item = team.take()) * kRows < a.N;)
          for (int64_t r = item * kRows; r < min64(a.N, (item + 1) * kRows); ++r) {
            if (a.dropout_p > 0) dropout_factors(a.seed, (uint32_t)r, a.dropout_p, D, factor);
            void *s = (void*)advance(a.s, a.s_dtype, r * D), *y = (void*)advance(a.y, a.y_dtype, r * D);
            for (int64_t i = 0; i < D; i += kLanes) {
              const int n = (int)min64(kLanes, D - i);
              F v = load_any(a.x.data, a.x.dtype, r * a.ldx + i, n);
              if (a.dropout_p > 0) v = v * load(factor + i);
              v = v + load_any(a.residual.data, a.residual.dtype, r * a.ldr + i, n);
              store_any(s, a.s_dtype, i, v, n);
              if (a.s_dtype == BF16) v = load_any(s, BF16, i, n);
              store(row + i, v);
            }
            const Moments m = layer_norm(row, a.weight, a.bias, a.eps, D, y, a.y_dtype);
            if (a.mean) a.mean[r] = m.mean, a.rstd[r] = m.rstd;
          }
      });
}

}  // namespace vf::VF_ISA
