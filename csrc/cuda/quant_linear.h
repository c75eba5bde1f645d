// The arguments and launcher of a linear with 4-bit weights for a few rows of 16 bits: what
// csrc/bind/cuda and quant_linear.cu share.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace tilewright::cuda {

enum class Float : int { F32 = 0, BF16 = 1, F16 = 2 };

// What divides by d: quotient(n, d), in quant_linear.cuh, exact where n d < 2^32.
struct Divisor {
  uint64_t inverse;  // 2^32 / d, rounded up
  static constexpr Divisor of(uint64_t d) { return {((uint64_t{1} << 32) + d - 1) / d}; }
};

struct Int4Rows {
  const void* x;           // [M, K]
  const uint8_t* qweight;  // [N, K/2]
  const void* scales;      // [N, G]
  const void* offset;      // [N, G] zero-points or minima, or null: symmetric
  const void* bias;        // [N], or null
  void* y;                 // [M, N]
  int64_t N, K, group, G;
  Divisor of_group;  // of group / 32, by the launcher
  int M;
  Float kind;        // of x, bias and y: BF16 or F16
  Float scale_kind;  // of scales and offset
  bool offset_is_minimum;
};

constexpr int INT4_ROWS = 16;                       // M at most
constexpr int64_t INT4_COLUMNS = int64_t{1} << 21;  // K is below it: Divisor

}  // namespace tilewright::cuda

// Enqueue on `stream`.  Needs 1 <= M <= INT4_ROWS, N >= 1, K < INT4_COLUMNS, K and group multiples of 32, and x
// and qweight 16-byte aligned; gives cudaErrorInvalidValue otherwise.
extern "C" cudaError_t tilewright_int4_rows(const tilewright::cuda::Int4Rows& a, cudaStream_t stream);
