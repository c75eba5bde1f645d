// Linear with 4-bit weights for a few rows of x on tensor cores:
// y[m, n] = sum_k x[m, k] w[n, k] + bias[n].
//
// The product is taken transposed, w x^T, by mma.m16n8k16: 16 features, 8 rows of x, 16 columns.  Which
// columns those are is free as long as w and x agree, so the weight is read where it lies: a lane takes 8
// codes from one 32-bit word, and makes of them four pairs of 16-bit floats, codes u and u + 4, by a shift,
// a logical instruction and an exact fused multiply-add; x is paired alike.  The tensor cores sum (q - 8) x
// of one group in float32, which the group's scale then multiplies:
//
//     w = s (q - z):  s sum (q - 8) x + s (8 - z) sum x
//     w = s q + o:    s sum (q - 8) x + (o + 8 s) sum x
//
// with sum x a product with ones.  Warps share out K; their sums are added in order in shared memory.
// WIDE, of groups that are multiples of 128: a lane's 4 words lie together, 16 bytes of one row.  Else each
// lies in another 32 columns, all of one group.
//
// On is the machine: a thread's place, the barrier, shared memory and mma; tests/test_cuda_sources.py
// runs the same code on a CPU, a thread a lane.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "quant_linear.h"

namespace tilewright::cuda {

constexpr int WARPS = 16;
constexpr int TILES = 2;  // of 16 features a block, which share what x costs
constexpr int FEATURES = 16 * TILES;
constexpr int COLUMNS = 128;  // of w that a warp takes at once

__host__ __device__ inline uint32_t quotient(uint32_t n, Divisor d) {
  return static_cast<uint32_t>((n * d.inverse) >> 32);
}

// (word & mask) | rest, one instruction: ptxas makes two of an expression with two constants.
__host__ __device__ inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t rest) {
#ifdef __CUDA_ARCH__
  uint32_t found;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(found) : "r"(word), "r"(mask), "r"(rest));
  return found;
#else
  return (word & mask) | rest;
#endif
}

// Two T in a word.
template <typename T>
struct Pair;

template <>
struct Pair<__nv_bfloat16> {
  static constexpr uint32_t ONES = 0x3F803F80u;
  __host__ __device__ static float2 floats(uint32_t word) {
    const uint32_t low = word << 16, high = word & 0xFFFF0000u;
    float2 found;
    memcpy(&found.x, &low, 4), memcpy(&found.y, &high, 4);
    return found;
  }
  // Codes U and U + 4 of 8, less 8.  128 + q has q as its lowest bits.
  template <int U>
  __host__ __device__ static uint32_t codes(uint32_t word) {
    const uint32_t raised = and_or(word >> (4 * U), 0x000F000Fu, 0x43004300u);
#ifdef __CUDA_ARCH__
    uint32_t found;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(raised), "r"(ONES), "r"(0xC308C308u));  // -136
    return found;
#else
    const float2 f = floats(raised);
    const float less[2] = {f.x - 136.0f, f.y - 136.0f};
    uint32_t bits[2];
    memcpy(bits, less, 8);
    return bits[0] >> 16 | (bits[1] & 0xFFFF0000u);
#endif
  }
};

template <>
struct Pair<__half> {
  static constexpr uint32_t ONES = 0x3C003C00u;
  __host__ __device__ static float2 floats(uint32_t word) {
    __half2 pair;
    memcpy(&pair, &word, 4);
    return __half22float2(pair);
  }
  // Codes U and U + 4 of 8, less 8.  1024 + q, or 1024 + 16 q, has q among its lowest bits.
  template <int U>
  __host__ __device__ static uint32_t codes(uint32_t word) {
    constexpr bool HIGH = U % 2;
    const uint32_t raised = and_or(word >> (4 * (U - U % 2)), HIGH ? 0x00F000F0u : 0x000F000Fu, 0x64006400u);
    constexpr uint32_t UNIT = HIGH ? 0x2C002C00u : ONES;         // 1 / 16
    constexpr uint32_t LESS = HIGH ? 0xD480D480u : 0xE408E408u;  // -72, -1032
#ifdef __CUDA_ARCH__
    uint32_t found;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(raised), "r"(UNIT), "r"(LESS));
    return found;
#else
    const float2 v = floats(raised), unit = floats(UNIT), less = floats(LESS);
    const __half2 pair = __floats2half2_rn(v.x * unit.x + less.x, v.y * unit.y + less.y);
    uint32_t found;
    memcpy(&found, &pair, 4);
    return found;
#endif
  }
};

// The low, and the high, halves of two words.
__host__ __device__ inline uint32_t low_halves(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, 0x5410);
#else
  return (a & 0xFFFFu) | b << 16;
#endif
}

__host__ __device__ inline uint32_t high_halves(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, 0x7632);
#else
  return a >> 16 | (b & 0xFFFF0000u);
#endif
}

// Element i, with no branch that lanes wait in.
__host__ __device__ inline float load1(const void* p, Float kind, int64_t i) {
  if (kind == Float::F32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return kind == Float::BF16 ? Pair<__nv_bfloat16>::floats(bits).x : Pair<__half>::floats(bits).x;
}

__host__ __device__ inline void store1(__nv_bfloat16* p, float y) { *p = __float2bfloat16_rn(y); }
__host__ __device__ inline void store1(__half* p, float y) { *p = __float2half_rn(y); }

// A lane's 4 words of the 128 columns from k on of one row of the weight.
template <bool WIDE>
__host__ __device__ inline uint4 words_at(const uint8_t* row, int k, int K, int t) {
  const uint8_t* from = row + k / 2 + (WIDE ? 16 : 4) * t;
  if (WIDE) {
    const uint4* wide = reinterpret_cast<const uint4*>(from);
#ifdef __CUDA_ARCH__
    return __ldcs(wide);  // read once: leave the caches to x
#else
    return *wide;
#endif
  }
  const uint32_t* words = reinterpret_cast<const uint32_t*>(from);
  const int left = K - k;
  return {words[0], left > 32 ? words[4] : 0, left > 64 ? words[8] : 0, left > 96 ? words[12] : 0};
}

__host__ __device__ inline uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// y[m, n] one weight at a time: where the sums above are not finite, infinities may have met in them, or a
// partial sum passed float32, that do not in the product.
template <typename T>
__host__ __device__ inline float alone(const Int4Rows& a, int m, int64_t n) {
  const uint16_t* x = static_cast<const uint16_t*>(a.x) + m * a.K;
  float y = 0.0f;
  for (int64_t k = 0; k < a.K; ++k) {
    const int64_t at = n * a.G + k / a.group;
    const float q = static_cast<float>(a.qweight[(n * a.K + k) / 2] >> (k % 2 * 4) & 15);
    const float s = load1(a.scales, a.scale_kind, at);
    const float o = a.offset != nullptr ? load1(a.offset, a.scale_kind, at) : 8.0f;
    const float w = a.offset_is_minimum ? fmaf(s, q, o) : s * (q - o);
    y = fmaf(w, Pair<T>::floats(x[k]).x, y);
  }
  return y;
}

// What a block adds up: FEATURES features, of 8 NT >= a.M rows.  Rows and features past the end repeat the last
// one and are never stored.
#pragma nv_exec_check_disable
template <typename T, int NT, bool WIDE, bool OFFSET, typename On>
__host__ __device__ inline void int4_rows(const On& on, const Int4Rows& a) {
  const int lane = on.thread() % 32, warp = on.thread() / 32;
  const int g = lane / 4, t = lane % 4;  // mma's groups and lanes of one
  const int64_t n0 = static_cast<int64_t>(on.block()) * FEATURES;
  int row[TILES][2];
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t n = n0 + 16 * r + 8 * h + g;
      row[r][h] = static_cast<int>(n < a.N ? n : a.N - 1);
    }
  }
  const T* x_row[NT];
#pragma unroll
  for (int i = 0; i < NT; ++i)
    x_row[i] = static_cast<const T*>(a.x) + (8 * i + g < a.M ? 8 * i + g : a.M - 1) * a.K;

  const int K = static_cast<int>(a.K), step = on.warps() * COLUMNS;
  int k = warp * COLUMNS;
  uint4 next[TILES][2];
  const auto fetch = [&](int from) {
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) next[r][h] = words_at<WIDE>(a.qweight + static_cast<int64_t>(row[r][h]) * (K / 2), from, K, t);
    }
  };
  float acc[TILES][NT][4] = {};
  if (k < K) fetch(k);
  for (; k < K; k += step) {
    uint4 now[TILES][2];
#pragma unroll
    for (int r = 0; r < TILES; ++r) now[r][0] = next[r][0], now[r][1] = next[r][1];
    if (k + step < K) fetch(k + step);
    float part[TILES][NT][4] = {}, sum_x[NT][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!WIDE && k + 32 * i >= K) break;  // alike in all lanes
      uint4 x[NT];
#pragma unroll
      for (int j = 0; j < NT; ++j)
        x[j] = *reinterpret_cast<const uint4*>(x_row[j] + k + (WIDE ? 32 * t + 8 * i : 32 * i + 8 * t));
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // of 8 codes: pairs 0 and 1, then 2 and 3
        uint32_t b[NT][2];
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          const uint32_t first = half ? x[j].y : x[j].x, other = half ? x[j].w : x[j].z;
          b[j][0] = low_halves(first, other), b[j][1] = high_halves(first, other);
        }
#pragma unroll
        for (int r = 0; r < TILES; ++r) {
          const uint32_t top = word(now[r][0], i), bottom = word(now[r][1], i);
          const uint32_t w[4] = {
              half ? Pair<T>::template codes<2>(top) : Pair<T>::template codes<0>(top),
              half ? Pair<T>::template codes<2>(bottom) : Pair<T>::template codes<0>(bottom),
              half ? Pair<T>::template codes<3>(top) : Pair<T>::template codes<1>(top),
              half ? Pair<T>::template codes<3>(bottom) : Pair<T>::template codes<1>(bottom)};
#pragma unroll
          for (int j = 0; j < NT; ++j) on.template mma<T>(part[r][j], w, b[j]);
        }
        if (OFFSET) {
          const uint32_t ones[4] = {Pair<T>::ONES, Pair<T>::ONES, Pair<T>::ONES, Pair<T>::ONES};
#pragma unroll
          for (int j = 0; j < NT; ++j) on.template mma<T>(sum_x[j], ones, b[j]);
        }
      }
      if (WIDE && i < 3) continue;  // its group goes on
      const int64_t group = quotient(static_cast<uint32_t>(k + 32 * i) / 32, a.of_group);
#pragma unroll
      for (int r = 0; r < TILES; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t at = static_cast<int64_t>(row[r][h]) * a.G + group;
          const float s = load1(a.scales, a.scale_kind, at);
          float more = 0.0f;
          if (OFFSET) {
            const float o = load1(a.offset, a.scale_kind, at);
            more = a.offset_is_minimum ? fmaf(8.0f, s, o) : s * (8.0f - o);
          }
#pragma unroll
          for (int j = 0; j < NT; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& sum = acc[r][j][2 * h + e];
              sum = fmaf(s, part[r][j][2 * h + e], sum);
              if (OFFSET) sum = fmaf(more, sum_x[j][e], sum);
              if (!WIDE) part[r][j][2 * h + e] = 0.0f;
            }
          }
        }
      }
#pragma unroll
      for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (!WIDE) sum_x[j][e] = 0.0f;
        }
      }
    }
  }

  constexpr int OUTPUTS = FEATURES * 8 * NT;
  float* sums = on.shared();  // [warps, 8 NT, FEATURES]
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int m = 8 * j + 2 * t + c % 2, n = 16 * r + g + 8 * (c / 2);
        sums[warp * OUTPUTS + m * FEATURES + n] = acc[r][j][c];
      }
    }
  }
  on.sync();
  for (int i = on.thread(); i < OUTPUTS; i += 32 * on.warps()) {
    const int m = i / FEATURES;
    const int64_t n = n0 + i % FEATURES;
    if (m >= a.M || n >= a.N) continue;
    float y = 0.0f;
    for (int w = 0; w < on.warps(); ++w) y += sums[w * OUTPUTS + i];
    if (!(fabsf(y) <= 3.402823466e38f)) y = alone<T>(a, m, n);
    if (a.bias != nullptr) y += load1(a.bias, a.kind, n);
    store1(static_cast<T*>(a.y) + m * a.N + n, y);
  }
}

#ifdef __CUDACC__
struct Gpu {
  float* sums;
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int block() const { return static_cast<int>(blockIdx.x); }
  __device__ int warps() const { return WARPS; }
  __device__ float* shared() const { return sums; }
  __device__ void sync() const { __syncthreads(); }
  // c [16, 8] += a [16, 16] b [16, 8], as the PTX manual lays them out over a warp
  template <typename T>
  __device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    if (std::is_same_v<T, __half>)
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

template <typename T, int NT, bool WIDE, bool OFFSET>
__global__ void __launch_bounds__(WARPS * 32, 1) int4_rows_kernel(const Int4Rows a) {
  __shared__ float sums[WARPS * FEATURES * 8 * NT];
  int4_rows<T, NT, WIDE, OFFSET>(Gpu{sums}, a);
}
#endif

}  // namespace tilewright::cuda
