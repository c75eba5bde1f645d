// Panels, as the matrix products read a weight: sixteen rows of it along the lanes, k along memory.
#pragma once
#include "quant_codes.h"

namespace tilewright::cpu::TW_ISA {
namespace {

#if defined(__AVX512F__) || defined(__AVX2__)
constexpr int NV = 2;
#else
constexpr int NV = 16;  // 16 columns a block, as wide as the tables elsewhere
#endif
constexpr int64_t NB = NV * W;    // columns a block
constexpr int64_t KC = UNPACKED;  // panel depth: a few rows of x that deep stay in L1

#if defined(__AVX512F__)

// Where sixteen rows from n on have their codes from column k on; past the last, that one again.
struct SixteenRows {
  const uint8_t* at[16];
  SixteenRows(const QuantWeight& w, int64_t n, int64_t k) {
    for (int i = 0; i < 16; ++i) {
      const int64_t row = n + i < w.N ? n + i : w.N - 1;
      at[i] = w.codes + uint64_t(row * w.K + k) * unsigned(w.bits) / 8;
    }
  }
};

// d[j], lane i: dword j of row i's 64 bytes from `byte` on; of those past `bytes`, zero.
TW_INLINE void transposed(const SixteenRows& rows, int64_t byte, int64_t bytes, __m512i d[16]) {
  const int64_t left = bytes - byte;
  const __mmask64 mask = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
  __m512i a[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_epi8(mask, rows.at[i] + byte);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // a[i + c], quarter L: dword 4 L + c of rows i to i + 3
    a[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44);
    const __m512i high = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
    const __m512i low2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
    const __m512i high2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
    d[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
    d[4 + c] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    d[8 + c] = _mm512_shuffle_i32x4(high, high2, 0x88);
    d[12 + c] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
}

// visit(k, d) for each dword of sixteen rows: d holds their codes k, k + 1, ... of the kc from n, k0 on.
template <int BITS, class F>
TW_INLINE void over_dwords(const QuantWeight& w, int64_t n, int64_t k0, int64_t kc, const F& visit) {
  constexpr int64_t PER = 32 / BITS;
  const SixteenRows rows(w, n, k0);
  for (int64_t k = 0; k < kc; k += 16 * PER) {
    __m512i d[16];
    transposed(rows, k * BITS / 8, kc * BITS / 8, d);
    const int64_t left = (kc - k) / PER;
    for (int64_t j = 0; j < 16 && j < left; ++j) visit(k + j * PER, d[j]);
  }
}

// scale, offset [groups, stride], column c: those of row n0 + c in groups g0, g0 + 1, ...; past the last
// row, its own again.
[[maybe_unused]] void panel_scales(const QuantWeight& w, int64_t n0, int columns, int64_t g0,
                                   int64_t groups, float centre, float* scale, float* offset,
                                   int64_t stride) {
  float s[UNPACKED + 2 * W], o[UNPACKED + 2 * W];
  for (int c = 0; c < columns; ++c) {
    const int64_t n = n0 + c < w.N ? n0 + c : w.N - 1;
    TW_FOR_DTYPE(w.scale_dtype, S, row_scales<S>(w, n, g0, groups, centre, s, o))
    for (int64_t g = 0; g < groups; ++g) scale[g * stride + c] = s[g], offset[g * stride + c] = o[g];
  }
}

#endif

template <class T>
void write_rows(const float* out, int64_t out_stride, int64_t M, int64_t columns, const T* bias,
                T* y, int64_t y_stride) {
  const int64_t whole = columns / W * W;
  for (int64_t m = 0; m < M; ++m, out += out_stride, y += y_stride) {
    for (int64_t c = 0; c < whole; c += W)
      store(y + c, bias ? load(out + c) + load(bias + c) : load(out + c));
    for (int64_t c = whole; c < columns; ++c)
      y[c] = from_float<T>(bias ? out[c] + to_float(bias[c]) : out[c]);
  }
}

[[maybe_unused]] void write_block(const float* out, int64_t M, int64_t n0, int64_t N, const void* bias, void* y,
                 int64_t y_stride, DType dtype) {
  const int64_t columns = N - n0 < NB ? N - n0 : NB;
  TW_FOR_DTYPE(dtype, T, {
    const T* b = bias ? static_cast<const T*>(bias) + n0 : nullptr;
    write_rows(out, NB, M, columns, b, static_cast<T*>(y) + n0, y_stride);
  })
}

}  // namespace
}  // namespace tilewright::cpu::TW_ISA
