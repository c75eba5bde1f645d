// Many rows of bfloat16 where the CPU multiplies its pairs: the product and its input gradient.
// The product multiplies codes, exact in bfloat16, and scales the sum of each group: nothing of the weight is
// rounded.  The gradient sums over groups, so there the weight is rounded to bfloat16.
#include "quant_panel.h"

namespace tilewright::cpu::TW_ISA {

#if defined(__AVX512BF16__)
namespace {

constexpr int MR = 12;  // 24 accumulators, 2 weights, 1 broadcast: 27 of 32 registers

struct Panel {
  const uint32_t* pairs;         // [kc / 2, NB] of two bfloat16: k even, k odd
  const float *scale, *offset;  // [groups, NB]; null: the pairs are the weights themselves
  int64_t k0, kc, group;
};

// out[r, NB] += x[r] w over the panel, for R rows; sums [R, G] of x over each group where OFFSET.
template <int R, bool SCALED, bool OFFSET>
void micro(const bf16* x, int64_t x_stride, const float* sums, int64_t G, const Panel& p, float* out) {
  const int64_t g0 = SCALED ? p.k0 / p.group : 0;
  for (int64_t k = 0, g = g0; k < p.kc; ++g) {
    const int64_t end = SCALED ? (g + 1) * p.group - p.k0 : p.kc, stop = end < p.kc ? end : p.kc;
    __m512 acc[R][NV];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
    for (; k < stop; k += 2) {
      const __m512bh w0 = (__m512bh)_mm512_loadu_si512(p.pairs + k / 2 * NB);
      const __m512bh w1 = (__m512bh)_mm512_loadu_si512(p.pairs + k / 2 * NB + 16);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        int32_t two;
        __builtin_memcpy(&two, x + r * x_stride + k, 4);
        const __m512bh xr = (__m512bh)_mm512_set1_epi32(two);
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], w0, xr);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], w1, xr);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        float* to = out + r * NB + v * 16;
        __m512 sum = _mm512_loadu_ps(to);
        if constexpr (SCALED) {
          const int64_t at = (g - g0) * NB + v * 16;
          sum = _mm512_fmadd_ps(acc[r][v], _mm512_loadu_ps(p.scale + at), sum);
          // a group that began in the panel before had its offset there
          if (OFFSET && g * p.group >= p.k0)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(sums[r * G + g]), _mm512_loadu_ps(p.offset + at), sum);
        } else {
          sum = _mm512_add_ps(sum, acc[r][v]);
        }
        _mm512_storeu_ps(to, sum);
      }
  }
}

template <bool SCALED, bool OFFSET>
void micro_rows(int64_t rows, const bf16* x, int64_t x_stride, const float* sums, int64_t G,
                const Panel& p, float* out) {
  while (rows > 0) {
    int r;
    if (rows >= MR) micro<MR, SCALED, OFFSET>(x, x_stride, sums, G, p, out), r = MR;
    else if (rows >= 8) micro<8, SCALED, OFFSET>(x, x_stride, sums, G, p, out), r = 8;
    else if (rows >= 4) micro<4, SCALED, OFFSET>(x, x_stride, sums, G, p, out), r = 4;
    else if (rows >= 2) micro<2, SCALED, OFFSET>(x, x_stride, sums, G, p, out), r = 2;
    else micro<1, SCALED, OFFSET>(x, x_stride, sums, G, p, out), r = 1;
    rows -= r, x += r * x_stride, out += r * NB;
    if (sums) sums += r * G;
  }
}

// The low halves of `even` and the high of `odd`, float32 whose last 16 bits are zero.
TW_INLINE __m512i paired(__m512 even, __m512 odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(_mm512_castps_si512(even), 16),
                                 _mm512_castps_si512(odd));
}

// Word 2 i: word i; word 2 i + 1: word 16 + i.
TW_INLINE __m512i interleaved(__m512i words) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i second = _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16);
  return _mm512_permutexvar_epi16(_mm512_or_si512(lane, second), words);
}

// pairs[k / 2, c] of sixteen rows from n on.
void fill_pairs4(const QuantWeight& w, int64_t n, int64_t k0, int64_t kc, uint32_t* pairs) {
  // each code's value in both halves of the table: the look-up's fifth bit is a neighbour's
  const __m256i values = (__m256i)_mm512_cvtneps_pbh(code_table(nullptr));
  const __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(values), values, 1);
  over_dwords<4>(w, n, k0, kc, [&](int64_t k, __m512i codes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, codes = _mm512_srli_epi32(codes, 8)) {
      const __m512i at = _mm512_mask_blend_epi16(0xaaaaaaaau, codes, _mm512_slli_epi32(codes, 12));
      _mm512_storeu_si512(pairs + (k / 2 + i) * NB, _mm512_permutexvar_epi16(at, table));
    }
  });
}

void fill_pairs8(const QuantWeight& w, int64_t n, int64_t k0, int64_t kc, uint32_t* pairs) {
  const __m512i centre = _mm512_set1_epi32(w.centre());
  over_dwords<8>(w, n, k0, kc, [&](int64_t k, __m512i codes) {
    const __m512 c0 = unpack8(codes, 0, centre), c1 = unpack8(codes, 1, centre);
    const __m512 c2 = unpack8(codes, 2, centre), c3 = unpack8(codes, 3, centre);
    _mm512_storeu_si512(pairs + k / 2 * NB, paired(c0, c1));
    _mm512_storeu_si512(pairs + (k / 2 + 1) * NB, paired(c2, c3));
  });
}

}  // namespace
#endif

bool quant_has_bf16(const QuantWeight& w) {
#if defined(__AVX512BF16__)
  return w.K / w.G % 8 == 0 && w.codebook == nullptr;  // dwords of codes lie in one group, and codes are exact
#else
  return false;
#endif
}

bool quant_prepare_bf16(const void* x, int64_t n, int64_t group, float* sums) {
#if defined(__AVX512BF16__)
  const bf16* row = static_cast<const bf16*>(x);
  __m512 largest = _mm512_setzero_ps();
  float sum = 0.f;
  for (int64_t g = 0; g * group < n; ++g) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t k = g * group; k < (g + 1) * group; k += 16) {
      const int64_t left = (g + 1) * group - k;
      const __m512 v = left >= 16 ? load(row + k).v : load_tail(row + k, int(left)).v;
      largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
      total = _mm512_add_ps(total, v);
    }
    const float in_group = _mm512_reduce_add_ps(total);
    if (sums) sums[g] = in_group;
    sum += in_group;  // nan where one number is not finite
  }
  const float most = _mm512_reduce_max_ps(largest);
  // beyond these a sum of codes times x overflows, or products are subnormal, which are taken for zero
  return sum - sum == 0.f && (most == 0.f || (most > 0x1p-90f && most < 0x1p90f));
#else
  return false;
#endif
}

void quant_gemm_bf16(const QuantWeight& w, const QuantActivations& a, const void* bias, void* y,
                     int64_t y_stride, DType dtype, float* scratch, int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
  const bf16* x = static_cast<const bf16*>(a.half);
  const int64_t group = w.K / w.G;
  const bool offsets = w.minima || w.zeros;
  // the float panel's room holds the pairs, then scales and offsets of its groups of 8 columns or more
  uint32_t* pairs = reinterpret_cast<uint32_t*>(scratch);
  float* scale = scratch + KC * NB / 2;
  float* offset = scale + (KC / 8 + 2) * NB;
  float* out = scratch + KC * NB;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t n0 = block * NB;
    for (int64_t i = 0; i < a.M * NB; ++i) out[i] = 0.f;
    for (int64_t k0 = 0; k0 < w.K; k0 += KC) {
      const int64_t kc = w.K - k0 < KC ? w.K - k0 : KC, g0 = k0 / group;
      const auto fill = w.bits == 4 ? fill_pairs4 : fill_pairs8;
      for (int v = 0; v < NV; ++v) fill(w, n0 + v * 16, k0, kc, pairs + v * 16);
      panel_scales(w, n0, NB, g0, (k0 + kc - 1) / group - g0 + 1, float(w.centre()), scale, offset, NB);
      const Panel panel{pairs, scale, offset, k0, kc, group};
      const auto run = offsets ? micro_rows<true, true> : micro_rows<true, false>;
      run(a.M, x + k0, w.K, a.sums, w.G, panel, out);
    }
    write_block(out, a.M, n0, w.N, bias, y, y_stride, dtype);
  }
#endif
}

void quant_dgrad_bf16(const QuantWeight& w, const QuantActivations& a, void* dx, int64_t dx_stride,
                      DType dtype, float* scratch, int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
  const bf16* dy = static_cast<const bf16*>(a.half);
  uint32_t* pairs = reinterpret_cast<uint32_t*>(scratch);
  float* out = scratch + KC * NB;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t k0 = block * NB, columns = w.K - k0 < NB ? w.K - k0 : NB;
    for (int64_t i = 0; i < a.M * NB; ++i) out[i] = 0.f;
    alignas(64) float lines[2][NB] = {};
    for (int64_t n0 = 0; n0 < w.N; n0 += KC) {
      const int64_t nc = w.N - n0 < KC ? w.N - n0 : KC;
      for (int64_t n = 0; n < nc; n += 2) {
        unpack_rows(w, n0 + n, 2, k0, columns, lines[0], NB);
        for (int v = 0; v < NV; ++v) {
          const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(lines[1] + v * 16),
                                                            _mm512_load_ps(lines[0] + v * 16));
          _mm512_storeu_si512(pairs + n / 2 * NB + v * 16, interleaved(both));
        }
      }
      micro_rows<false, false>(a.M, dy + n0, w.N, nullptr, 0, {pairs, nullptr, nullptr, 0, nc, nc}, out);
    }
    write_block(out, a.M, k0, w.K, nullptr, dx, dx_stride, dtype);
  }
#endif
}

}  // namespace tilewright::cpu::TW_ISA
