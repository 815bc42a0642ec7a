// plan [B, M, N] of IPOT from costs [B, M, N]; a sample a thread, see ipot.h. Rows and columns that are padded are
// neither read nor computed, and are 0 in the plan.
#include "ipot.h"

#include "ipot_args.h"

namespace vf::VF_ISA {

void ipot(const IpotArgs& a) {
  const int64_t M = a.masks.M, N = a.masks.N;
  for_samples(
      a.masks, nullptr, nullptr, a.threads, true, [](int64_t, int64_t) { return (int64_t)0; },
      [&](int64_t b, Transport& t, float*) {
        float* plan = a.plan + b * M * N;
        if (!t.m) return scatter_plan(t, nullptr, nullptr, plan, M, N);
        gather_costs(t, a.cost + b * M * N, N);
        if (!column_minima(t)) {
          a.broken[b] = 1;
          return;
        }
        const Scaling s = ipot_solve(t, a.beta, a.iterations, a.inner);
        scatter_plan(t, s.u, s.v, plan, M, N);
      });
}

}  // namespace vf::VF_ISA
