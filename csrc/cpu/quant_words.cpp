// A few rows of 16-bit floats in integers where the CPU has no VNNI: x as fixed-point numbers of 16 bits, which share
// a scale in each block of 32, and products of pairs of them with codes summed in 32 bits.  quant_linear.h says what
// that keeps of x; a code costs a third of the instructions that it does in float32.
#include "quant_codes.h"

namespace tilewright::cpu::TW_ISA {

#if defined(__AVX2__) && !defined(__AVX512F__)
namespace {

// A chunk of a prepared row.  4 bits, 64 k: word l of x[i] is k = 4 l + i, as shifts leave codes in 16 lanes; lane l of
// a sum is of k = 8 l on.  8 bits, 32 k: words lie along k; lane l is of k = 2 l, 2 l + 1 and those 16 further on.
template <int BITS> struct WordChunk {
  static constexpr int SPAN = BITS == 4 ? 64 : 32;
  int16_t x[SPAN / 16][16];
  int32_t start[8];  // -centre times the lane's sum of x
  float scale[8];    // of the block of 32 that each lane lies in
};

constexpr float MOST = 32766.f;  // less one than the largest, as x * inverse is rounded

TW_INLINE __m256 magnitude(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), v); }

template <int BITS, class T>
bool prepare_words(const QuantWeight& w, const T* x, uint8_t* to, float* sums) {
  using Chunk = WordChunk<BITS>;
  constexpr int BLOCKS = Chunk::SPAN / 32;
  Chunk* chunks = reinterpret_cast<Chunk*>(to);
  const int64_t blocks = w.K / 32, group_blocks = blocks / w.G;
  const int centre = w.centre();
  Vec group_sum = set1(0.f);
  for (int64_t b = 0; b < blocks; ++b) {
    Chunk& chunk = chunks[b / BLOCKS];
    const int at = int(b % BLOCKS);
    Vec v[4], top = set1(0.f);
    for (int i = 0; i < 4; ++i) {
      v[i] = load(x + b * 32 + 8 * i);
      top = max(top, Vec{magnitude(v[i].v)});
      group_sum = group_sum + v[i];
    }
    const Vec all = (v[0] + v[1]) + (v[2] + v[3]);
    const float zero = reduce_add(all * set1(0.f));  // nan where one number is not finite, which max can lose
    const float largest = reduce_max(top);
    // beyond these a scale, its inverse or its product with a weight's would leave the normal range
    if (zero != 0.f || !(largest == 0.f || (largest > 0x1p-90f && largest < 0x1p120f))) return false;
    // an inverse of 12 significant bits makes 1 / (1 / inverse) as good as exact: no error common to the block
    const float inverse = largest > 0 ? float_of(bits_of(MOST / largest) & 0xfffff000u) : 0.f;
    const float scale = largest > 0 ? 1.f / inverse : 0.f;
    alignas(32) int32_t words[32];
    for (int i = 0; i < 4; ++i)
      _mm256_store_si256(reinterpret_cast<__m256i*>(words + 8 * i),
                         _mm256_cvtps_epi32(_mm256_mul_ps(v[i].v, _mm256_set1_ps(inverse))));
    if constexpr (BITS == 4) {
      for (int j = 0; j < 32; ++j) chunk.x[j % 4][at * 8 + j / 4] = int16_t(words[j]);
      for (int l = 0; l < 4; ++l) {
        int32_t sum = 0;
        for (int j = 0; j < 8; ++j) sum += words[8 * l + j];
        chunk.start[at * 4 + l] = -centre * sum;
        chunk.scale[at * 4 + l] = scale;
      }
    } else {
      for (int j = 0; j < 32; ++j) chunk.x[j / 16][j % 16] = int16_t(words[j]);
      for (int l = 0; l < 8; ++l) {
        chunk.start[l] = -centre * (words[2 * l] + words[2 * l + 1] + words[16 + 2 * l] + words[17 + 2 * l]);
        chunk.scale[l] = scale;
      }
    }
    if ((b + 1) % group_blocks == 0) {
      sums[b / group_blocks] = reduce_add(group_sum);
      group_sum = set1(0.f);
    }
  }
  if (blocks % BLOCKS)  // the rest of the last chunk adds nothing
    for (int l = 4; l < 8; ++l) chunks[blocks / BLOCKS].scale[l] = 0.f;
  return true;
}

TW_INLINE __m256i words_at(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// A chunk's sums with codes in 16 lanes each, times x's scales, added to `part`.
template <int COUNT, class Chunk>
TW_INLINE __m256 add_chunk(const __m256i* codes, const Chunk& x, __m256 part) {
  __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.start));
  for (int i = 0; i < COUNT; ++i) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(codes[i], words_at(x.x[i])));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(x.scale), part);
}

// The codes of a chunk whose first byte is p, of `bytes` that are there.
template <int BITS>
TW_INLINE void unpack(const uint8_t* p, bool whole, __m256i* codes) {
  if constexpr (BITS == 4) {
    const __m256i mask = _mm256_set1_epi16(15);
    const __m256i v = whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                            : _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    codes[0] = _mm256_and_si256(v, mask);
    codes[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
    codes[2] = _mm256_and_si256(_mm256_srli_epi16(v, 8), mask);
    codes[3] = _mm256_srli_epi16(v, 12);
  } else {
    codes[0] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    codes[1] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)));
  }
}

// MR rows of x against row n of the weight.
template <int BITS, int MR>
TW_INLINE void dot_words(const QuantWeight& w, const WordChunk<BITS>* x, int64_t x_stride, const float* scale,
                         int64_t n, float* out) {
  using Chunk = WordChunk<BITS>;
  constexpr int COUNT = Chunk::SPAN / 16, BYTES = Chunk::SPAN * BITS / 8;
  const int64_t row = w.K * BITS / 8, group = w.K / w.G, count = (w.K + Chunk::SPAN - 1) / Chunk::SPAN;
  const uint8_t* p = w.codes + n * row;
  __m256 total[MR];
  __m256i codes[COUNT];
  for (int m = 0; m < MR; ++m) total[m] = _mm256_setzero_ps();
  if (group % Chunk::SPAN == 0) {
    const int64_t each = group / Chunk::SPAN;
    for (int64_t g = 0, c = 0; g < w.G; ++g) {
      __m256 part[MR];
      for (int m = 0; m < MR; ++m) part[m] = _mm256_setzero_ps();
      for (const int64_t stop = c + each; c < stop; ++c) {
        unpack<BITS>(p + c * BYTES, true, codes);
        for (int m = 0; m < MR; ++m) part[m] = add_chunk<COUNT>(codes, x[m * x_stride + c], part[m]);
      }
      const __m256 s = _mm256_set1_ps(scale[g]);
      for (int m = 0; m < MR; ++m) total[m] = _mm256_fmadd_ps(part[m], s, total[m]);
    }
  } else {  // 4 bits: the halves of a chunk may be of two groups
    const int64_t blocks = group / 32;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t second = 2 * c + 1 < w.K / 32 ? (2 * c + 1) / blocks : 0;
      unpack<BITS>(p + c * BYTES, (c + 1) * BYTES <= row, codes);
      const __m256 s = _mm256_setr_m128(_mm_set1_ps(scale[2 * c / blocks]), _mm_set1_ps(scale[second]));
      for (int m = 0; m < MR; ++m)
        total[m] = _mm256_fmadd_ps(add_chunk<COUNT>(codes, x[m * x_stride + c], _mm256_setzero_ps()), s, total[m]);
    }
  }
  for (int m = 0; m < MR; ++m) out[m] = reduce_add(Vec{total[m]});
}

template <int BITS, int MR, class S>
void gemv_rows(const QuantWeight& w, const QuantActivations& a, int64_t m0, const void* bias, void* y, int64_t y_stride,
               DType dtype, int64_t begin, int64_t end) {
  using Chunk = WordChunk<BITS>;
  const int64_t count = (w.K + Chunk::SPAN - 1) / Chunk::SPAN;
  const Chunk* x = reinterpret_cast<const Chunk*>(a.fixed) + m0 * count;
  const bool offsets = w.zeros || w.minima;
  float scale[SCALES], offset[SCALES], out[MR];
  for (int64_t n = begin; n < end; ++n) {
    row_scales<S>(w, n, 0, w.G, float(w.centre()), scale, offset);
    dot_words<BITS, MR>(w, x, count, scale, n, out);
    for (int m = 0; m < MR; ++m) {
      const float* sums = a.sums + (m0 + m) * w.G;
      float more = 0.f;
      if (offsets) {
        Vec sum = set1(0.f);
        int64_t g = 0;
        for (; g + W <= w.G; g += W) sum = fma(load(offset + g), load(sums + g), sum);
        more = reduce_add(sum);
        for (; g < w.G; ++g) more += offset[g] * sums[g];
      }
      finish(out[m] + more, bias, y, dtype, n, (m0 + m) * y_stride + n);
    }
  }
}

template <int BITS, class S>
void gemv_words(const QuantWeight& w, const QuantActivations& a, const void* bias, void* y, int64_t y_stride,
                DType dtype, int64_t begin, int64_t end) {
  int64_t m = 0;
  for (; m + 4 <= a.M; m += 4) gemv_rows<BITS, 4, S>(w, a, m, bias, y, y_stride, dtype, begin, end);
  for (; m + 2 <= a.M; m += 2) gemv_rows<BITS, 2, S>(w, a, m, bias, y, y_stride, dtype, begin, end);
  for (; m < a.M; ++m) gemv_rows<BITS, 1, S>(w, a, m, bias, y, y_stride, dtype, begin, end);
}

}  // namespace
#endif

bool quant_has_words(const QuantWeight& w, DType dtype) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return dtype != DType::F32 && w.K / w.G % 32 == 0 && w.G <= GEMV_GROUPS && w.codebook == nullptr;
#else
  return false;
#endif
}

int64_t quant_words_bytes(const QuantWeight& w) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return w.bits == 4 ? (w.K + 63) / 64 * int64_t(sizeof(WordChunk<4>)) : w.K / 32 * int64_t(sizeof(WordChunk<8>));
#else
  return 0;
#endif
}

bool quant_prepare_words(const QuantWeight& w, const void* x, DType dtype, uint8_t* words, float* sums) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  bool fits = false;
  TW_FOR_DTYPE(dtype, T, {
    const auto prepare = w.bits == 4 ? prepare_words<4, T> : prepare_words<8, T>;
    fits = prepare(w, static_cast<const T*>(x), words, sums);
  })
  return fits;
#else
  return false;
#endif
}

void quant_gemv_words(const QuantWeight& w, const QuantActivations& a, const void* bias, void* y, int64_t y_stride,
                      DType dtype, int64_t begin, int64_t end) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  TW_FOR_DTYPE(w.scale_dtype, S, {
    const auto run = w.bits == 4 ? gemv_words<4, S> : gemv_words<8, S>;
    run(w, a, bias, y, y_stride, dtype, begin, end);
  })
#endif
}

}  // namespace tilewright::cpu::TW_ISA
