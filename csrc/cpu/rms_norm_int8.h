// h = x + residual, rounded to their dtype;  rms_norm(h) in float32, as int8 codes and a scale a row.
#pragma once
#include "rms_norm.h"

namespace tilewright::cpu {

// Rows [begin, end) of codes [M, n], scales [M] and, where residual.p is not null, h [M, n], all contiguous.
TW_DECLARE(void, rms_norm_int8, Rows x, Rows residual, const float* scale, int8_t* codes, float* scales,
           void* h, DType dtype, int64_t n, float eps, int64_t begin, int64_t end)

}  // namespace tilewright::cpu
