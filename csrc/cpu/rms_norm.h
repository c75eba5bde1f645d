// RMSNorm over rows:  y = x * rstd * scale,  rstd = (mean x^2 + eps)^(-1/2).  M rows of N columns.
#pragma once
#include "isa.h"

namespace tilewright::cpu {

// Row i starts at p + (i / inner) * outer_stride + (i % inner) * inner_stride, in elements.
struct Rows {
  const void* p;
  int64_t inner, outer_stride, inner_stride;
};

// scale[j] = offset + weight[j], or 1 where weight is null.
TW_DECLARE(void, rms_norm_scale, float* scale, const void* weight, DType weight_dtype,
           float offset, int64_t n)

// Rows [begin, end) of y [M, n] and rstd [M], both contiguous; past_caches is stream.h's.
TW_DECLARE(void, rms_norm_fwd, Rows x, const float* scale, void* y, float* rstd, DType dtype,
           int64_t n, float eps, bool past_caches, int64_t begin, int64_t end)

// Rows [begin, end) of dx [M, n], contiguous, plus dresidual's where dresidual.p is not null; and
// where dw_partial is not null, dw_partial[n] = the sum of those rows' dy * x * rstd.
TW_DECLARE(void, rms_norm_bwd, Rows dy, Rows x, Rows dresidual, const float* scale,
           const float* rstd, void* dx, float* dw_partial, DType dtype, int64_t n, bool past_caches,
           int64_t begin, int64_t end)

// Columns [begin, end) of dw [n] = the sum of partial [blocks, n] over blocks, first to last.
TW_DECLARE(void, rms_norm_dw, const float* partial, void* dw, DType dtype, int64_t blocks,
           int64_t n, int64_t begin, int64_t end)

}  // namespace tilewright::cpu
