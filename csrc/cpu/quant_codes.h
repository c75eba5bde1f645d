// What the three files of quant_linear share: reading scales and codes, one element or one vector.
// Codes become weights here for the matrix products; the GEMVs keep scale and code apart.
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

// Scales and offsets (0 where there is none) of groups [g0, g0 + count) of row n, of codes less `middle`; the
// arrays have room for a vector past their end.
template <class S>
TW_INLINE void row_scales(const QuantWeight& w, int64_t n, int64_t g0, int64_t count, float middle,
                          float* __restrict__ scale, float* __restrict__ offset) {
  const int64_t at = n * w.G + g0;
  const S* scales = static_cast<const S*>(w.scales) + at;
  const S* extra = w.minima  ? static_cast<const S*>(w.minima) + at
                   : w.zeros ? static_cast<const S*>(w.zeros) + at
                             : nullptr;
  const Vec centre = set1(middle);
  const int64_t there = w.N * w.G - at;  // a next row's are not looked at, and cost less than to leave out
  for (int64_t g = 0; g < count; g += W) {
    const int left = int(count - g);
    const bool whole = there - g >= W;
    const Vec s = whole ? load(scales + g) : load_tail(scales + g, left);
    Vec o = set1(0.f);
    if (extra) {
      const Vec e = whole ? load(extra + g) : load_tail(extra + g, left);
      o = w.minima ? fma(s, centre, e) : s * (centre - e);
    }
    store(scale + g, s);
    store(offset + g, o);
  }
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
// What each 4-bit code stands for before its scale.
TW_INLINE __m512 code_table(const float* codebook) {
  return codebook ? _mm512_loadu_ps(codebook)
                  : _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
}
// 8 bits: lane l of step i holds k = 4 l + i of the 64 loaded as dwords.
TW_INLINE __m512 unpack8(__m512i codes, int step, __m512i centre) {
  const __m512i byte =
      _mm512_and_si512(_mm512_srli_epi32(codes, unsigned(8 * step)), _mm512_set1_epi32(255));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(byte, centre));
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

#if defined(__AVX2__) && !defined(__AVX512F__)
// Of a code book in two halves; bit 3 of a code says which.
TW_INLINE __m256 looked_up(__m256i code, __m256 low, __m256 high) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code),
                          _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
}
#endif

// Weights of one group, W consecutive k at a time.
template <int BITS> struct GroupWeights {
#if defined(__AVX512F__)
  Vec scale, offset;  // 4 bits: `scale` holds the weight of each of the sixteen codes
  __m512i centre;
  TW_INLINE GroupWeights(float s, float o, int c, const float* codebook)
      : scale(set1(s)), offset(set1(o)), centre(_mm512_set1_epi32(c)) {
    if constexpr (BITS == 4) scale = fma(scale, Vec{code_table(codebook)}, offset);
  }
  TW_INLINE Vec at(const uint8_t* p) const {
    if constexpr (BITS == 4) {
      int64_t eight;
      __builtin_memcpy(&eight, p, 8);
      // to each lane its byte, shifted to its nibble; the look-up reads no higher bit
      const __m512i byte = _mm512_shuffle_epi8(
          _mm512_set1_epi64(eight),
          _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7));
      const __m512i shift = _mm512_set1_epi64(int64_t(4) << 32);
      return {_mm512_permutexvar_ps(_mm512_srlv_epi32(byte, shift), scale.v)};
    } else {
      const __m512i byte =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      return fma(scale, {_mm512_cvtepi32_ps(_mm512_sub_epi32(byte, centre))}, offset);
    }
  }
#elif defined(__AVX2__)
  Vec scale, offset;
  __m256i centre;
  __m256 low, high;  // the code book's halves
  bool book;
  TW_INLINE GroupWeights(float s, float o, int c, const float* codebook)
      : scale(set1(s)), offset(set1(o)), centre(_mm256_set1_epi32(c)), book(codebook != nullptr) {
    if (book) low = _mm256_loadu_ps(codebook), high = _mm256_loadu_ps(codebook + 8);
  }
  TW_INLINE Vec at(const uint8_t* p) const {
    __m256i code;
    if constexpr (BITS == 4) {
      int32_t four;
      __builtin_memcpy(&four, p, 4);
      const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
      code = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(four), shift),
                              _mm256_set1_epi32(15));
      if (book) return scale * Vec{looked_up(code, low, high)};
    } else {
      code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    return fma(scale, {_mm256_cvtepi32_ps(_mm256_sub_epi32(code, centre))}, offset);
  }
#endif
};

// `count` columns of one group from column k on, of the row whose codes are `row`.
template <int BITS>
TW_INLINE void unpack_group(const uint8_t* row, int64_t k, int64_t count, int centre, const float* codebook,
                            float scale, float offset, float* out) {
  int64_t c = 0;
#if defined(__AVX2__)
  const GroupWeights<BITS> weights(scale, offset, centre, codebook);
  const uint8_t* p = row + uint64_t(k) * BITS / 8;
  for (; c + W <= count; c += W, p += W * BITS / 8) store(out + c, weights.at(p));
#endif
  for (; c < count; ++c) {
    const uint64_t at = uint64_t(k + c);
    const int code = BITS == 8 ? row[at] : (at & 1) ? row[at / 2] >> 4 : row[at / 2] & 15;
    out[c] = scale * (codebook ? codebook[code] : float(code - centre)) + offset;
  }
}

constexpr int64_t AHEAD = 16;      // rows
constexpr int64_t UNPACKED = 512;  // columns that unpack_rows takes at most

// out[r, c] = w[n + r, k0 + c] for `rows` rows and `count` columns, k0 even; out's rows lie `stride`
// apart.
template <int BITS, class S>
void unpack_rows(const QuantWeight& w, int64_t n, int64_t rows, int64_t k0, int64_t count,
                 float* out, int64_t stride) {
  const int64_t group = w.K / w.G, g0 = k0 / group, groups = (k0 + count - 1) / group - g0 + 1;
  const uint8_t* row = w.codes + uint64_t(n * w.K) * BITS / 8;
  float scale[UNPACKED + W], offset[UNPACKED + W];
  const int centre = w.centre();
  // 32 at a time, known when compiled, where tile and group allow it
  const bool blocks = group == 32 && k0 % 32 == 0 && count % 32 == 0;
  for (; rows > 0; --rows, ++n, out += stride, row += uint64_t(w.K) * BITS / 8) {
    if (rows > AHEAD) {  // narrow tiles of a wide weight: too far apart for the CPU to foresee
      __builtin_prefetch(row + AHEAD * (uint64_t(w.K) * BITS / 8) + uint64_t(k0) * BITS / 8);
    }
    row_scales<S>(w, n, g0, groups, float(centre), scale, offset);
    if (blocks) {
      for (int64_t g = 0; g < groups; ++g)
        unpack_group<BITS>(row, k0 + g * 32, 32, centre, w.codebook, scale[g], offset[g], out + g * 32);
      continue;
    }
    for (int64_t g = 0, c = 0; g < groups; ++g) {
      const int64_t end = (g0 + g + 1) * group - k0, stop = end < count ? end : count;
      unpack_group<BITS>(row, k0 + c, stop - c, centre, w.codebook, scale[g], offset[g], out + c);
      c = stop;
    }
  }
}

[[maybe_unused]] void unpack_rows(const QuantWeight& w, int64_t n, int64_t rows, int64_t k0,
                                  int64_t count, float* out, int64_t stride) {
  TW_FOR_DTYPE(w.scale_dtype, S, {
    (w.bits == 4 ? unpack_rows<4, S> : unpack_rows<8, S>)(w, n, rows, k0, count, out, stride);
  })
}

}  // namespace
}  // namespace tilewright::cpu::TW_ISA
