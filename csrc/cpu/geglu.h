// y = gelu(gate) up, and its gradients, for elements [begin, end): gelu exact, or by tanh.
#pragma once
#include "glu.h"

namespace tilewright::cpu {
TW_DECLARE(void, geglu_erf_fwd, const GluFwd& args, int64_t begin, int64_t end)
TW_DECLARE(void, geglu_erf_bwd, const GluBwd& args, int64_t begin, int64_t end)
TW_DECLARE(void, geglu_tanh_fwd, const GluFwd& args, int64_t begin, int64_t end)
TW_DECLARE(void, geglu_tanh_bwd, const GluBwd& args, int64_t begin, int64_t end)
}  // namespace tilewright::cpu
