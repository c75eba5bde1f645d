// One to eight rows in float32: weights stream once, lanes lie along K, codes unpack in registers.
// quant_fixed.cpp does the same in integers where the CPU has VNNI, quant_gemm.cpp takes more rows.
#include "quant_codes.h"

namespace tilewright::cpu::TW_ISA {
namespace {

#if defined(__AVX2__)
// sum_g offset[g] * sums[g] of row n, and its G scales as float32 into `scale`: one pass.
template <class S>
TW_INLINE float scales_and_offset(const QuantWeight& w, int64_t n, const float* sums, float* scale) {
  const S* from = static_cast<const S*>(w.scales) + n * w.G;
  const S* extra = w.minima  ? static_cast<const S*>(w.minima) + n * w.G
                   : w.zeros ? static_cast<const S*>(w.zeros) + n * w.G
                             : nullptr;
  const float centre = float(w.centre());
  Vec acc = set1(0.f);
  for (int64_t g = 0; g < w.G; g += W) {
    const int left = int(w.G - g);
    const Vec s = left >= W ? load(from + g) : load_tail(from + g, left);
    store(scale + g, s);  // `scale` has room for a whole last vector
    if (!extra) continue;
    const Vec e = left >= W ? load(extra + g) : load_tail(extra + g, left);
    const Vec offset = w.minima ? fma(s, set1(centre), e) : s * (set1(centre) - e);
    acc = fma(offset, left >= W ? load(sums + g) : load_tail(sums + g, left), acc);
  }
  return extra ? reduce_add(acc) : 0.f;
}

float scales_and_offset(const QuantWeight& w, int64_t n, const float* sums, float* scale) {
  float sum = 0.f;
  TW_FOR_DTYPE(w.scale_dtype, S, sum = scales_and_offset<S>(w, n, sums, scale))
  return sum;
}

#endif

#if defined(__AVX512F__)

// 8 bits: lane l of step i holds k = 16 i + l.
TW_INLINE __m512 unpack8(const uint8_t* p, int step, __mmask16 mask, __m512i centre) {
  const __m128i codes = _mm_maskz_loadu_epi8(mask, p + 16 * step);
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(codes), centre));
}

// MR rows of x against NR rows of w.
template <int GROUP, int MR, int NR>
TW_INLINE void gemv4(const QuantWeight& w, const float* lanes, int64_t lanes_stride,
                     const float (*scale)[GEMV_GROUPS + 16], int64_t n, float (*out)[NR]) {
  const int64_t group = w.K / w.G, row = w.K / 2;
  const __m512 table = code_table(w.codebook);
  __m512 total[MR][NR];
  for (int m = 0; m < MR; ++m)
    for (int r = 0; r < NR; ++r) total[m][r] = _mm512_setzero_ps();
  for (int64_t c = 0; c * 128 < w.K; ++c) {
    const int64_t left = row - c * 64;
    const __mmask64 mask = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
    __m512i codes[NR];
    __m512 part[MR][NR];
    for (int r = 0; r < NR; ++r) {
      const uint8_t* p = w.codes + (n + r) * row + c * 64;
      _mm_prefetch(reinterpret_cast<const char*>(p + 1024), _MM_HINT_T0);
      codes[r] = _mm512_maskz_loadu_epi8(mask, p);
      for (int m = 0; m < MR; ++m) part[m][r] = _mm512_setzero_ps();
    }
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step) {
      __m512 weight[NR];
      for (int r = 0; r < NR; ++r) weight[r] = unpack4(codes[r], step, table);
      for (int m = 0; m < MR; ++m) {
        const __m512 x = _mm512_loadu_ps(lanes + m * lanes_stride + c * 128 + step * 16);
        for (int r = 0; r < NR; ++r) part[m][r] = _mm512_fmadd_ps(weight[r], x, part[m][r]);
      }
    }
    for (int r = 0; r < NR; ++r) {
      const __m512 s = lane_scales<GROUP, 8>(scale[r], c, group);
      for (int m = 0; m < MR; ++m) total[m][r] = _mm512_fmadd_ps(part[m][r], s, total[m][r]);
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int r = 0; r < NR; ++r) out[m][r] = _mm512_reduce_add_ps(total[m][r]);
}

template <int GROUP, int MR, int NR>
TW_INLINE void gemv8(const QuantWeight& w, const float* lanes, int64_t lanes_stride,
                     const float (*scale)[GEMV_GROUPS + 16], int64_t n, float (*out)[NR]) {
  [[maybe_unused]] const int64_t group = w.K / w.G;
  const __m512i centre = _mm512_set1_epi32(w.centre());
  __m512 total[MR][NR];
  for (int m = 0; m < MR; ++m)
    for (int r = 0; r < NR; ++r) total[m][r] = _mm512_setzero_ps();
  constexpr int STEPS = GROUP >= 64 ? 4 : GROUP / 16;  // of 16 k that share a scale
  for (int64_t k = 0; k < w.K; k += 16 * STEPS) {
    __m512 part[MR][NR];
    for (int m = 0; m < MR; ++m)
      for (int r = 0; r < NR; ++r) part[m][r] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int step = 0; step < STEPS; ++step) {
      const int64_t left = w.K - k - 16 * step;
      if (left <= 0) break;
      const __mmask16 mask = left >= 16 ? 0xffff : __mmask16((1u << left) - 1);
      __m512 weight[NR];
      for (int r = 0; r < NR; ++r) weight[r] = unpack8(w.codes + (n + r) * w.K + k, step, mask, centre);
      for (int m = 0; m < MR; ++m) {
        const __m512 x = _mm512_loadu_ps(lanes + m * lanes_stride + k + 16 * step);
        for (int r = 0; r < NR; ++r) part[m][r] = _mm512_fmadd_ps(weight[r], x, part[m][r]);
      }
    }
    for (int r = 0; r < NR; ++r) {
      const __m512 s = _mm512_set1_ps(scale[r][GROUP == 32 ? k / 32 : k / group]);
      for (int m = 0; m < MR; ++m) total[m][r] = _mm512_fmadd_ps(part[m][r], s, total[m][r]);
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int r = 0; r < NR; ++r) out[m][r] = _mm512_reduce_add_ps(total[m][r]);
}

#elif defined(__AVX2__)

TW_INLINE __m256 widen(__m128i codes, int centre) {
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_cvtepu8_epi32(codes), _mm256_set1_epi32(centre)));
}
// 32 consecutive codes; 4 bits: the even k first, then the odd.
TW_INLINE void unpack32(const uint8_t* p, int bits, int centre, const float* codebook, __m256 out[4]) {
  __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), high;
  if (bits == 4) {
    const __m128i nibble = _mm_set1_epi8(15);
    high = _mm_and_si128(_mm_srli_epi16(low, 4), nibble);
    low = _mm_and_si128(low, nibble);
  } else {
    high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16));
  }
  if (codebook) {
    const __m256 first = _mm256_loadu_ps(codebook), second = _mm256_loadu_ps(codebook + 8);
    out[0] = looked_up(_mm256_cvtepu8_epi32(low), first, second);
    out[1] = looked_up(_mm256_cvtepu8_epi32(_mm_srli_si128(low, 8)), first, second);
    out[2] = looked_up(_mm256_cvtepu8_epi32(high), first, second);
    out[3] = looked_up(_mm256_cvtepu8_epi32(_mm_srli_si128(high, 8)), first, second);
    return;
  }
  out[0] = widen(low, centre);
  out[1] = widen(_mm_srli_si128(low, 8), centre);
  out[2] = widen(high, centre);
  out[3] = widen(_mm_srli_si128(high, 8), centre);
}

template <int BITS, int MR>
TW_INLINE void gemv_avx2(const QuantWeight& w, const float* lanes, int64_t lanes_stride,
                         const float* scale, int64_t n, float (*out)[1]) {
  const int64_t blocks_a_group = w.K / w.G / 32;
  const uint8_t* p = w.codes + n * w.K * BITS / 8;
  __m256 total[MR];
  for (int m = 0; m < MR; ++m) total[m] = _mm256_setzero_ps();
  for (int64_t b = 0; b < w.K / 32; ++b) {
    __m256 weight[4];
    unpack32(p + b * 4 * BITS, BITS, w.centre(), w.codebook, weight);
    const __m256 s = _mm256_set1_ps(scale[b / blocks_a_group]);
    for (int m = 0; m < MR; ++m) {
      const float* x = lanes + m * lanes_stride + b * 32;
      __m256 part = _mm256_mul_ps(weight[0], _mm256_loadu_ps(x));
      for (int i = 1; i < 4; ++i)
        part = _mm256_fmadd_ps(weight[i], _mm256_loadu_ps(x + 8 * i), part);
      total[m] = _mm256_fmadd_ps(part, s, total[m]);
    }
  }
  for (int m = 0; m < MR; ++m) out[m][0] = reduce_add(Vec{total[m]});
}

#endif

}  // namespace

bool quant_has_gemv(const QuantWeight& w) {
  [[maybe_unused]] const int64_t group = w.K / w.G;
  if (w.G > GEMV_GROUPS) return false;
#if defined(__AVX512F__)
  return w.G == 1 || group == 32 || group == 64 || group % 128 == 0;
#elif defined(__AVX2__)
  return group % 32 == 0;
#else
  return false;
#endif
}

bool quant_has_int8(const QuantWeight& w) {
#if defined(__AVX512VNNI__)
  const int64_t group = w.K / w.G;
  return quant_has_gemv(w) && group % 32 == 0 && w.codebook == nullptr;
#else
  return false;
#endif
}

void quant_prepare_float(const QuantWeight& w, const void* x, DType dtype, float* out, float* lanes,
                         float* sums) {
  if (out) to_floats(x, dtype, 0, out, w.K);
  if (!lanes) return;
  const float* row = out ? out : static_cast<const float*>(x);
  [[maybe_unused]] const int64_t group = w.K / w.G;
#if defined(__AVX512F__)
  if (w.bits == 4) {
    const __m512i eights = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104,
                                             112, 120);
    int64_t c = 0;
    for (; (c + 1) * 128 <= w.K; ++c)
      for (int i = 0; i < 8; ++i)
        _mm512_storeu_ps(lanes + c * 128 + i * 16,
                         _mm512_i32gather_ps(eights, row + c * 128 + i, 4));
    if (c * 128 < w.K)
      for (int i = 0; i < 8; ++i)
        for (int l = 0; l < 16; ++l) {
          const int64_t k = c * 128 + 8 * l + i;
          lanes[c * 128 + i * 16 + l] = k < w.K ? row[k] : 0.f;
        }
  } else {
    to_floats(row, lanes, w.K);
    for (int64_t k = w.K; k < padded(w.K); ++k) lanes[k] = 0.f;
  }
#else
  if (w.bits == 4) {
    for (int64_t b = 0; b < w.K / 32; ++b)
      for (int j = 0; j < 16; ++j) {
        lanes[b * 32 + j] = row[b * 32 + 2 * j];
        lanes[b * 32 + 16 + j] = row[b * 32 + 2 * j + 1];
      }
  } else {
    to_floats(row, lanes, w.K);
  }
#endif
  for (int64_t g = 0; g < w.G; ++g) {
    Vec acc = set1(0.f);
    int64_t k = 0;
    for (; k + W <= group; k += W) acc = acc + load(row + g * group + k);
    float sum = reduce_add(acc);
    for (; k < group; ++k) sum += row[g * group + k];
    sums[g] = sum;
  }
}

namespace {

#if defined(__AVX512F__)
template <int GROUP, int MR, int NR>
void gemv_rows(const QuantWeight& w, const QuantActivations& a, int64_t m0, const void* bias,
               void* y, int64_t y_stride, DType dtype, int64_t begin, int64_t end) {
  float scale[NR][SCALES], offset[MR][NR], out[MR][NR];
  const int64_t stride = padded(w.K);
  const float* lanes = a.lanes + m0 * stride;
  for (int64_t n = begin; n < end; n += NR) {
    // the last step is taken back to end at `end`: a few outputs are computed twice, alike
    if (n + NR > end) n = end - NR;
    for (int m = 0; m < MR; ++m)
      for (int r = 0; r < NR; ++r)
        offset[m][r] = scales_and_offset(w, n + r, a.sums + (m0 + m) * w.G, scale[r]);
    if (w.bits == 4) gemv4<GROUP, MR, NR>(w, lanes, stride, scale, n, out);
    else gemv8<GROUP, MR, NR>(w, lanes, stride, scale, n, out);
    for (int m = 0; m < MR; ++m)
      for (int r = 0; r < NR; ++r)
        finish(out[m][r] + offset[m][r], bias, y, dtype, n + r, (m0 + m) * y_stride + n + r);
  }
}

template <int GROUP>
void gemv_all(const QuantWeight& w, const QuantActivations& a, const void* bias, void* y,
              int64_t y_stride, DType dtype, int64_t begin, int64_t end) {
  int64_t m = 0;
  if (end - begin < 4) {
    for (; m < a.M; ++m) gemv_rows<GROUP, 1, 1>(w, a, m, bias, y, y_stride, dtype, begin, end);
    return;
  }
  for (; m + 4 <= a.M; m += 4)
    gemv_rows<GROUP, 4, 2>(w, a, m, bias, y, y_stride, dtype, begin, end);
  for (; m + 2 <= a.M; m += 2)
    gemv_rows<GROUP, 2, 4>(w, a, m, bias, y, y_stride, dtype, begin, end);
  for (; m < a.M; ++m) gemv_rows<GROUP, 1, 4>(w, a, m, bias, y, y_stride, dtype, begin, end);
}
#elif defined(__AVX2__)
template <int BITS, int MR>
void gemv_rows(const QuantWeight& w, const QuantActivations& a, int64_t m0, const void* bias,
               void* y, int64_t y_stride, DType dtype, int64_t begin, int64_t end) {
  float scale[SCALES], offset[MR], out[MR][1];
  const int64_t stride = padded(w.K);
  for (int64_t n = begin; n < end; ++n) {
    for (int m = 0; m < MR; ++m)
      offset[m] = scales_and_offset(w, n, a.sums + (m0 + m) * w.G, scale);
    gemv_avx2<BITS, MR>(w, a.lanes + m0 * stride, stride, scale, n, out);
    for (int m = 0; m < MR; ++m)
      finish(out[m][0] + offset[m], bias, y, dtype, n, (m0 + m) * y_stride + n);
  }
}

template <int BITS>
void gemv_all(const QuantWeight& w, const QuantActivations& a, const void* bias, void* y,
              int64_t y_stride, DType dtype, int64_t begin, int64_t end) {
  int64_t m = 0;
  for (; m + 4 <= a.M; m += 4) gemv_rows<BITS, 4>(w, a, m, bias, y, y_stride, dtype, begin, end);
  for (; m < a.M; ++m) gemv_rows<BITS, 1>(w, a, m, bias, y, y_stride, dtype, begin, end);
}
#endif

// Row m where x has an infinity or a nan, or its sum overflows: those must meet the weight's own
// value, since apart its code's share and its offset's would give inf - inf.
[[maybe_unused]] void gemv_exact(const QuantWeight& w, const QuantActivations& a, int64_t m,
                                 const void* bias, void* y, int64_t y_stride, DType dtype,
                                 int64_t begin, int64_t end) {
  float line[UNPACKED];
  for (int64_t n = begin; n < end; ++n) {
    float sum = 0.f;
    for (int64_t k0 = 0; k0 < w.K; k0 += UNPACKED) {
      const int64_t count = w.K - k0 < UNPACKED ? w.K - k0 : UNPACKED;
      unpack_rows(w, n, 1, k0, count, line, UNPACKED);
      for (int64_t k = 0; k < count; ++k) sum += line[k] * a.x[m * a.x_stride + k0 + k];
    }
    finish(sum, bias, y, dtype, n, m * y_stride + n);
  }
}

}  // namespace

void quant_gemv(const QuantWeight& w, const QuantActivations& a, const void* bias, void* y,
                int64_t y_stride, DType dtype, int64_t begin, int64_t end) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const int64_t group = w.K / w.G;
  const auto run = group == 32 ? gemv_all<32> : group == 64 ? gemv_all<64> : gemv_all<128>;
#else
  const auto run = w.bits == 4 ? gemv_all<4> : gemv_all<8>;
#endif
  run(w, a, bias, y, y_stride, dtype, begin, end);
  for (int64_t m = 0; m < a.M; ++m) {
    float zero = 0.f;  // or nan
    for (int64_t g = 0; g < w.G; ++g) zero += a.sums[m * w.G + g] * 0.f;
    if (zero != 0.f) gemv_exact(w, a, m, bias, y, y_stride, dtype, begin, end);
  }
#endif
}

}  // namespace tilewright::cpu::TW_ISA
