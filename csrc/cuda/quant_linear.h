// The 4-bit GEMV's arguments and launcher: what csrc/bind/cuda and quant_linear.cu share.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace tilewright::cuda {

enum class Float : int { F32 = 0, BF16 = 1, F16 = 2 };

struct Int4Gemv {
  const void* x;           // [M, K], rows stride_xm apart
  const uint8_t* qweight;  // [N, K/2]
  const void* scales;      // [N, G]
  const void* offset;      // [N, G] zero-points or minima, or null: symmetric
  const void* bias;        // [N], or null
  void* y;                 // [M, N]
  int64_t stride_xm;       // elements
  int64_t N, K, group, G;
  int M;
  Float kind;        // of x, bias and y
  Float scale_kind;  // of scales and offset
  bool offset_is_minimum;
};

constexpr int INT4_GEMV_ROWS = 8;  // M at most

}  // namespace tilewright::cuda

// Enqueue on `stream`.  Needs 1 <= M <= INT4_GEMV_ROWS, N >= 1, K and group multiples of 32, and x,
// its rows and qweight 16-byte aligned; gives cudaErrorInvalidValue otherwise.
extern "C" cudaError_t tilewright_int4_gemv(const tilewright::cuda::Int4Gemv& a, cudaStream_t stream);
