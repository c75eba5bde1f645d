// Linear with 4-bit weights for a few rows of x:  y[m, n] = sum_k x[m, k] w[n, k] + bias[n].
//
// The weight is read once, 16 bytes (32 codes) a lane; the warps of a block split K and share ROWS
// output features, so each x that is loaded meets ROWS weights.  A lane's 32 codes lie in one group
// (group a multiple of 32), so its sum of (q - 8) x is scaled once:
//
//     w = s (q - z):  s sum (q - 8) x + s (8 - z) sum x
//     w = s q + o:    s sum (q - 8) x + (o + 8 s) sum x
//
// Sums are float32 in a fixed order: lane, warp (shuffles), block (shared memory).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "quant_linear.h"

namespace tilewright::cuda {

constexpr int WARPS = 4;
constexpr int CODES = 32;  // a lane's share of a row: 16 bytes

// Output features a block computes, and blocks a multiprocessor must hold: what fits in registers
// without a spill (tests/test_compile.py).
template <int M>
constexpr int ROWS = M > 4 ? 2 : 4;
template <typename T, int M>
constexpr int RESIDENT = M == 1 ? 6 : (M > 4 && sizeof(T) == 4) ? 2 : 3;

__host__ __device__ inline float as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// The float whose mantissa holds nibble I (of 0..3) of `word` is 2^23 + q 16^I; one exact
// fused multiply-add makes it q - 8, where an integer conversion would run at a fraction of the rate.
template <int I>
__host__ __device__ inline float centred(uint32_t word) {
  constexpr float unit = 1.0f / static_cast<float>(1 << (4 * I));
  return fmaf(as_float((word & (0xFu << (4 * I))) | 0x4B000000u), unit, -(8388608.0f * unit + 8.0f));
}

__host__ __device__ inline void decode8(uint32_t word, float (&code)[8]) {
  const uint32_t high = word >> 16;
  code[0] = centred<0>(word), code[1] = centred<1>(word);
  code[2] = centred<2>(word), code[3] = centred<3>(word);
  code[4] = centred<0>(high), code[5] = centred<1>(high);
  code[6] = centred<2>(high), code[7] = centred<3>(high);
}

__host__ __device__ inline void load8(const float* p, float (&x)[8]) {
  const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
  x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__host__ __device__ inline void load8(const __nv_bfloat16* p, float (&x)[8]) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = as_float(words[i] << 16);
    x[2 * i + 1] = as_float(words[i] & 0xFFFF0000u);
  }
}

__host__ __device__ inline void load8(const __half* p, float (&x)[8]) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __half2 h;
    memcpy(&h, &words[i], 4);
    const float2 f = __half22float2(h);
    x[2 * i] = f.x, x[2 * i + 1] = f.y;
  }
}

__host__ __device__ inline float load1(const void* p, Float kind, int64_t i) {
  if (kind == Float::F32) return static_cast<const float*>(p)[i];
  if (kind == Float::BF16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  return __half2float(static_cast<const __half*>(p)[i]);
}

__host__ __device__ inline void store1(float* p, float y) { *p = y; }
__host__ __device__ inline void store1(__nv_bfloat16* p, float y) { *p = __float2bfloat16_rn(y); }
__host__ __device__ inline void store1(__half* p, float y) { *p = __float2half_rn(y); }

// What lane `lane` of `lanes` adds to the ROWS x M outputs from feature n0 on.  M bounds a.M; rows
// past the end repeat the last one and are never stored.
template <typename T, int M, bool OFFSET>
__host__ __device__ inline void lane_sums(const Int4Gemv& a, int64_t n0, int lane, int lanes,
                                          float (&acc)[ROWS<M>][M]) {
  constexpr int R = ROWS<M>;
  const T* x = static_cast<const T*>(a.x);
  for (int64_t k = static_cast<int64_t>(lane) * CODES; k < a.K; k += static_cast<int64_t>(lanes) * CODES) {
    uint32_t packed[R][4];
    int64_t row[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      row[r] = n0 + r < a.N ? n0 + r : a.N - 1;
      const uint4* from = reinterpret_cast<const uint4*>(a.qweight + row[r] * (a.K / 2) + k / 2);
#ifdef __CUDA_ARCH__
      const uint4 v = __ldcs(from);  // read once: leave the caches to x
#else
      const uint4 v = *from;
#endif
      packed[r][0] = v.x, packed[r][1] = v.y, packed[r][2] = v.z, packed[r][3] = v.w;
    }
    float part[R][M] = {}, sum_x[M] = {};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      float code[R][8];
#pragma unroll
      for (int r = 0; r < R; ++r) decode8(packed[r][word], code[r]);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        float v[8];
        load8(x + (m < a.M ? m : a.M - 1) * a.stride_xm + k + 8 * word, v);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int r = 0; r < R; ++r) part[r][m] = fmaf(code[r][i], v[i], part[r][m]);
          if (OFFSET) sum_x[m] += v[i];
        }
      }
    }
    const int64_t g = k / a.group;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t at = row[r] * a.G + g;
      const float s = load1(a.scales, a.scale_kind, at);
      float b = 0.0f;
      if (OFFSET) {
        const float o = load1(a.offset, a.scale_kind, at);
        b = a.offset_is_minimum ? fmaf(8.0f, s, o) : s * (8.0f - o);
      }
#pragma unroll
      for (int m = 0; m < M; ++m) {
        acc[r][m] = fmaf(s, part[r][m], acc[r][m]);
        if (OFFSET) acc[r][m] = fmaf(b, sum_x[m], acc[r][m]);
      }
    }
  }
}

template <typename T, int M, bool OFFSET>
__global__ void __launch_bounds__(WARPS * 32, RESIDENT<T, M>) int4_gemv_kernel(const Int4Gemv a) {
  constexpr int R = ROWS<M>;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * R;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  float acc[R][M] = {};
  lane_sums<T, M, OFFSET>(a, n0, thread, WARPS * 32, acc);

  __shared__ float sums[WARPS][R * M];
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float v = acc[r][m];
#pragma unroll
      for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, step);
      if (lane == 0) sums[warp][r * M + m] = v;
    }
  }
  __syncthreads();
  if (thread >= R * M) return;
  const int64_t n = n0 + thread / M;
  const int m = thread % M;
  if (n >= a.N || m >= a.M) return;
  float y = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) y += sums[w][thread];
  if (a.bias != nullptr) y += load1(a.bias, a.kind, n);
  store1(static_cast<T*>(a.y) + m * a.N + n, y);
}

}  // namespace tilewright::cuda
