// One float32 vector type per instruction-set level: W lanes, loads and stores that convert from
// and to float32, bfloat16 and float16, and the few verbs the kernels share.
// Included by files compiled once per level with -DTW_ISA=<level>; see isa.h.
#pragma once
#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define TW_INLINE inline __attribute__((always_inline))

namespace tilewright::cpu::TW_ISA {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

TW_INLINE uint32_t bits_of(float x) { uint32_t u; __builtin_memcpy(&u, &x, 4); return u; }
TW_INLINE float float_of(uint32_t u) { float x; __builtin_memcpy(&x, &u, 4); return x; }

TW_INLINE float to_float(float x) { return x; }
TW_INLINE float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
TW_INLINE float to_float(f16 h) {
#if defined(__F16C__)
  return _cvtsh_ss(h.bits);
#else
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | ((rest & 0x3ff) << 13));  // inf, nan
  if (rest >= 0x0400) return float_of(sign | ((rest << 13) + 0x38000000));          // normal
  const float magnitude = float(rest) * 0x1p-24f;                                   // subnormal
  return float_of(sign | bits_of(magnitude));
#endif
}
template <class T> TW_INLINE T from_float(float x);
template <> TW_INLINE float from_float<float>(float x) { return x; }
template <> TW_INLINE bf16 from_float<bf16>(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t((u >> 16) | 0x40)};  // nan stays nan
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};                 // nearest even
}
template <> TW_INLINE f16 from_float<f16>(float x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};   // nan
  if (rest >= 0x47800000) return {uint16_t(sign | 0x7c00)};  // 65536 and up: inf
  if (rest < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded 10 bits at the bottom
    return {uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000))};
  }
  return {uint16_t(sign | ((rest + 0xfff + ((rest >> 13) & 1) - 0x38000000) >> 13))};
#endif
}

#if defined(__AVX512F__)

constexpr int W = 16;
struct Vec { __m512 v; };
TW_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
TW_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
TW_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
TW_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
TW_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
TW_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
TW_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
TW_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
TW_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
TW_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
TW_INLINE Vec round_nearest(Vec a) { return {_mm512_roundscale_ps(a.v, 8)}; }
TW_INLINE Vec scale_pow2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n
TW_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
TW_INLINE Vec load(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
TW_INLINE Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
TW_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
TW_INLINE void store(bf16* p, Vec a) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
#else
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(
      _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
#endif
}
TW_INLINE void store(f16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, 8));
}

#elif defined(__AVX2__)

constexpr int W = 8;
struct Vec { __m256 v; };
TW_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
TW_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
TW_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
TW_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
TW_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
TW_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
TW_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
TW_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
TW_INLINE float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
TW_INLINE float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
TW_INLINE Vec round_nearest(Vec a) { return {_mm256_round_ps(a.v, 8)}; }
TW_INLINE Vec scale_pow2(Vec a, Vec n) {  // a * 2^n, |n| <= 252: in two steps, each a normal float
  const __m256i i = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(i, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 y = _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, half), bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, x), y)};
}
TW_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
TW_INLINE Vec load(const bf16* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))};
}
TW_INLINE Vec load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
TW_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
TW_INLINE void store(bf16* p, Vec a) {
  const __m256i u = _mm256_castps_si256(a.v), high = _mm256_srli_epi32(u, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i r =
      _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
TW_INLINE void store(f16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, 8));
}

#else

constexpr int W = 1;
struct Vec { float v; };
TW_INLINE Vec set1(float x) { return {x}; }
TW_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
TW_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
TW_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
TW_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
TW_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
TW_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
TW_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
TW_INLINE float reduce_add(Vec a) { return a.v; }
TW_INLINE float reduce_max(Vec a) { return a.v; }
TW_INLINE Vec round_nearest(Vec a) { return {__builtin_rintf(a.v)}; }
TW_INLINE Vec scale_pow2(Vec a, Vec n) {  // a * 2^n, |n| <= 252
  const int i = int(n.v), half = i >> 1;
  return {a.v * float_of(uint32_t(half + 127) << 23) * float_of(uint32_t(i - half + 127) << 23)};
}
template <class T> TW_INLINE Vec load(const T* p) { return {to_float(*p)}; }
template <class T> TW_INLINE void store(T* p, Vec a) { *p = from_float<T>(a.v); }

#endif

// The first n < W elements; the other lanes read as 0.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
TW_INLINE Vec load_tail(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)};
}
TW_INLINE Vec load_tail(const bf16* p, int n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p)), 16))};
}
TW_INLINE Vec load_tail(const f16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p))};
}
#else
template <class T> TW_INLINE Vec load_tail(const T* p, int n) {
  float lanes[W] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return load(static_cast<const float*>(lanes));
}
#endif

// The first n < W elements; the other lanes read as `fill`, and are not written.
template <class T> TW_INLINE Vec load_n(const T* p, int n, float fill = 0.f) {
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(static_cast<const float*>(lanes));
}
template <class T> TW_INLINE void store_n(T* p, Vec a, int n) {
  float lanes[W];
  store(static_cast<float*>(lanes), a);
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(lanes[i]);
}

// By lane: above where c > 0, else below (so where c is nan).
TW_INLINE Vec select_positive(Vec c, Vec above, Vec below) {
#if defined(__AVX512F__)
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(c.v, _mm512_setzero_ps(), _CMP_GT_OQ), below.v, above.v)};
#elif defined(__AVX2__)
  return {_mm256_blendv_ps(below.v, above.v, _mm256_cmp_ps(c.v, _mm256_setzero_ps(), _CMP_GT_OQ))};
#else
  return c.v > 0.f ? above : below;
#endif
}

// e^x within 2 ulp, 0 below -104 (so of -inf too), inf above 88.8, nan of nan.
TW_INLINE Vec exp(Vec x) {
  // the constant first: max and min return their second operand when either is nan
  const Vec clamped = min(set1(100.f), max(set1(-110.f), x));
  const Vec n = round_nearest(clamped * set1(1.44269504088896341f));
  Vec r = fma(n, set1(-0.693359375f), clamped);  // ln 2 in two parts: n * the first is exact
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);  // Cephes expf, |r| <= ln(2) / 2
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + set1(1.f);
  return scale_pow2(p, n);
}

// f(DType) -> a call of body with a null pointer of the element type, to template on.
#define TW_FOR_DTYPE(dtype, T, ...)                                    \
  switch (dtype) {                                                     \
    case DType::F32: { using T = float; __VA_ARGS__; } break;          \
    case DType::BF16: { using T = bf16; __VA_ARGS__; } break;          \
    case DType::F16: { using T = f16; __VA_ARGS__; } break;            \
  }

}  // namespace tilewright::cpu::TW_ISA
