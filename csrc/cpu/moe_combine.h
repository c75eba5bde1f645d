// out_t = sum_j w_tj y[rows_tj] over a token's k slots; rows of -1 add nothing.
#pragma once
#include "isa.h"
#include "rms_norm.h"

namespace tilewright::cpu {

// Tokens [begin, end) of out [T, d], from weights and rows [T, k], each row -1 or one of y's.
TW_DECLARE(void, moe_combine_fwd, Rows y, const float* weights, const int64_t* rows, void* out, DType dtype,
           int64_t k, int64_t d, int64_t begin, int64_t end)

// Rows [begin, end) of dy [P, d], and dweights [T, k] of their slots:  dy = w dout,  dw = <dout, y>, from `here` on 0.
TW_DECLARE(void, moe_combine_bwd, Rows dout, Rows y, const float* weights, const int64_t* order, void* dy,
           float* dweights, DType dtype, int64_t k, int64_t d, int64_t here, int64_t begin, int64_t end)

}  // namespace tilewright::cpu
