#include "rope.h"

#include "simd.h"

namespace tilewright::cpu::TW_ISA {
namespace {

// a, b hold 2 W consecutive elements: even gets those at 0, 2, ..., odd the others; and back.
#if defined(__AVX512F__)
TW_INLINE void unzip(Vec a, Vec b, Vec& even, Vec& odd) {
  const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i second = _mm512_or_si512(first, _mm512_set1_epi32(1));
  even = {_mm512_permutex2var_ps(a.v, first, b.v)};
  odd = {_mm512_permutex2var_ps(a.v, second, b.v)};
}
TW_INLINE void zip(Vec even, Vec odd, Vec& a, Vec& b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  a = {_mm512_permutex2var_ps(even.v, low, odd.v)};
  b = {_mm512_permutex2var_ps(even.v, high, odd.v)};
}
#elif defined(__AVX2__)
TW_INLINE __m256 swap_middle(__m256 v) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
}
TW_INLINE void unzip(Vec a, Vec b, Vec& even, Vec& odd) {
  even = {swap_middle(_mm256_shuffle_ps(a.v, b.v, 0x88))};
  odd = {swap_middle(_mm256_shuffle_ps(a.v, b.v, 0xdd))};
}
TW_INLINE void zip(Vec even, Vec odd, Vec& a, Vec& b) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
  a = {_mm256_permute2f128_ps(low, high, 0x20)};
  b = {_mm256_permute2f128_ps(low, high, 0x31)};
}
#else
TW_INLINE void unzip(Vec a, Vec b, Vec& even, Vec& odd) { even = a; odd = b; }
TW_INLINE void zip(Vec even, Vec odd, Vec& a, Vec& b) { a = even; b = odd; }
#endif

struct Pair { Vec first, second; };

TW_INLINE Pair turn(Vec first, Vec second, Vec c, Vec s) {
  const Vec zero = set1(0.f);
  return {fma(first, c, (zero - second) * s), fma(second, c, first * s)};
}

template <class T, class C>
TW_INLINE void row_halves(const T* x, const C* cos, const C* sin, T* y, int64_t half, Vec sign) {
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const Pair p = turn(load(x + i), load(x + half + i), load(cos + i), sign * load(sin + i));
    store(y + i, p.first);
    store(y + half + i, p.second);
  }
  if (const int n = int(half - i)) {
    const Pair p = turn(load_n(x + i, n), load_n(x + half + i, n), load_n(cos + i, n),
                        sign * load_n(sin + i, n));
    store_n(y + i, p.first, n);
    store_n(y + half + i, p.second, n);
  }
}

template <class T, class C>
TW_INLINE void row_pairs(const T* x, const C* cos, const C* sin, T* y, int64_t half, int64_t step,
                         Vec sign) {
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    Vec first, second, c, s, a, b;
    unzip(load(x + 2 * i), load(x + 2 * i + W), first, second);
    if (step == 1) {
      c = load(cos + i);
      s = load(sin + i);
    } else {
      unzip(load(cos + 2 * i), load(cos + 2 * i + W), c, a);
      unzip(load(sin + 2 * i), load(sin + 2 * i + W), s, b);
    }
    const Pair p = turn(first, second, c, sign * s);
    zip(p.first, p.second, a, b);
    store(y + 2 * i, a);
    store(y + 2 * i + W, b);
  }
  const float signed_one = reduce_max(sign);
  for (; i < half; ++i) {
    const float first = to_float(x[2 * i]), second = to_float(x[2 * i + 1]);
    const float c = to_float(cos[step * i]), s = signed_one * to_float(sin[step * i]);
    y[2 * i] = from_float<T>(first * c - second * s);
    y[2 * i + 1] = from_float<T>(second * c + first * s);
  }
}

template <class T, class C> void rows(const Rope& a, int64_t begin, int64_t end) {
  const int64_t half = a.rotary / 2, rest = a.dim - a.rotary, step = a.doubled ? 2 : 1;
  const Vec sign = set1(a.inverse ? -1.f : 1.f);
  int64_t inner = begin % a.inner, outer = begin / a.inner % a.outer,
          batch = begin / a.inner / a.outer;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t index = a.seq_major ? outer : inner;
    const int64_t position =
        a.positions ? a.positions[batch * a.stride_positions + index] : index;
    const T* x = static_cast<const T*>(a.x) + batch * a.stride_batch + outer * a.stride_outer +
                 inner * a.stride_inner;
    const C* cos = static_cast<const C*>(a.cos) + position * a.stride_cos;
    const C* sin = static_cast<const C*>(a.sin) + position * a.stride_sin;
    T* y = static_cast<T*>(a.y) + row * a.dim;
    if (a.interleaved) row_pairs(x, cos, sin, y, half, step, sign);
    else row_halves(x, cos, sin, y, half, sign);
    if (rest) __builtin_memcpy(y + a.rotary, x + a.rotary, size_t(rest) * sizeof(T));
    if (++inner == a.inner) {
      inner = 0;
      if (++outer == a.outer) {
        outer = 0;
        ++batch;
      }
    }
  }
}

}  // namespace

void rope(const Rope& a, int64_t begin, int64_t end) {
  if (a.table_dtype == DType::F32) {
    TW_FOR_DTYPE(a.dtype, T, rows<T, float>(a, begin, end));
  } else {
    TW_FOR_DTYPE(a.dtype, T, rows<T, T>(a, begin, end));
  }
}

}  // namespace tilewright::cpu::TW_ISA
