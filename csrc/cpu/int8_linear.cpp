#include "int8_linear.h"

#include "int8_row.h"
#include "rms_norm_row.h"

namespace tilewright::cpu::TW_ISA {

template <class T>
static void rows_of_int8(const Rows& x_rows, int64_t n, int8_t* codes, float* scales, int64_t begin,
                         int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = row_of<T>(x_rows, i);
    scales[i] = store_row(codes + i * n, n, [&](int64_t j, int count) {
      return count == W ? load(x + j) : load_n(x + j, count);
    });
  }
}

void int8_rows(Rows x, DType dtype, int64_t n, int8_t* codes, float* scales, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(dtype, T, rows_of_int8<T>(x, n, codes, scales, begin, end))
}

namespace {

// STEP codes of x and w, and their products added to sums of int32 that wrap.  CENTRED: w comes less 128; else the
// sum of x times 128 is taken off at the end.
#if defined(__AVX512VNNI__)
constexpr int STEP = 64;
constexpr bool CENTRED = false;
using Codes = __m512i;
using Sums = __m512i;
TW_INLINE Sums no_sums() { return _mm512_setzero_si512(); }
TW_INLINE Codes load_x(const int8_t* p) { return _mm512_loadu_si512(p); }
TW_INLINE Codes load_w(const uint8_t* p) { return _mm512_loadu_si512(p); }
TW_INLINE Sums add_products(Sums s, Codes w, Codes x) { return _mm512_dpbusd_epi32(s, w, x); }
TW_INLINE int32_t total(Sums s) { return _mm512_reduce_add_epi32(s); }
#elif defined(__AVX512F__)
constexpr int STEP = 32;
constexpr bool CENTRED = true;
using Codes = __m512i;
using Sums = __m512i;
TW_INLINE Sums no_sums() { return _mm512_setzero_si512(); }
TW_INLINE Codes load_x(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
TW_INLINE Codes load_w(const uint8_t* p) {
  const __m512i w = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_sub_epi16(w, _mm512_set1_epi16(128));
}
TW_INLINE Sums add_products(Sums s, Codes w, Codes x) {
  return _mm512_add_epi32(s, _mm512_madd_epi16(w, x));
}
TW_INLINE int32_t total(Sums s) { return _mm512_reduce_add_epi32(s); }
#elif defined(__AVX2__)
constexpr int STEP = 16;
constexpr bool CENTRED = true;
using Codes = __m256i;
using Sums = __m256i;
TW_INLINE Sums no_sums() { return _mm256_setzero_si256(); }
TW_INLINE Codes load_x(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
TW_INLINE Codes load_w(const uint8_t* p) {
  const __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_sub_epi16(w, _mm256_set1_epi16(128));
}
TW_INLINE Sums add_products(Sums s, Codes w, Codes x) {
  return _mm256_add_epi32(s, _mm256_madd_epi16(w, x));
}
TW_INLINE int32_t total(Sums s) {
  __m128i v = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32(v, 0xb1)));
}
#else
constexpr int STEP = 1;
constexpr bool CENTRED = true;
using Codes = int32_t;
using Sums = int32_t;
TW_INLINE Sums no_sums() { return 0; }
TW_INLINE Codes load_x(const int8_t* p) { return *p; }
TW_INLINE Codes load_w(const uint8_t* p) { return int32_t(*p) - 128; }
TW_INLINE Sums add_products(Sums s, Codes w, Codes x) { return s + w * x; }
TW_INLINE int32_t total(Sums s) { return s; }
#endif

constexpr int NR = 4;                       // features and, at most,
constexpr int MR = STEP == 1 ? 1 : 4;       // rows whose sums are formed at once
constexpr int64_t ROW_BYTES = 1 << 18;      // of x that stay in L2 while the weight goes by

// The sums of R rows of x with the features w: all the vectors of a row, then the rest one by one.
template <int R>
TW_INLINE void sums_of(const int8_t* x, const uint8_t* const w[NR], int64_t K, int32_t out[R][NR]) {
  Sums sums[R][NR];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < NR; ++c) sums[r][c] = no_sums();
  int64_t k = 0;
  for (; k + STEP <= K; k += STEP) {
    Codes codes[NR];
    for (int c = 0; c < NR; ++c) codes[c] = load_w(w[c] + k);
    for (int r = 0; r < R; ++r) {
      const Codes row = load_x(x + r * K + k);
      for (int c = 0; c < NR; ++c) sums[r][c] = add_products(sums[r][c], codes[c], row);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < NR; ++c) {
      uint32_t sum = uint32_t(total(sums[r][c]));
      for (int64_t j = k; j < K; ++j)
        sum += uint32_t((int32_t(w[c][j]) - (CENTRED ? 128 : 0)) * int32_t(x[r * K + j]));
      out[r][c] = int32_t(sum);
    }
}

template <int R, class T>
TW_INLINE void rows(const Int8Product& p, int64_t m, int64_t n, int64_t count,
                    const uint8_t* const w[NR]) {
  int32_t sums[R][NR];
  sums_of<R>(p.x + m * p.K, w, p.K, sums);
  const T* bias = static_cast<const T*>(p.bias);
  for (int r = 0; r < R; ++r) {
    T* y = static_cast<T*>(p.y) + (m + r) * p.N;
    const uint32_t centre = CENTRED ? 0u : 128u * uint32_t(p.x_sum[m + r]);
    for (int64_t c = 0; c < count; ++c) {
      const float sum = float(int32_t(uint32_t(sums[r][c]) - centre));
      float v = sum * p.w_scale[n + c] * p.x_scale[m + r];
      if (bias) v += to_float(bias[n + c]);
      y[n + c] = from_float<T>(v);
    }
  }
}

template <class T> void product(const Int8Product& p, int64_t begin, int64_t end) {
  const int64_t most = ROW_BYTES / p.K / MR * MR, block = most > MR ? most : MR;
  for (int64_t m0 = 0; m0 < p.M; m0 += block) {
    const int64_t stop = m0 + block < p.M ? m0 + block : p.M;
    for (int64_t n = begin; n < end; n += NR) {
      // features past the end repeat the last one, and are not written
      const int64_t count = end - n < NR ? end - n : NR;
      const uint8_t* w[NR];
      for (int c = 0; c < NR; ++c) w[c] = p.w + (n + (c < count ? c : count - 1)) * p.K;
      int64_t m = m0;
      for (; m + MR <= stop; m += MR) rows<MR, T>(p, m, n, count, w);
      for (; m < stop; ++m) rows<1, T>(p, m, n, count, w);
    }
  }
}

}  // namespace

bool int8_wants_sums() { return !CENTRED; }

void int8_sums(const int8_t* x, int64_t n, int32_t* sums, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    int32_t sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += x[i * n + j];
    sums[i] = sum;
  }
}

void int8_linear(const Int8Product& p, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(p.dtype, T, product<T>(p, begin, end))
}

}  // namespace tilewright::cpu::TW_ISA
