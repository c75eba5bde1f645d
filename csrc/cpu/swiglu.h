// y = silu(gate) up, and its gradients, for elements [begin, end).
#pragma once
#include "glu.h"

namespace tilewright::cpu {
TW_DECLARE(void, swiglu_fwd, const GluFwd& args, int64_t begin, int64_t end)
TW_DECLARE(void, swiglu_bwd, const GluBwd& args, int64_t begin, int64_t end)
}  // namespace tilewright::cpu
