// Three paths, see quant_linear.h:
//   GEMV, M <= 8: weights stream once; lanes lie along K and codes unpack in registers.
//   GEMM, more rows: a block of columns is unpacked to float32 once (from L2 it feeds every row).
//   int8 activations, where the CPU has VNNI: both of the above in integers.
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

template <class T> void to_floats(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

void to_floats(const void* from, DType dtype, int64_t start, float* to, int64_t n) {
  TW_FOR_DTYPE(dtype, T, to_floats(static_cast<const T*>(from) + start, to, n))
}

// Scales and centred offsets of row n, groups [g0, g0 + count), as float32.
// Returns whether there is an offset at all.
bool row_scales(const QuantWeight& w, int64_t n, int64_t g0, int64_t count, float* scale,
                float* offset) {
  to_floats(w.scales, w.scale_dtype, n * w.G + g0, scale, count);
  const float centre = float(1 << (w.bits - 1));
  if (w.minima) {
    to_floats(w.minima, w.scale_dtype, n * w.G + g0, offset, count);
    for (int64_t g = 0; g < count; ++g) offset[g] += centre * scale[g];
  } else if (w.zeros) {
    to_floats(w.zeros, w.scale_dtype, n * w.G + g0, offset, count);
    for (int64_t g = 0; g < count; ++g) offset[g] = scale[g] * (centre - offset[g]);
  }
  return w.minima || w.zeros;
}

#if defined(__AVX2__)
// sum_g offset[g] * sums[g] of row n, and its G scales as float32 into `scale`: one pass.
template <class S>
TW_INLINE float scales_and_offset(const QuantWeight& w, int64_t n, const float* sums, float* scale) {
  const S* from = static_cast<const S*>(w.scales) + n * w.G;
  const S* extra = w.minima  ? static_cast<const S*>(w.minima) + n * w.G
                   : w.zeros ? static_cast<const S*>(w.zeros) + n * w.G
                             : nullptr;
  const float centre = float(1 << (w.bits - 1));
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

TW_INLINE int code_at(const QuantWeight& w, int64_t n, int64_t k) {
  if (w.bits == 8) return int(w.codes[n * w.K + k]) - 128;
  const int byte = w.codes[n * (w.K / 2) + k / 2];
  return ((k & 1) ? byte >> 4 : byte & 15) - 8;
}

// ---- GEMV --------------------------------------------------------------------------------------

#if defined(__AVX512F__)

// 4 bits: lane l of step i holds k = 8 l + i, so that one shift and one table look-up unpack it.
TW_INLINE __m512 unpack4(__m512i codes, int step, __m512 table) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, unsigned(4 * step)), table);
}
TW_INLINE __m512 table4() {
  return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
}
// 8 bits: lane l of step i holds k = 16 i + l.
TW_INLINE __m512 unpack8(const uint8_t* p, int step, __mmask16 mask) {
  const __m128i codes = _mm_maskz_loadu_epi8(mask, p + 16 * step);
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(codes), _mm512_set1_epi32(128)));
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

// MR rows of x against NR rows of w.
template <int GROUP, int MR, int NR>
TW_INLINE void gemv4(const QuantWeight& w, const float* lanes, int64_t lanes_stride,
                     const float (*scale)[GEMV_GROUPS + 16], int64_t n, float (*out)[NR]) {
  const int64_t group = w.K / w.G, row = w.K / 2;
  const __m512 table = table4();
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
      for (int r = 0; r < NR; ++r) weight[r] = unpack8(w.codes + (n + r) * w.K + k, step, mask);
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
TW_INLINE void unpack32(const uint8_t* p, int bits, __m256 out[4]) {
  __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), high;
  if (bits == 4) {
    const __m128i nibble = _mm_set1_epi8(15);
    high = _mm_and_si128(_mm_srli_epi16(low, 4), nibble);
    low = _mm_and_si128(low, nibble);
  } else {
    high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16));
  }
  const int centre = 1 << (bits - 1);
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
    unpack32(p + b * 4 * BITS, BITS, weight);
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
  return quant_has_gemv(w) && group % 32 == 0;
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
      largest = size > largest ? size : largest;
    }
    const float scale = largest / 127.f, inverse = scale > 0 ? 1.f / scale : 0.f;
    int32_t sum = 0;
    for (int64_t j = 0; j < block; ++j) {
      float q = __builtin_rintf(at(j) * inverse);
      q = q > 127.f ? 127.f : q < -127.f ? -127.f : q;
      if (fake) {
        fake[b * block + j] = q * scale;
      } else {
        codes[b * block + j] = int8_t(q);
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

constexpr int64_t SCALES = GEMV_GROUPS + 16;  // a row's scales, and room for a vector past the end

TW_INLINE void finish(float value, const void* bias, void* y, DType dtype, int64_t n, int64_t at) {
  store_as(y, dtype, at, bias ? value + scalar_at(bias, dtype, n) : value);
}

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

}  // namespace

void quant_gemv(const QuantWeight& w, const QuantActivations& a, const void* bias, void* y,
                int64_t y_stride, DType dtype, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
  const int64_t group = w.K / w.G;
  const auto run = group == 32 ? gemv_all<32> : group == 64 ? gemv_all<64> : gemv_all<128>;
  run(w, a, bias, y, y_stride, dtype, begin, end);
#elif defined(__AVX2__)
  (w.bits == 4 ? gemv_all<4> : gemv_all<8>)(w, a, bias, y, y_stride, dtype, begin, end);
#endif
}

#if defined(__AVX512VNNI__)
namespace {

// One chunk of a prepared row: 64 bytes of codes.  4 bits: the even k of each slice, then the odd.
// Lane l of an accumulator sums PER_LANE consecutive k.
template <int BITS, int SLICES> struct FixedChunk {
  static constexpr int PER_LANE = BITS == 4 ? 8 : 4, SPAN = 16 * PER_LANE;
  // 8-bit codes times 24-bit numbers overflow int32: their last slice has an accumulator of its own
  static constexpr bool SPLIT = BITS == 8 && SLICES == 3;
  int8_t slice[SLICES][SPAN];
  int32_t start[SPLIT ? 2 : 1][16];  // -2^(bits-1) * sum of the lane's numbers: centres the codes
  float scale[16];                   // of the block of 32 each lane lies in
};

TW_INLINE float pow2_at(int exponent) { return float_of(uint32_t(exponent + 127) << 23); }

// 32 numbers of x as two vectors; 4 bits: the even k, the odd k.
template <int BITS, class T>
TW_INLINE void load32(const T* x, __m512& low, __m512& high) {
  const __m512 a = load(x).v, b = load(x + 16).v;
  if constexpr (BITS == 8) {
    low = a, high = b;
  } else {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    low = _mm512_permutex2var_ps(a, even, b);
    high = _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
  }
}

// Sums of PER_LANE consecutive k, as 32 / PER_LANE lanes.
template <int BITS> TW_INLINE void lane_sums(__m512i low, __m512i high, int32_t* out) {
  alignas(64) int32_t lanes[32];
  _mm512_store_si512(lanes, low);
  _mm512_store_si512(lanes + 16, high);
  if constexpr (BITS == 4) {  // lane l: even and odd k of 8 l .. 8 l + 7
    for (int l = 0; l < 4; ++l) {
      int32_t sum = 0;
      for (int j = 0; j < 4; ++j) sum += lanes[4 * l + j] + lanes[16 + 4 * l + j];
      out[l] = -8 * sum;
    }
  } else {
    for (int l = 0; l < 8; ++l) {
      int32_t sum = 0;
      for (int j = 0; j < 4; ++j) sum += lanes[4 * l + j];
      out[l] = -128 * sum;
    }
  }
}

template <int BITS, int SLICES, class T>
bool prepare_fixed(const QuantWeight& w, const T* x, uint8_t* fixed, float* sums) {
  using Chunk = FixedChunk<BITS, SLICES>;
  constexpr int BLOCKS = Chunk::SPAN / 32, LANES = 32 / Chunk::PER_LANE;
  Chunk* chunks = reinterpret_cast<Chunk*>(fixed);
  const int64_t blocks = w.K / 32, group_blocks = blocks / w.G;
  float group_sum = 0.f;
  for (int64_t b = 0; b < blocks; ++b) {
    Chunk& chunk = chunks[b / BLOCKS];
    const int at = int(b % BLOCKS);
    __m512 low, high;
    load32<BITS>(x + b * 32, low, high);
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    float scale, inverse;
    if constexpr (SLICES == 1) {
      scale = largest / 127.f;
      inverse = scale > 0 ? 1.f / scale : 0.f;
    } else {
      // nan fails both comparisons; below, the scale would leave the normal range
      if (!(largest == 0.f || (largest > 0x1p-90f && largest < 0x1p127f))) return false;
      const int exponent = int(bits_of(largest) >> 23) - 127;
      // the largest, rounded, must leave a first slice of 127 at most: 127.5 * 2^16 at most in all
      const int shift = largest * pow2_at(-exponent) < 1.9921875f ? 22 - exponent : 21 - exponent;
      scale = largest > 0 ? pow2_at(-shift) : 0.f;
      inverse = largest > 0 ? pow2_at(shift > 127 ? 127 : shift) : 0.f;
    }
    const __m512 inv = _mm512_set1_ps(inverse);
    __m512i lo = _mm512_cvtps_epi32(_mm512_mul_ps(low, inv));
    __m512i hi = _mm512_cvtps_epi32(_mm512_mul_ps(high, inv));
    if constexpr (SLICES == 1) {
      const __m512i top = _mm512_set1_epi32(127), bottom = _mm512_set1_epi32(-127);
      lo = _mm512_max_epi32(_mm512_min_epi32(lo, top), bottom);
      hi = _mm512_max_epi32(_mm512_min_epi32(hi, top), bottom);
      lane_sums<BITS>(lo, hi, chunk.start[0] + at * LANES);
      group_sum += scale * float(_mm512_reduce_add_epi32(_mm512_add_epi32(lo, hi)));
    } else {
      if constexpr (!Chunk::SPLIT) lane_sums<BITS>(lo, hi, chunk.start[0] + at * LANES);
      group_sum += _mm512_reduce_add_ps(_mm512_add_ps(low, high));
    }
    const __m512i half = _mm512_set1_epi32(128);
    for (int i = SLICES - 1; i >= 0; --i) {
      int8_t* out = chunk.slice[i];
      const int second = BITS == 4 ? 64 + at * 16 : at * 32 + 16;
      const int first = BITS == 4 ? at * 16 : at * 32;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + first), _mm512_cvtepi32_epi8(lo));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + second), _mm512_cvtepi32_epi8(hi));
      if (i == 0) break;
      const __m512i lo_next = _mm512_srai_epi32(_mm512_add_epi32(lo, half), 8);
      const __m512i hi_next = _mm512_srai_epi32(_mm512_add_epi32(hi, half), 8);
      if (Chunk::SPLIT && i == SLICES - 1) {
        lane_sums<BITS>(_mm512_sub_epi32(lo, _mm512_slli_epi32(lo_next, 8)),
                        _mm512_sub_epi32(hi, _mm512_slli_epi32(hi_next, 8)),
                        chunk.start[Chunk::SPLIT] + at * LANES);
        lane_sums<BITS>(lo_next, hi_next, chunk.start[0] + at * LANES);
      }
      lo = lo_next, hi = hi_next;
    }
    for (int l = 0; l < LANES; ++l) chunk.scale[at * LANES + l] = scale;
    if ((b + 1) % group_blocks == 0) {
      sums[b / group_blocks] = group_sum;
      group_sum = 0.f;
    }
  }
  for (int64_t b = blocks; b % BLOCKS; ++b) {  // the rest of the last chunk adds nothing
    Chunk& chunk = chunks[b / BLOCKS];
    const int at = int(b % BLOCKS);
    for (int i = 0; i < SLICES; ++i)
      for (int j = 0; j < 32; ++j)
        chunk.slice[i][BITS == 4 ? (j & 16) * 4 + at * 16 + (j & 15) : at * 32 + j] = 0;
    for (int l = 0; l < LANES; ++l) {
      chunk.scale[at * LANES + l] = 0.f;
      for (auto& start : chunk.start) start[at * LANES + l] = 0;
    }
  }
  return true;
}

// Totals of four vectors in one.
TW_INLINE __m128 reduce4(const __m512 v[4]) {
  __m256 h[4];
  for (int i = 0; i < 4; ++i)
    h[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
  const __m256 sum = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
  return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
}

// Scales of row n into `scale`; returns, over 16 lanes, the terms of sum_g offset[g] * sums[g].
template <class S>
TW_INLINE __m512 offset_terms(const QuantWeight& w, int64_t n, const float* sums, float* scale) {
  const S* from = static_cast<const S*>(w.scales) + n * w.G;
  const S* minima = w.minima ? static_cast<const S*>(w.minima) + n * w.G : nullptr;
  const S* zeros = w.zeros ? static_cast<const S*>(w.zeros) + n * w.G : nullptr;
  const Vec centre = set1(float(1 << (w.bits - 1)));
  Vec acc = set1(0.f);
  for (int64_t g = 0; g < w.G; g += 16) {
    const int left = int(w.G - g < 16 ? w.G - g : 16);
    const Vec s = load_tail(from + g, left);
    store(scale + g, s);
    if (minima)
      acc = fma(fma(s, centre, load_tail(minima + g, left)), load_tail(sums + g, left), acc);
    else if (zeros)
      acc = fma(s * (centre - load_tail(zeros + g, left)), load_tail(sums + g, left), acc);
  }
  return acc.v;
}

template <int BITS, int GROUP, int SLICES, class S>
void gemv_fixed(const QuantWeight& w, const QuantActivations& a, const void* bias, void* y,
                int64_t y_stride, DType dtype, int64_t begin, int64_t end) {
  using Chunk = FixedChunk<BITS, SLICES>;
  constexpr int NR = 4, SPAN = Chunk::SPAN;
  const int64_t group = w.K / w.G, row = w.K * BITS / 8, count = (w.K + SPAN - 1) / SPAN;
  const int64_t row_bytes = count * int64_t(sizeof(Chunk));
  const __m512i nibble = _mm512_set1_epi8(15);
  float scale[NR][SCALES];
  for (int64_t n = begin; n < end; n += NR) {
    // rows past the end repeat the last one, and are not written
    int64_t at[NR];
    for (int r = 0; r < NR; ++r) at[r] = n + r < end ? n + r : end - 1;
    for (int64_t m = 0; m < a.M; ++m) {
      const Chunk* x = reinterpret_cast<const Chunk*>(a.fixed + m * row_bytes);
      __m512 total[NR];
      for (int r = 0; r < NR; ++r)
        total[r] = offset_terms<S>(w, at[r], a.sums + m * w.G, scale[r]);
      for (int64_t c = 0; c < count; ++c) {
        const int64_t left = row - c * 64;
        const __mmask64 mask = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
        const __m512 x_scale = _mm512_loadu_ps(x[c].scale);
        for (int r = 0; r < NR; ++r) {
          const uint8_t* p = w.codes + at[r] * row + c * 64;
          _mm_prefetch(reinterpret_cast<const char*>(p + NR * row), _MM_HINT_T0);
          const __m512i codes = _mm512_maskz_loadu_epi8(mask, p);
          __m512 sum;
          if constexpr (BITS == 4) {
            const __m512i low = _mm512_and_si512(codes, nibble);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble);
            __m512i acc = _mm512_setzero_si512();
            for (int i = 0; i < SLICES; ++i) {
              // the start belongs to the finished sum: it joins at the last slice
              if (i > 0) acc = _mm512_slli_epi32(acc, 8);
              if (i == SLICES - 1) acc = _mm512_add_epi32(acc, _mm512_loadu_si512(x[c].start[0]));
              acc = _mm512_dpbusd_epi32(acc, low, _mm512_loadu_si512(x[c].slice[i]));
              acc = _mm512_dpbusd_epi32(acc, high, _mm512_loadu_si512(x[c].slice[i] + 64));
            }
            sum = _mm512_cvtepi32_ps(acc);
          } else if constexpr (SLICES == 1) {
            sum = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_loadu_si512(x[c].start[0]), codes,
                                                         _mm512_loadu_si512(x[c].slice[0])));
          } else {
            __m512i acc = _mm512_slli_epi32(
                _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_loadu_si512(x[c].slice[0])), 8);
            acc = _mm512_add_epi32(acc, _mm512_loadu_si512(x[c].start[0]));
            acc = _mm512_dpbusd_epi32(acc, codes, _mm512_loadu_si512(x[c].slice[1]));
            const __m512i last = _mm512_dpbusd_epi32(_mm512_loadu_si512(x[c].start[Chunk::SPLIT]),
                                                     codes, _mm512_loadu_si512(x[c].slice[SLICES - 1]));
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), _mm512_set1_ps(256.f),
                                  _mm512_cvtepi32_ps(last));
          }
          const __m512 s =
              _mm512_mul_ps(x_scale, lane_scales<GROUP, Chunk::PER_LANE>(scale[r], c, group));
          total[r] = _mm512_fmadd_ps(sum, s, total[r]);
        }
      }
      float out[NR];
      _mm_storeu_ps(out, reduce4(total));
      for (int r = 0; r < NR && n + r < end; ++r)
        finish(out[r], bias, y, dtype, n + r, m * y_stride + n + r);
    }
  }
}

using GemvFixed = void (*)(const QuantWeight&, const QuantActivations&, const void*, void*, int64_t,
                           DType, int64_t, int64_t);

template <int BITS, int GROUP, int SLICES> GemvFixed gemv_fixed_for(DType scales) {
  return scales == DType::F16    ? gemv_fixed<BITS, GROUP, SLICES, f16>
         : scales == DType::BF16 ? gemv_fixed<BITS, GROUP, SLICES, bf16>
                                 : gemv_fixed<BITS, GROUP, SLICES, float>;
}

template <int BITS, int SLICES> GemvFixed gemv_fixed_for(const QuantWeight& w) {
  const int64_t group = w.K / w.G;
  if (group == 32) return gemv_fixed_for<BITS, 32, SLICES>(w.scale_dtype);
  if (group == 64) return gemv_fixed_for<BITS, 64, SLICES>(w.scale_dtype);
  return gemv_fixed_for<BITS, 128, SLICES>(w.scale_dtype);
}

}  // namespace
#endif

int64_t quant_fixed_bytes(const QuantWeight& w, int slices) {
#if defined(__AVX512VNNI__)
  const int64_t span = w.bits == 4 ? 128 : 64;
  const int64_t chunk = w.bits == 4 ? (slices == 1 ? sizeof(FixedChunk<4, 1>) : sizeof(FixedChunk<4, 3>))
                                    : (slices == 1 ? sizeof(FixedChunk<8, 1>) : sizeof(FixedChunk<8, 3>));
  return (w.K + span - 1) / span * chunk;
#else
  return 0;
#endif
}

bool quant_prepare_fixed(const QuantWeight& w, const void* x, DType dtype, int slices,
                         uint8_t* fixed, float* sums) {
#if defined(__AVX512VNNI__)
  bool fits = false;
  TW_FOR_DTYPE(dtype, T, {
    const T* row = static_cast<const T*>(x);
    if (w.bits == 4)
      fits = slices == 1 ? prepare_fixed<4, 1>(w, row, fixed, sums)
                         : prepare_fixed<4, 3>(w, row, fixed, sums);
    else
      fits = slices == 1 ? prepare_fixed<8, 1>(w, row, fixed, sums)
                         : prepare_fixed<8, 3>(w, row, fixed, sums);
  })
  return fits;
#else
  return false;
#endif
}

void quant_gemv_fixed(const QuantWeight& w, const QuantActivations& a, int slices, const void* bias,
                      void* y, int64_t y_stride, DType dtype, int64_t begin, int64_t end) {
#if defined(__AVX512VNNI__)
  const GemvFixed run = w.bits == 4 ? (slices == 1 ? gemv_fixed_for<4, 1>(w) : gemv_fixed_for<4, 3>(w))
                                    : (slices == 1 ? gemv_fixed_for<8, 1>(w) : gemv_fixed_for<8, 3>(w));
  run(w, a, bias, y, y_stride, dtype, begin, end);
#endif
}

// ---- GEMM --------------------------------------------------------------------------------------

namespace {

#if defined(__AVX512F__)
constexpr int MR = 12, NV = 2;  // 24 accumulators, 2 weights, 1 broadcast: 27 of 32 registers
#elif defined(__AVX2__)
constexpr int MR = 6, NV = 2;  // 12 + 2 + 1 of 16
#else
constexpr int MR = 4, NV = 16;  // 16 columns a block, as wide as the tables elsewhere
#endif
constexpr int64_t NB = NV * W;     // columns a block
constexpr int64_t KC = 512;        // panel depth: MR * KC floats of x stay in L1

// Terms summed before they join the total: a long running sum would round every term to its size.
constexpr int64_t SEGMENT = W == 1 ? 16 : 8 * W;

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

// Row n of w, columns [k0, k0 + count) as float32.
void unpack_row(const QuantWeight& w, int64_t n, int64_t k0, int64_t count, float* out) {
  const int64_t group = w.K / w.G;
  int64_t k = k0;
  const int64_t end = k0 + count;
  while (k < end) {
    const int64_t g = k / group, stop = (g + 1) * group < end ? (g + 1) * group : end;
    float scale, offset = 0.f;
    row_scales(w, n, g, 1, &scale, &offset);
    for (; k < stop; ++k) out[k - k0] = scale * float(code_at(w, n, k)) + offset;
  }
}

// panel[k, c] = w[n0 + c, k0 + k], zero past N.
void fill_columns(const QuantWeight& w, int64_t n0, int64_t k0, int64_t kc, float* panel) {
  int64_t columns = w.N - n0 < NB ? w.N - n0 : NB;
  int64_t c = 0;
#if defined(__AVX512F__)
  const int64_t group = w.K / w.G;
  if (w.bits == 4 && group % 8 == 0 && k0 % 8 == 0 && kc % 8 == 0) {
    const __m512 table = table4();
    for (; c + 16 <= columns; c += 16) {
      const int64_t row = w.K / 2;
      const __m512i rows = _mm512_mullo_epi32(
          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
          _mm512_set1_epi32(int(row)));
      const uint8_t* base = w.codes + (n0 + c) * row;
      float scale[16], offset[16] = {};
      for (int64_t k = 0; k < kc; k += 8) {
        if (k == 0 || (k0 + k) % group == 0)
          for (int i = 0; i < 16; ++i)
            row_scales(w, n0 + c + i, (k0 + k) / group, 1, scale + i, offset + i);
        const __m512 s = _mm512_loadu_ps(scale), o = _mm512_loadu_ps(offset);
        const __m512i codes = _mm512_i32gather_epi32(rows, base + (k0 + k) / 2, 1);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i)
          _mm512_storeu_ps(panel + (k + i) * NB + c, _mm512_fmadd_ps(unpack4(codes, i, table), s, o));
      }
    }
  }
#endif
  float line[KC];
  for (; c < columns; ++c) {
    unpack_row(w, n0 + c, k0, kc, line);
    for (int64_t k = 0; k < kc; ++k) panel[k * NB + c] = line[k];
  }
  for (; c < NB; ++c)
    for (int64_t k = 0; k < kc; ++k) panel[k * NB + c] = 0.f;
}

template <class T>
void write_block(const float* out, int64_t M, int64_t columns, const T* bias, T* y,
                 int64_t y_stride) {
  const int64_t whole = columns / W * W;
  for (int64_t m = 0; m < M; ++m, out += NB, y += y_stride) {
    for (int64_t c = 0; c < whole; c += W)
      store(y + c, bias ? load(out + c) + load(bias + c) : load(out + c));
    for (int64_t c = whole; c < columns; ++c)
      y[c] = from_float<T>(bias ? out[c] + to_float(bias[c]) : out[c]);
  }
}

void write_block(const float* out, int64_t M, int64_t n0, int64_t N, const void* bias, void* y,
                 int64_t y_stride, DType dtype) {
  const int64_t columns = N - n0 < NB ? N - n0 : NB;
  TW_FOR_DTYPE(dtype, T, {
    const T* b = bias ? static_cast<const T*>(bias) + n0 : nullptr;
    write_block(out, M, columns, b, static_cast<T*>(y) + n0, y_stride);
  })
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

void quant_dgrad(const QuantWeight& w, const QuantActivations& a, void* dx, int64_t dx_stride,
                 DType dtype, float* scratch, int64_t begin, int64_t end) {
  float *panel = scratch, *out = scratch + KC * NB;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t k0 = block * NB, columns = w.K - k0 < NB ? w.K - k0 : NB;
    for (int64_t i = 0; i < a.M * NB; ++i) out[i] = 0.f;
    for (int64_t n0 = 0; n0 < w.N; n0 += KC) {
      const int64_t nc = w.N - n0 < KC ? w.N - n0 : KC;
      for (int64_t n = 0; n < nc; ++n) {
        unpack_row(w, n0 + n, k0, columns, panel + n * NB);
        for (int64_t c = columns; c < NB; ++c) panel[n * NB + c] = 0.f;
      }
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
                          const float* scale, const float* offset, int64_t blocks, int shift,
                          float* out) {
  __m512 total[R][2];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) total[r][v] = _mm512_loadu_ps(out + r * NB + v * 16);
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i acc[R][2];
    for (int r = 0; r < R; ++r) {
      // starting at -2^(bits-1) * sum(x) centres the unsigned codes, exactly
      acc[r][0] = acc[r][1] = _mm512_set1_epi32(-(isums[r * s_stride + b] * (1 << shift)));
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

// codes[k / 4, c, k % 4] = raw code of w[n0 + c, k0 + k]; scale, offset [kc / 32, NB].
void fill_int8(const QuantWeight& w, int64_t n0, int64_t k0, int64_t kc, uint8_t* codes,
               float* scale, float* offset) {
  const int64_t group = w.K / w.G, columns = w.N - n0 < NB ? w.N - n0 : NB;
  for (int64_t c = 0; c < NB; ++c) {
    const int64_t n = n0 + (c < columns ? c : columns - 1);  // repeats are never written out
    if (group == 32) {
      float s[KC / 32], o[KC / 32] = {};
      row_scales(w, n, k0 / 32, kc / 32, s, o);
      for (int64_t b = 0; b < kc / 32; ++b) scale[b * NB + c] = s[b], offset[b * NB + c] = o[b];
    } else {
      for (int64_t b = 0; b < kc / 32; ++b)
        row_scales(w, n, (k0 + b * 32) / group, 1, scale + b * NB + c, offset + b * NB + c);
    }
    if (w.bits == 8) {
      const uint8_t* p = w.codes + n * w.K + k0;
      for (int64_t k = 0; k < kc; k += 4) __builtin_memcpy(codes + k * NB + c * 4, p + k, 4);
    } else {
      const uint8_t* p = w.codes + (n * w.K + k0) / 2;
      for (int64_t k = 0; k < kc; k += 4) {
        uint16_t two;
        __builtin_memcpy(&two, p + k / 2, 2);
        const uint32_t four = (two & 0xfu) | (two & 0xf0u) << 4 | (two & 0xf00u) << 8 |
                              (two & 0xf000u) << 12;
        __builtin_memcpy(codes + k * NB + c * 4, &four, 4);
      }
    }
  }
}

template <bool OFFSET>
void gemm_int8(const QuantWeight& w, const QuantActivations& a, const void* bias, void* y,
               int64_t y_stride, DType dtype, float* scratch, int64_t begin, int64_t end) {
  const int64_t pad = padded(w.K), s_stride = pad / 32;
  const int shift = w.bits - 1;
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
          micro_int8<MI, OFFSET>(x, pad, sx, sums, s_stride, codes, scale, offset, blocks, shift,
                                 out + m * NB);
          m += MI;
        } else {
          micro_int8<1, OFFSET>(x, pad, sx, sums, s_stride, codes, scale, offset, blocks, shift,
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
