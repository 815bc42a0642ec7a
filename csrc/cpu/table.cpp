// The entry points of one instruction-set level, gathered for dispatch.cpp.
#include "kernels.h"

#define VF_JOIN2(a, b) a##b
#define VF_JOIN(a, b) VF_JOIN2(a, b)
#define VF_TEXT2(a) #a
#define VF_TEXT(a) VF_TEXT2(a)

namespace vf {
namespace VF_ISA {
#define VF_OP(name, Args) void name(const Args&);
#include "ops.def"
}  // namespace VF_ISA

extern const Kernels VF_JOIN(kernels_, VF_ISA);
const Kernels VF_JOIN(kernels_, VF_ISA) = {
    VF_TEXT(VF_ISA),
#define VF_OP(name, Args) VF_ISA::name,
#include "ops.def"
};
}  // namespace vf
