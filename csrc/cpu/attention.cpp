// Attention over packed rows (see attention.h): one phase over (sample, head, query block) items.
#include "attention.h"

namespace vf::VF_ISA {

void attention(const AttentionArgs& given) {
  AttentionArgs a = given;
  int64_t work = 0;
  for (int b = 0; b < a.B; ++b)
    work += (int64_t)(a.cu_q[b + 1] - a.cu_q[b]) * (a.cu_k[b + 1] - a.cu_k[b]) * 2 * a.H * a.d;
  a.threads = worthwhile(a.threads, work);
  Arena measure{nullptr, 0};
  attention_space(measure, a.d);
  char* buffer = (char*)scratch_acquire(measure.used * (size_t)a.threads);
  Phase shared{};
#pragma omp parallel num_threads(a.threads)
  {
    Phase own{};
    Team team{team_size(), team_rank(), nullptr};
    team.phase = team.size > 1 ? &shared : &own;
    Arena arena{buffer + (size_t)team.rank * measure.used, 0};
    const AttentionSpace space = attention_space(arena, a.d);
    if (a.dtype == F32) attention_phase<f32>(team, a, 0, a.B, space);
    else attention_phase<bf16x2>(team, a, 0, a.B, space);
  }
  scratch_release(buffer);
}

}  // namespace vf::VF_ISA
