// A row of float32 as int8 codes and one scale, max|row| / 127, codes to the nearest even.
// Zeros where the scale is below float32's smallest normal number; where a number is not finite the scale is
// nan and the codes are 0.
#pragma once
#include "simd.h"

namespace tilewright::cpu::TW_ISA {

struct RowScale {
  float scale, inverse;
};

// Of the largest |x| of a row, and of a sum of its x * 0, which is not 0 where one is not finite.
TW_INLINE RowScale row_scale(float largest, float zero) {
  if (!(zero == 0.f && largest < __builtin_inff())) return {__builtin_nanf(""), 0.f};
  const float scale = largest / 127.f;
  if (!(scale >= 0x1p-126f)) return {0.f, 0.f};
  return {scale, 127.f / largest};
}

// W codes.
TW_INLINE void store_codes(int8_t* p, Vec x, Vec inverse) {
  const Vec code = min(max(round_nearest(x * inverse), set1(-127.f)), set1(127.f));
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code.v)));
#elif defined(__AVX2__)
  const __m256i i = _mm256_cvtps_epi32(code.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
#else
  *p = int8_t(code.v);
#endif
}

// Codes of a row x(j, count), count <= W numbers from j on, the other lanes 0; returns its scale.
template <class Row>
TW_INLINE float store_row(int8_t* codes, int64_t n, Row x) {
  Vec largest = set1(0.f), zero = set1(0.f);
  for (int64_t j = 0; j < n; j += W) {
    const Vec v = x(j, int(n - j < W ? n - j : W));
    largest = max(largest, max(v, set1(0.f) - v));
    zero = fma(v, set1(0.f), zero);
  }
  const RowScale s = row_scale(reduce_max(largest), reduce_add(zero));
  if (!(s.inverse > 0.f)) {
    __builtin_memset(codes, 0, size_t(n));
    return s.scale;
  }
  const Vec inverse = set1(s.inverse);
  int64_t j = 0;
  for (; j + W <= n; j += W) store_codes(codes + j, x(j, W), inverse);
  if (j < n) {
    int8_t last[W];
    store_codes(last, x(j, int(n - j)), inverse);
    __builtin_memcpy(codes + j, last, size_t(n - j));
  }
  return s.scale;
}

}  // namespace tilewright::cpu::TW_ISA
