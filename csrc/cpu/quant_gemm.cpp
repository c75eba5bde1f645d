// More rows: a block of columns is unpacked once, and from L2 it feeds every row.  In float32, in
// integers for int8 activations where the CPU has VNNI, and the input gradient.
#include "quant_panel.h"

namespace tilewright::cpu::TW_ISA {

void quant_prepare_int8(const QuantWeight& w, const void* x, DType dtype, int8_t* codes,
                        float* scales, int32_t* isums, float* fake) {
  const int64_t group = w.K / w.G, block = group % 32 == 0 ? 32 : group;
  for (int64_t b = 0; b * block < w.K; ++b) {
    float numbers[32];  // a longer block is read again for each use
    const bool whole = block == 32;
    if (whole) to_floats(x, dtype, b * 32, numbers, 32);
    const auto at = [&](int64_t j) { return whole ? numbers[j] : scalar_at(x, dtype, b * block + j); };
    float largest = 0.f;
    for (int64_t j = 0; j < block; ++j) {
      const float size = __builtin_fabsf(at(j));
      largest = size > largest || size != size ? size : largest;  // a nan stays
    }
    // an infinity leaves no scale: the block is nan, as a nan makes it
    const bool finite = largest < __builtin_inff();
    float scale = finite ? largest / 127.f : __builtin_nanf("");
    if (scale < 0x1p-126f) scale = 0.f;
    const float inverse = scale > 0 ? 1.f / scale : 0.f;
    int32_t sum = 0;
    for (int64_t j = 0; j < block; ++j) {
      float q = finite ? __builtin_rintf(at(j) * inverse) : 0.f;
      q = q > 127.f ? 127.f : q < -127.f ? -127.f : q;
      if (fake) {
        fake[b * block + j] = q * scale;
      } else {
        // of 4 bits as fill_int8 leaves the weight's codes
        const int64_t at = w.bits == 4 ? (j & ~int64_t(7)) | (j & 1) << 2 | (j & 7) >> 1 : j;
        codes[b * block + at] = int8_t(q);
        sum += int32_t(q);
      }
    }
    if (!fake) {
      scales[b] = scale;
      isums[b] = sum;
    }
  }
  if (fake) return;
  for (int64_t k = w.K; k < padded(w.K); ++k) codes[k] = 0;
  for (int64_t b = w.K / 32; b < padded(w.K) / 32; ++b) {
    scales[b] = 0.f;
    isums[b] = 0;
  }
}

namespace {

#if defined(__AVX512F__)
constexpr int MR = 12;  // 24 accumulators, 2 weights, 1 broadcast: 27 of 32 registers
#elif defined(__AVX2__)
constexpr int MR = 6;  // 12 + 2 + 1 of 16
#else
constexpr int MR = 4;
#endif

// Terms summed before they join the total: a long running sum would round every term to its size.
constexpr int64_t SEGMENT = W == 1 ? 16 : 64;

// out[r, NB] += x[r, kc] panel[kc, NB] for R <= MR rows.
template <int R>
TW_INLINE void micro(const float* x, int64_t x_stride, const float* panel, int64_t kc, float* out) {
  for (int64_t k0 = 0; k0 < kc; k0 += SEGMENT) {
    const int64_t stop = k0 + SEGMENT < kc ? k0 + SEGMENT : kc;
    Vec acc[R][NV];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) acc[r][v] = set1(0.f);
    for (int64_t k = k0; k < stop; ++k) {
      Vec b[NV];
      for (int v = 0; v < NV; ++v) b[v] = load(panel + k * NB + v * W);
      for (int r = 0; r < R; ++r) {
        const Vec a = set1(x[r * x_stride + k]);
        for (int v = 0; v < NV; ++v) acc[r][v] = fma(a, b[v], acc[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) {
        float* to = out + r * NB + v * W;
        store(to, load(static_cast<const float*>(to)) + acc[r][v]);
      }
  }
}

void micro_rows(int rows, const float* x, int64_t x_stride, const float* panel, int64_t kc,
                float* out) {
  while (rows > 0) {
    int r;
    if (rows >= MR) micro<MR>(x, x_stride, panel, kc, out), r = MR;
    else if (rows >= 4) micro<4>(x, x_stride, panel, kc, out), r = 4;
    else micro<1>(x, x_stride, panel, kc, out), r = 1;
    rows -= r;
    x += r * x_stride;
    out += r * NB;
  }
}

#if defined(__AVX512F__)
// panel[k, c .. c + 16) = w[n .. n + 16, k0 + k].
template <int BITS>
void fill_sixteen(const QuantWeight& w, int64_t n, int64_t k0, int64_t kc, float* panel) {
  const int64_t group = w.K / w.G, g0 = k0 / group;
  float scales[(KC / 8 + 2) * 16], offsets[(KC / 8 + 2) * 16];
  panel_scales(w, n, 16, g0, (k0 + kc - 1) / group - g0 + 1, float(w.centre()), scales, offsets, 16);
  const __m512 table = code_table(w.codebook);
  [[maybe_unused]] const __m512i centre = _mm512_set1_epi32(w.centre());
  const float *scale = scales, *offset = offsets;
  int64_t stop = (g0 + 1) * group - k0;
  over_dwords<BITS>(w, n, k0, kc, [&](int64_t k, __m512i codes) {
    if (k == stop) scale += 16, offset += 16, stop += group;
    const __m512 s = _mm512_loadu_ps(scale), o = _mm512_loadu_ps(offset);
#pragma GCC unroll 8
    for (int i = 0; i < 32 / BITS; ++i) {
      const __m512 code = BITS == 4 ? unpack4(codes, i, table) : unpack8(codes, i, centre);
      _mm512_storeu_ps(panel + (k + i) * NB, _mm512_fmadd_ps(code, s, o));
    }
  });
}
#endif

// panel[k, c] = w[n0 + c, k0 + k]; past N zero, or what is not written out.
void fill_columns(const QuantWeight& w, int64_t n0, int64_t k0, int64_t kc, float* panel) {
  const int64_t columns = w.N - n0 < NB ? w.N - n0 : NB;
  int64_t c = 0;
#if defined(__AVX512F__)
  if (w.K / w.G % 8 == 0)  // whole dwords of a group
    for (; c < columns; c += 16)
      (w.bits == 4 ? fill_sixteen<4> : fill_sixteen<8>)(w, n0 + c, k0, kc, panel + c);
#endif
  float line[KC];
  for (; c < columns; ++c) {
    unpack_rows(w, n0 + c, 1, k0, kc, line, KC);
    for (int64_t k = 0; k < kc; ++k) panel[k * NB + c] = line[k];
  }
  for (; c < NB; ++c)
    for (int64_t k = 0; k < kc; ++k) panel[k * NB + c] = 0.f;
}

}  // namespace

int64_t quant_block() { return NB; }
int64_t quant_scratch(int64_t M) { return KC * NB + M * NB; }

void quant_gemm(const QuantWeight& w, const QuantActivations& a, const void* bias, void* y,
                int64_t y_stride, DType dtype, float* scratch, int64_t begin, int64_t end) {
  float *panel = scratch, *out = scratch + KC * NB;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t n0 = block * NB;
    for (int64_t i = 0; i < a.M * NB; ++i) out[i] = 0.f;
    for (int64_t k0 = 0; k0 < w.K; k0 += KC) {
      const int64_t kc = w.K - k0 < KC ? w.K - k0 : KC;
      fill_columns(w, n0, k0, kc, panel);
      micro_rows(int(a.M), a.x + k0, a.x_stride, panel, kc, out);
    }
    write_block(out, a.M, n0, w.N, bias, y, y_stride, dtype);
  }
}

namespace {

// The input gradient of a few rows: the weight streams row after row, TILE columns wide, and
// each adds to accumulators in L1.  STEP rows unpack together, so that these are read once for four.
constexpr int64_t TILE = UNPACKED, STREAM_ROWS = KC * NB / (2 * TILE);  // two sums fit the scratch
constexpr int STEP = 4;

// part[m, TILE] += sum_i dy[m, i] lines[i, TILE] over `rows` <= STEP rows, for R rows m.
template <int R>
TW_INLINE void add_lines(const float* dy, int64_t dy_stride, int rows, const float (*lines)[TILE],
                         int64_t count, float* part) {
  Vec scale[R][STEP];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < STEP; ++i) scale[r][i] = set1(i < rows ? dy[r * dy_stride + i] : 0.f);
  for (int64_t c = 0; c < count; c += W) {
    Vec line[STEP];
    for (int i = 0; i < STEP; ++i) line[i] = load(lines[i] + c);
    for (int r = 0; r < R; ++r) {
      float* to = part + r * TILE + c;
      Vec sum = load(static_cast<const float*>(to));
      for (int i = 0; i < STEP; ++i) sum = fma(scale[r][i], line[i], sum);
      store(to, sum);
    }
  }
}

// dx[M, k0 .. k0 + columns) of M <= STREAM_ROWS rows; part and total [M, TILE].
void stream_rows(const QuantWeight& w, const QuantActivations& a, int64_t k0, int64_t columns,
                 float* part, float* total) {
  const int64_t count = (columns + W - 1) / W * W, row = w.K * w.bits / 8;
  alignas(64) float lines[STEP][TILE] = {};
  for (int64_t i = 0; i < a.M * TILE; ++i) total[i] = 0.f;
  for (int64_t n0 = 0; n0 < w.N; n0 += SEGMENT) {
    const int64_t stop = n0 + SEGMENT < w.N ? n0 + SEGMENT : w.N;
    for (int64_t i = 0; i < a.M * TILE; ++i) part[i] = 0.f;
    for (int64_t n = n0; n < stop; n += STEP) {
      const int rows = int(stop - n < STEP ? stop - n : STEP);
      const uint8_t* ahead = w.codes + (n + 2 * STEP) * row + k0 * w.bits / 8;
      if (n + 3 * STEP <= w.N)
        for (int r = 0; r < STEP; ++r)
          for (int64_t b = 0; b < columns * w.bits / 8; b += 64)
            __builtin_prefetch(ahead + r * row + b);
      unpack_rows(w, n, rows, k0, columns, lines[0], TILE);
      for (int r = rows; r < STEP; ++r)
        for (int64_t c = 0; c < count; ++c) lines[r][c] = 0.f;
      const float* dy = a.x + n;
      for (int64_t m = 0; m < a.M;) {
        const float* from = dy + m * a.x_stride;
        float* to = part + m * TILE;
        if (W == 16 && a.M - m >= 4) add_lines<4>(from, a.x_stride, rows, lines, count, to), m += 4;
        else if (a.M - m >= 2) add_lines<2>(from, a.x_stride, rows, lines, count, to), m += 2;
        else add_lines<1>(from, a.x_stride, rows, lines, count, to), m += 1;
      }
    }
    for (int64_t i = 0; i < a.M * TILE; i += W)
      store(total + i, load(static_cast<const float*>(total + i)) +
                           load(static_cast<const float*>(part + i)));
  }
}

}  // namespace

void quant_dgrad(const QuantWeight& w, const QuantActivations& a, void* dx, int64_t dx_stride,
                 DType dtype, float* scratch, int64_t begin, int64_t end) {
  if (a.M <= STREAM_ROWS) {
    float *part = scratch, *total = scratch + a.M * TILE;
    const int64_t stop = end * NB < w.K ? end * NB : w.K;
    for (int64_t k0 = begin * NB; k0 < stop; k0 += TILE) {
      const int64_t columns = stop - k0 < TILE ? stop - k0 : TILE;
      stream_rows(w, a, k0, columns, part, total);
      TW_FOR_DTYPE(dtype, T,
                   write_rows<T>(total, TILE, a.M, columns, nullptr, static_cast<T*>(dx) + k0, dx_stride))
    }
    return;
  }
  float *panel = scratch, *out = scratch + KC * NB;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t k0 = block * NB, columns = w.K - k0 < NB ? w.K - k0 : NB;
    for (int64_t i = 0; i < a.M * NB; ++i) out[i] = 0.f;
    for (int64_t i = 0; columns < NB && i < KC * NB; ++i) panel[i] = 0.f;
    for (int64_t n0 = 0; n0 < w.N; n0 += KC) {
      const int64_t nc = w.N - n0 < KC ? w.N - n0 : KC;
      unpack_rows(w, n0, nc, k0, columns, panel, NB);
      micro_rows(int(a.M), a.x + n0, a.x_stride, panel, nc, out);
    }
    write_block(out, a.M, k0, w.K, nullptr, dx, dx_stride, dtype);
  }
}

#if defined(__AVX512VNNI__)
namespace {

constexpr int MI = 6;  // rows: 12 integer and 12 float accumulators

// out[r, 32] += over the blocks of a panel; codes [blocks * 8, 32 columns, 4 k] u8.
template <int R, bool OFFSET>
TW_INLINE void micro_int8(const int8_t* x, int64_t x_stride, const float* x_scale,
                          const int32_t* isums, int64_t s_stride, const uint8_t* codes,
                          const float* scale, const float* offset, int64_t blocks, int centre,
                          float* out) {
  __m512 total[R][2];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) total[r][v] = _mm512_loadu_ps(out + r * NB + v * 16);
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i acc[R][2];
    for (int r = 0; r < R; ++r) {
      // starting at -centre * sum(x) centres the unsigned codes, exactly
      acc[r][0] = acc[r][1] = _mm512_set1_epi32(-centre * isums[r * s_stride + b]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m512i w0 = _mm512_loadu_si512(codes + (b * 8 + j) * 128);
      const __m512i w1 = _mm512_loadu_si512(codes + (b * 8 + j) * 128 + 64);
      for (int r = 0; r < R; ++r) {
        int32_t four;
        __builtin_memcpy(&four, x + r * x_stride + b * 32 + j * 4, 4);
        const __m512i xr = _mm512_set1_epi32(four);
        acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], w0, xr);
        acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], w1, xr);
      }
    }
    for (int v = 0; v < 2; ++v) {
      const __m512 s = _mm512_loadu_ps(scale + b * NB + v * 16);
      for (int r = 0; r < R; ++r) {
        const __m512 sx = _mm512_set1_ps(x_scale[r * s_stride + b]);
        total[r][v] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][v]), s), sx,
                                      total[r][v]);
        if constexpr (OFFSET) {
          const float xsum = x_scale[r * s_stride + b] * float(isums[r * s_stride + b]);
          total[r][v] = _mm512_fmadd_ps(_mm512_loadu_ps(offset + b * NB + v * 16),
                                        _mm512_set1_ps(xsum), total[r][v]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(out + r * NB + v * 16, total[r][v]);
}

// codes[k / 4, c, 4] = raw codes of w[n0 + c, k0 + k]; of 4 bits by eights, the even k before the odd.
// scale, offset [kc / 32, NB].
void fill_int8(const QuantWeight& w, int64_t n0, int64_t k0, int64_t kc, uint8_t* codes,
               float* scale, float* offset) {
  const int64_t group = w.K / w.G, g0 = k0 / group;
  float scales[KC / 32 * NB], offsets[KC / 32 * NB];
  panel_scales(w, n0, NB, g0, (k0 + kc - 1) / group - g0 + 1, float(w.centre()), scales, offsets, NB);
  for (int64_t b = 0; b < kc / 32; ++b) {
    const int64_t g = (k0 + b * 32) / group - g0;
    for (int64_t c = 0; c < NB; c += 16) {
      _mm512_storeu_ps(scale + b * NB + c, _mm512_loadu_ps(scales + g * NB + c));
      _mm512_storeu_ps(offset + b * NB + c, _mm512_loadu_ps(offsets + g * NB + c));
    }
  }
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int64_t c = 0; c < NB; c += 16) {
    uint8_t* to = codes + c * 4;
    if (w.bits == 8) {
      over_dwords<8>(w, n0 + c, k0, kc, [&](int64_t k, __m512i d) { _mm512_storeu_si512(to + k * NB, d); });
    } else {
      over_dwords<4>(w, n0 + c, k0, kc, [&](int64_t k, __m512i d) {
        _mm512_storeu_si512(to + k * NB, _mm512_and_si512(d, nibble));
        _mm512_storeu_si512(to + (k + 4) * NB, _mm512_and_si512(_mm512_srli_epi32(d, 4), nibble));
      });
    }
  }
}

template <bool OFFSET>
void gemm_int8(const QuantWeight& w, const QuantActivations& a, const void* bias, void* y,
               int64_t y_stride, DType dtype, float* scratch, int64_t begin, int64_t end) {
  const int64_t pad = padded(w.K), s_stride = pad / 32;
  const int centre = w.centre();
  // the float panel's room holds the codes, then the scales and offsets of its blocks
  uint8_t* codes = reinterpret_cast<uint8_t*>(scratch);
  float* scale = scratch + KC * NB / 4;
  float* offset = scale + KC / 32 * NB;
  float* out = scratch + KC * NB;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t n0 = block * NB;
    for (int64_t i = 0; i < a.M * NB; ++i) out[i] = 0.f;
    for (int64_t k0 = 0; k0 < w.K; k0 += KC) {
      const int64_t kc = w.K - k0 < KC ? w.K - k0 : KC, blocks = kc / 32;
      fill_int8(w, n0, k0, kc, codes, scale, offset);
      for (int64_t m = 0; m < a.M;) {
        const int8_t* x = a.codes + m * pad + k0;
        const float* sx = a.scales + m * s_stride + k0 / 32;
        const int32_t* sums = a.isums + m * s_stride + k0 / 32;
        if (a.M - m >= MI) {
          micro_int8<MI, OFFSET>(x, pad, sx, sums, s_stride, codes, scale, offset, blocks, centre,
                                 out + m * NB);
          m += MI;
        } else {
          micro_int8<1, OFFSET>(x, pad, sx, sums, s_stride, codes, scale, offset, blocks, centre,
                                out + m * NB);
          m += 1;
        }
      }
    }
    write_block(out, a.M, n0, w.N, bias, y, y_stride, dtype);
  }
}

}  // namespace
#endif

void quant_gemm_int8(const QuantWeight& w, const QuantActivations& a, const void* bias, void* y,
                     int64_t y_stride, DType dtype, float* scratch, int64_t begin, int64_t end) {
#if defined(__AVX512VNNI__)
  const auto run = w.minima || w.zeros ? gemm_int8<true> : gemm_int8<false>;
  run(w, a, bias, y, y_stride, dtype, scratch, begin, end);
#endif
}

}  // namespace tilewright::cpu::TW_ISA
