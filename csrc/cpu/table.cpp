// The entry points of one instruction-set level, gathered for dispatch.cpp.
#include "kernels.h"

#define VF_JOIN2(a, b) a##b
#define VF_JOIN(a, b) VF_JOIN2(a, b)
#define VF_TEXT2(a) #a
#define VF_TEXT(a) VF_TEXT2(a)

namespace vf {
namespace VF_ISA {
void linear(const LinearArgs&);
void quantize_linear(const QuantizeArgs&);
void attention(const AttentionArgs&);
void encoder(const EncoderArgs&);
void patch_embed(const PatchEmbedArgs&);
void ipot(const IpotArgs&);
void sinkhorn(const SinkhornArgs&);
void word_patch_distance(const WordPatchArgs&);
void word_patch_gradient(const WordPatchGradientArgs&);
}  // namespace VF_ISA

extern const Kernels VF_JOIN(kernels_, VF_ISA);
const Kernels VF_JOIN(kernels_, VF_ISA) = {VF_TEXT(VF_ISA), VF_ISA::linear, VF_ISA::quantize_linear,
                                           VF_ISA::attention, VF_ISA::encoder, VF_ISA::patch_embed,
                                           VF_ISA::ipot, VF_ISA::sinkhorn, VF_ISA::word_patch_distance,
                                           VF_ISA::word_patch_gradient};
}  // namespace vf
