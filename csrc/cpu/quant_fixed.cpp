// One to eight rows in integers: x as fixed-point numbers of one to three bytes, see quant_linear.h.
#include "quant_codes.h"

namespace tilewright::cpu::TW_ISA {

#if defined(__AVX512VNNI__)
namespace {

// One chunk of a prepared row: 64 bytes of codes.  4 bits: the even k of each slice, then the odd.
// Lane l of an accumulator sums PER_LANE consecutive k.
template <int BITS, int SLICES> struct FixedChunk {
  static constexpr int PER_LANE = BITS == 4 ? 8 : 4, SPAN = 16 * PER_LANE;
  // 8-bit codes times 24-bit numbers overflow int32: their last slice has an accumulator of its own
  static constexpr bool SPLIT = BITS == 8 && SLICES == 3;
  int8_t slice[SLICES][SPAN];
  int32_t start[SPLIT ? 2 : 1][16];  // -centre * sum of the lane's numbers: centres the codes
  float scale[16];                   // of the block of 32 each lane lies in
};

// The largest number of so many slices, less one since x * inverse is rounded.  The first slice is at most
// 127, and the carries of those below it round up to it.
template <int SLICES> constexpr float MOST = SLICES == 3 ? 127 * 65536 + 127 * 256 + 126 : 127 * 256 + 126;

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

TW_INLINE __m512i add_fours(__m512i v) {  // lane 4 i: the sum of lanes 4 i .. 4 i + 3
  v = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB));
  return _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_BADC));
}
// -centre times the sums of PER_LANE consecutive k, 32 / PER_LANE of them.
template <int BITS> TW_INLINE void lane_sums(__m512i low, __m512i high, int centre, int32_t* out) {
  const __m512i factor = _mm512_set1_epi32(-centre);
  if constexpr (BITS == 4) {  // a lane's eight k: four even ones in low, four odd ones in high
    const __m512i sums = add_fours(_mm512_add_epi32(low, high));
    _mm512_mask_compressstoreu_epi32(out, 0x1111, _mm512_mullo_epi32(factor, sums));
  } else {
    _mm512_mask_compressstoreu_epi32(out, 0x1111, _mm512_mullo_epi32(factor, add_fours(low)));
    _mm512_mask_compressstoreu_epi32(out + 4, 0x1111, _mm512_mullo_epi32(factor, add_fours(high)));
  }
}

template <int BITS, int SLICES, class T>
bool prepare_fixed(const QuantWeight& w, const T* x, uint8_t* fixed, float* sums) {
  using Chunk = FixedChunk<BITS, SLICES>;
  constexpr int BLOCKS = Chunk::SPAN / 32, LANES = 32 / Chunk::PER_LANE;
  Chunk* chunks = reinterpret_cast<Chunk*>(fixed);
  const int64_t blocks = w.K / 32, group_blocks = blocks / w.G;
  const int centre = w.centre();
  float group_sum = 0.f;
  for (int64_t b = 0; b < blocks; ++b) {
    Chunk& chunk = chunks[b / BLOCKS];
    const int at = int(b % BLOCKS);
    __m512 low, high;
    load32<BITS>(x + b * 32, low, high);
    if (_mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q)) return false;  // a nan, which max can lose
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    // beyond these a scale, its inverse or its product with a weight's would leave the normal range
    if (!(largest == 0.f || (largest > 0x1p-90f && largest < 0x1p127f))) return false;
    float scale, inverse;
    if constexpr (SLICES == 1) {
      scale = largest / 127.f;
      inverse = scale > 0 ? 1.f / scale : 0.f;
    } else {
      // an inverse of 12 significant bits makes 1 / (1 / inverse) as good as exact: no error common to
      // the block
      const float exact = largest > 0 ? MOST<SLICES> / largest : 0.f;
      inverse = float_of(bits_of(exact) & 0xfffff000u);
      scale = largest > 0 ? 1.f / inverse : 0.f;
    }
    const __m512 inv = _mm512_set1_ps(inverse);
    __m512i lo = _mm512_cvtps_epi32(_mm512_mul_ps(low, inv));
    __m512i hi = _mm512_cvtps_epi32(_mm512_mul_ps(high, inv));
    if constexpr (SLICES == 1) {
      const __m512i top = _mm512_set1_epi32(127), bottom = _mm512_set1_epi32(-127);
      lo = _mm512_max_epi32(_mm512_min_epi32(lo, top), bottom);
      hi = _mm512_max_epi32(_mm512_min_epi32(hi, top), bottom);
      lane_sums<BITS>(lo, hi, centre, chunk.start[0] + at * LANES);
      group_sum += scale * float(_mm512_reduce_add_epi32(_mm512_add_epi32(lo, hi)));
    } else {
      if constexpr (!Chunk::SPLIT) lane_sums<BITS>(lo, hi, centre, chunk.start[0] + at * LANES);
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
                        _mm512_sub_epi32(hi, _mm512_slli_epi32(hi_next, 8)), centre,
                        chunk.start[Chunk::SPLIT] + at * LANES);
        lane_sums<BITS>(lo_next, hi_next, centre, chunk.start[0] + at * LANES);
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
  const Vec centre = set1(float(w.centre()));
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
#pragma GCC unroll 4
        for (int r = 0; r < NR; ++r) {
          const uint8_t* p = w.codes + at[r] * row + c * 64;
          // into L2 and in the order of memory, two steps ahead: as fast as this machine reads
          _mm_prefetch(reinterpret_cast<const char*>(w.codes + (n + 2 * NR) * row + (c * NR + r) * 64), _MM_HINT_T1);
          const __m512i codes = _mm512_maskz_loadu_epi8(mask, p);
          __m512 sum;
          if constexpr (!Chunk::SPLIT) {
            const __m512i low = BITS == 4 ? _mm512_and_si512(codes, nibble) : codes;
            __m512i acc = _mm512_setzero_si512();
            for (int i = 0; i < SLICES; ++i) {
              // the start belongs to the finished sum: it joins at the last slice
              if (i > 0) acc = _mm512_slli_epi32(acc, 8);
              if (i == SLICES - 1) acc = _mm512_add_epi32(acc, _mm512_loadu_si512(x[c].start[0]));
              acc = _mm512_dpbusd_epi32(acc, low, _mm512_loadu_si512(x[c].slice[i]));
              if constexpr (BITS == 4) {
                const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble);
                acc = _mm512_dpbusd_epi32(acc, high, _mm512_loadu_si512(x[c].slice[i] + 64));
              }
            }
            sum = _mm512_cvtepi32_ps(acc);
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

// body with BITS and SLICES of a weight and a number of slices.
#define TW_FOR_SLICES(bits, slices, ...)                                                               \
  {                                                                                                    \
    const auto with_slices = [&]<int BITS>() {                                                         \
      if (slices == 1) { constexpr int SLICES = 1; __VA_ARGS__; }                                      \
      else if (slices == 2) { constexpr int SLICES = 2; __VA_ARGS__; }                                 \
      else { constexpr int SLICES = 3; __VA_ARGS__; }                                                  \
    };                                                                                                 \
    if (bits == 4) with_slices.template operator()<4>();                                               \
    else with_slices.template operator()<8>();                                                         \
  }

int64_t quant_fixed_bytes(const QuantWeight& w, int slices) {
  int64_t bytes = 0;
#if defined(__AVX512VNNI__)
  TW_FOR_SLICES(w.bits, slices, {
    using Chunk = FixedChunk<BITS, SLICES>;
    bytes = (w.K + Chunk::SPAN - 1) / Chunk::SPAN * int64_t(sizeof(Chunk));
  })
#endif
  return bytes;
}

bool quant_prepare_fixed(const QuantWeight& w, const void* x, DType dtype, int slices,
                         uint8_t* fixed, float* sums) {
#if defined(__AVX512VNNI__)
  bool fits = false;
  TW_FOR_DTYPE(dtype, T, {
    const T* row = static_cast<const T*>(x);
    TW_FOR_SLICES(w.bits, slices, fits = prepare_fixed<BITS, SLICES>(w, row, fixed, sums))
  })
  return fits;
#else
  return false;
#endif
}

void quant_gemv_fixed(const QuantWeight& w, const QuantActivations& a, int slices, const void* bias,
                      void* y, int64_t y_stride, DType dtype, int64_t begin, int64_t end) {
#if defined(__AVX512VNNI__)
  GemvFixed run = nullptr;
  TW_FOR_SLICES(w.bits, slices, run = gemv_fixed_for<BITS, SLICES>(w))
  run(w, a, bias, y, y_stride, dtype, begin, end);
#endif
}

}  // namespace tilewright::cpu::TW_ISA
