// y[m, n] = (sum_k x[m, k] (w[n, k] - 128)) x_scale[m] w_scale[n] + bias[n], x int8, w uint8, the sum exact.
//   M rows of x, N output features, K < 2^17 input features.
#pragma once
#include "rms_norm.h"

namespace tilewright::cpu {

struct Int8Product {
  const int8_t* x;        // [M, K]
  const float* x_scale;   // [M]
  const int32_t* x_sum;   // [M] of int8_sums, or null
  const uint8_t* w;       // [N, K]
  const float* w_scale;   // [N]
  const void* bias;       // [N] of dtype, or null
  void* y;                // [M, N] of dtype
  DType dtype;
  int64_t M, N, K;
};

// Rows [begin, end) of x [M, n] to int8 codes [M, n] and a scale each: see int8_row.h.
TW_DECLARE(void, int8_rows, Rows x, DType dtype, int64_t n, int8_t* codes, float* scales,
           int64_t begin, int64_t end)

// The sum of each row's codes, rows [begin, end) of x [M, n], for levels that want them.
TW_DECLARE(bool, int8_wants_sums)
TW_DECLARE(void, int8_sums, const int8_t* x, int64_t n, int32_t* sums, int64_t begin, int64_t end)

// Output features [begin, end) of all rows.
TW_DECLARE(void, int8_linear, const Int8Product& p, int64_t begin, int64_t end)

}  // namespace tilewright::cpu
