// Attention over packed rows (see attention.h): one phase over (sample, head, query block) items.
#include "attention.h"

namespace vf::VF_ISA {

void attention(const AttentionArgs& given) {
  AttentionArgs a = given;
  a.threads = worthwhile(a.threads, pairs(a.cu_q, a.cu_k, a.B) * 2 * a.H * a.d);
  share_out(
      a.threads, [&](Arena& arena) { return attention_space(arena, a.d); },
      [&](Team& team, const AttentionSpace& space) {
        if (a.dtype == F32) attention_phase<f32>(team, a, 0, a.B, space);
        else attention_phase<bf16x2>(team, a, 0, a.B, space);
      });
}

}  // namespace vf::VF_ISA
