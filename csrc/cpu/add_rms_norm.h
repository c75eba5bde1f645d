// h = x + residual, rounded to their dtype;  y = rms_norm(h).  Backward is rms_norm's, with the
// gradient that reached h added.
#pragma once
#include "rms_norm.h"

namespace tilewright::cpu {

// Rows [begin, end) of y [M, n], h [M, n] and rstd [M], all contiguous.
TW_DECLARE(void, add_rms_norm_fwd, Rows x, Rows residual, const float* scale, void* y, void* h,
           float* rstd, DType dtype, int64_t n, float eps, bool past_caches, int64_t begin, int64_t end)

}  // namespace tilewright::cpu
