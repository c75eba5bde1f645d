#include "swiglu.h"

#include "glu_acts.h"

namespace tilewright::cpu::TW_ISA {

void swiglu_fwd(const GluFwd& args, int64_t begin, int64_t end) { glu_fwd_as<Silu>(args, begin, end); }
void swiglu_bwd(const GluBwd& args, int64_t begin, int64_t end) { glu_bwd_as<Silu>(args, begin, end); }

}  // namespace tilewright::cpu::TW_ISA
