// What the three files of quant_linear share: reading scales and codes, one element or one vector.
#pragma once
#include "quant_linear.h"
#include "simd.h"

namespace tilewright::cpu::TW_ISA {
namespace {

TW_INLINE float scalar_at(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::F32: return static_cast<const float*>(p)[i];
    case DType::BF16: return to_float(static_cast<const bf16*>(p)[i]);
    case DType::F16: return to_float(static_cast<const f16*>(p)[i]);
  }
  return 0.f;
}

TW_INLINE void store_as(void* p, DType dtype, int64_t i, float value) {
  switch (dtype) {
    case DType::F32: static_cast<float*>(p)[i] = value; break;
    case DType::BF16: static_cast<bf16*>(p)[i] = from_float<bf16>(value); break;
    case DType::F16: static_cast<f16*>(p)[i] = from_float<f16>(value); break;
  }
}

template <class T> TW_INLINE void to_floats(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

[[maybe_unused]] void to_floats(const void* from, DType dtype, int64_t start, float* to, int64_t n) {
  TW_FOR_DTYPE(dtype, T, to_floats(static_cast<const T*>(from) + start, to, n))
}

// Scales and centred offsets of row n, groups [g0, g0 + count), as float32.
// Returns whether there is an offset at all.
[[maybe_unused]] bool row_scales(const QuantWeight& w, int64_t n, int64_t g0, int64_t count, float* scale,
                float* offset) {
  to_floats(w.scales, w.scale_dtype, n * w.G + g0, scale, count);
  const float centre = float(1 << (w.bits - 1));
  if (w.minima) {
    to_floats(w.minima, w.scale_dtype, n * w.G + g0, offset, count);
    for (int64_t g = 0; g < count; ++g) offset[g] += centre * scale[g];
  } else if (w.zeros) {
    to_floats(w.zeros, w.scale_dtype, n * w.G + g0, offset, count);
    for (int64_t g = 0; g < count; ++g) offset[g] = scale[g] * (centre - offset[g]);
  }
  return w.minima || w.zeros;
}

TW_INLINE int code_at(const QuantWeight& w, int64_t n, int64_t k) {
  if (w.bits == 8) return int(w.codes[n * w.K + k]) - 128;
  const int byte = w.codes[n * (w.K / 2) + k / 2];
  return ((k & 1) ? byte >> 4 : byte & 15) - 8;
}

[[maybe_unused]] constexpr int64_t SCALES = GEMV_GROUPS + 16;  // a row's scales, and room for a vector past the end

TW_INLINE void finish(float value, const void* bias, void* y, DType dtype, int64_t n, int64_t at) {
  store_as(y, dtype, at, bias ? value + scalar_at(bias, dtype, n) : value);
}

#if defined(__AVX512F__)

// 4 bits: lane l of step i holds k = 8 l + i, so that one shift and one table look-up unpack it.
TW_INLINE __m512 unpack4(__m512i codes, int step, __m512 table) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, unsigned(4 * step)), table);
}
TW_INLINE __m512 table4() {
  return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
}
// The group scale of each lane.  GROUP is 32, 64, or 128 for any larger multiple of 128;
// PER_LANE consecutive k share a lane (8 for 4 bits, 4 for 8 bits in integers).
template <int GROUP, int PER_LANE>
TW_INLINE __m512 lane_scales(const float* scale, int64_t chunk, int64_t group) {
  constexpr int SPAN = 16 * PER_LANE;
  if constexpr (GROUP >= SPAN) {
    return _mm512_set1_ps(scale[GROUP == 128 ? chunk * SPAN / group : chunk]);
  } else {
    constexpr int L = GROUP / PER_LANE;  // lanes a group
    const __m512i index = _mm512_setr_epi32(0, 1 / L, 2 / L, 3 / L, 4 / L, 5 / L, 6 / L, 7 / L,
                                            8 / L, 9 / L, 10 / L, 11 / L, 12 / L, 13 / L, 14 / L,
                                            15 / L);
    return _mm512_permutexvar_ps(
        index, _mm512_castps128_ps512(_mm_loadu_ps(scale + chunk * (SPAN / GROUP))));
  }
}

#endif

}  // namespace
}  // namespace tilewright::cpu::TW_ISA
