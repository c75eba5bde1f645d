// Numbers of one byte, int8 and float8 e4m3, as float32.
#pragma once
#include "simd.h"

namespace tilewright::cpu::TW_ISA {

// 1 sign, 4 exponent (bias 7) and 3 mantissa bits; no inf, and nan where the last seven are all 1.
struct e4m3 { uint8_t bits; };

TW_INLINE float to_float(int8_t x) { return float(x); }
TW_INLINE float to_float(e4m3 x) {
  const uint32_t sign = uint32_t(x.bits & 0x80) << 24, rest = x.bits & 0x7f;
  if (rest == 0x7f) return float_of(sign | 0x7fc00000);
  if (rest < 8) return float_of(sign | bits_of(float(rest) * 0x1p-9f));  // subnormal
  return float_of(sign | ((rest << 20) + ((127 - 7) << 23)));
}

#if defined(__AVX2__)
TW_INLINE __m128i load_bytes(const void* p) {
#if defined(__AVX512F__)
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
#else
  return _mm_loadl_epi64(static_cast<const __m128i*>(p));
#endif
}
#endif

#if defined(__AVX512F__)
TW_INLINE Vec load(const int8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bytes(p)))}; }
// As a float16 e4m3 is 2^-8 of itself, subnormals too: its exponent's bias is 15.
TW_INLINE Vec load(const e4m3* p) {
  const __m256i x = _mm256_cvtepu8_epi16(load_bytes(p)), size = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
  const __m256i nan = _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x7f));
  __m256i half = _mm256_or_si256(_mm256_slli_epi16(size, 7), _mm256_slli_epi16(_mm256_xor_si256(x, size), 8));
  half = _mm256_or_si256(half, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
  return Vec{_mm512_cvtph_ps(half)} * set1(256.f);
}
#elif defined(__AVX2__)
TW_INLINE Vec load(const int8_t* p) { return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_bytes(p)))}; }
TW_INLINE Vec load(const e4m3* p) {
  const __m128i x = _mm_cvtepu8_epi16(load_bytes(p)), size = _mm_and_si128(x, _mm_set1_epi16(0x7f));
  const __m128i nan = _mm_cmpeq_epi16(size, _mm_set1_epi16(0x7f));
  __m128i half = _mm_or_si128(_mm_slli_epi16(size, 7), _mm_slli_epi16(_mm_xor_si128(x, size), 8));
  half = _mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x7e00)));
  return Vec{_mm256_cvtph_ps(half)} * set1(256.f);
}
#endif

}  // namespace tilewright::cpu::TW_ISA
