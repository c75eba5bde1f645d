// Attention's forward for few queries, one translation unit per instruction set: flash decoding, split
// over the keys of a cache, whose pages may lie anywhere.  Arithmetic and statistics are float32.
#include "attention_tile.h"

#include "bytes.h"

namespace tilewright::cpu::TW_ISA {
namespace {

constexpr int CHUNK = ATTENTION_CHUNK;
constexpr int64_t AHEAD = 8;  // keys that are fetched before they are met: 8 rows of 512 bytes

TW_INLINE float exp(float x) {
  float lanes[W];
  store(static_cast<float*>(lanes), exp(set1(x)));
  return lanes[0];
}

// Keys j to j + count - 1 of a head, or the first of them that lie one after another.
template <class C> struct Run {
  const C* data;
  int64_t count;
};
template <class C>
TW_INLINE Run<C> run_from(const AttentionArgs& a, const AttentionView& x, int64_t b, int64_t g, int64_t j,
                          int64_t count) {
  if (!a.pages) return {at<C>(x, b, g, j), count};
  const int64_t in_page = j % a.page_size;
  return {at<C>(x, a.pages[b * a.page_row + j / a.page_size], g, in_page), least(count, a.page_size - in_page)};
}

// The sums of four vectors, to four consecutive floats.
TW_INLINE void reduce4(Vec a, Vec b, Vec c, Vec d, float* to) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 x = _mm512_shuffle_ps(ab, cd, 0x44), y = _mm512_shuffle_ps(ab, cd, 0xee);
  const __m512 s = _mm512_add_ps(x, y);
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
#elif defined(__AVX2__)
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#else
  to[0] = a.v, to[1] = b.v, to[2] = c.v, to[3] = d.v;
#endif
}

// scores[r, j] = q[r] . k[j] for RB rows; q is [RB, Dp], zero beyond D.
template <int RB, class C>
void decode_scores(const float* q, int64_t Dp, const C* k, int64_t stride, int64_t count, int64_t D, float* scores) {
  const int64_t whole = D / W * W;
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const C* kj = k + j * stride;
    Vec acc[RB][4];
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[r][i] = set1(0.f);
    for (int64_t d = 0; d < whole; d += W) {
      Vec x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        x[i] = load(kj + i * stride + d);
        __builtin_prefetch(kj + (i + AHEAD) * stride + d);
      }
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r) {
        const Vec y = load(q + r * Dp + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] = mul_add(x[i], y, acc[r][i]);
      }
    }
    if (whole < D)
      for (int i = 0; i < 4; ++i) {
        const Vec x = load_n(kj + i * stride + whole, int(D - whole));
#pragma GCC unroll 4
        for (int r = 0; r < RB; ++r) acc[r][i] = mul_add(x, load(q + r * Dp + whole), acc[r][i]);
      }
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) reduce4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], scores + r * CHUNK + j);
  }
  for (; j < count; ++j)
    for (int r = 0; r < RB; ++r) {
      Vec acc = set1(0.f);
      for (int64_t d = 0; d < whole; d += W) acc = mul_add(load(k + j * stride + d), load(q + r * Dp + d), acc);
      if (whole < D)
        acc = mul_add(load_n(k + j * stride + whole, int(D - whole)), load(q + r * Dp + whole), acc);
      scores[r * CHUNK + j] = reduce_add(acc);
    }
}

// out[r, d..] += sum_j p[r, j] v[j, d..] for RB rows and N vectors of columns.
template <int RB, int N, class C>
TW_INLINE void decode_columns(const float* p, const C* v, int64_t stride, int64_t count, float* out, int64_t Dp) {
  Vec acc[RB][N];
#pragma GCC unroll 4
  for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = load(out + r * Dp + n * W);
  for (int64_t j = 0; j < count; ++j) {
    Vec x[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      x[n] = load(v + j * stride + n * W);
      __builtin_prefetch(v + (j + AHEAD) * stride + n * W);
    }
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) {
      const Vec w = set1(p[r * CHUNK + j]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = fma(w, x[n], acc[r][n]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(out + r * Dp + n * W, acc[r][n]);
}

template <int RB, class C>
void decode_values(const float* p, const C* v, int64_t stride, int64_t count, int64_t D, float* out, int64_t Dp) {
#if defined(__AVX512F__)
  constexpr int N = 4;
#else
  constexpr int N = 2;  // 16 registers
#endif
  int64_t d = 0;
  for (; d + N * W <= D; d += N * W) decode_columns<RB, N>(p, v + d, stride, count, out + d, Dp);
  for (; d + W <= D; d += W) decode_columns<RB, 1>(p, v + d, stride, count, out + d, Dp);
  if (d == D) return;
  Vec acc[RB];
  for (int r = 0; r < RB; ++r) acc[r] = load(out + r * Dp + d);
  for (int64_t j = 0; j < count; ++j) {
    const Vec x = load_n(v + j * stride + d, int(D - d));
    for (int r = 0; r < RB; ++r) acc[r] = fma(set1(p[r * CHUNK + j]), x, acc[r]);
  }
  for (int r = 0; r < RB; ++r) store(out + r * Dp + d, acc[r]);
}

template <class T> TW_INLINE void store_row(const float* from, T* to, int64_t D, float factor) {
  int64_t d = 0;
  for (; d + W <= D; d += W) store(to + d, load(from + d) * set1(factor));
  for (; d < D; ++d) to[d] = from_float<T>(from[d] * factor);
}

// Of RB rows from `row` on, the part that the keys of chunk c have.
template <int RB, class C>
void decode_rows(const AttentionArgs& a, int64_t b, int64_t g, int64_t c, int64_t row, float* q, float* scores) {
  const int64_t R = a.group(), D = a.D, Dp = a.padded(), j0 = a.earliest + c * CHUNK;
  int64_t first = a.T, last = 0;
  for (int r = 0; r < RB; ++r) {
    first = least(first, a.from(b, (row + r) / R));
    last = most(last, a.to(b, (row + r) / R));
  }
  // keys first - j0 .. count - 1 of the chunk; what none of the rows sees is not read
  const int64_t begin = most(0, first - j0), count = most(begin, least(last - j0, CHUNK));
  const int64_t vectors = least((count + W - 1) / W * W, CHUNK);
  for (int r = 0; r < RB; ++r) {
    const int64_t h = g * R + (row + r) % R, i = (row + r) / R;
    TW_FOR_DTYPE(a.dtype, T, convert(at<T>(a.q, b, h, i), q + r * Dp, D));
    for (int64_t d = D; d < Dp; ++d) q[r * Dp + d] = 0.f;
  }
  for (int64_t j = begin; j < least(count, CHUNK);) {
    const Run<C> k = run_from<C>(a, a.k, b, g, j0 + j, count - j);
    decode_scores<RB>(q, Dp, k.data, a.k.row, k.count, D, scores + j);
    j += k.count;
  }
  const float factor = score_factor(a) * a.key_scale(g);
  float m[RB], l[RB];
  for (int r = 0; r < RB; ++r) {
    float* s = scores + r * CHUNK;
    const int64_t i = (row + r) / R;
    for (int64_t j = 0; j < least(begin, vectors); ++j) s[j] = 0.f;
    for (int64_t j = count; j < vectors; ++j) s[j] = 0.f;
    Vec slope;
    for (int64_t j = 0; j < vectors; j += W) {
      const Vec score = load(s + j) * set1(factor);
      store(s + j, a.softcap != 0.f ? tanh(score, slope) * set1(a.softcap) : score);
    }
    for (int64_t j = 0; j < least(a.from(b, i) - j0, vectors); ++j) s[j] = -INF;
    for (int64_t j = most(0, least(a.to(b, i) - j0, count)); j < vectors; ++j) s[j] = -INF;
    const float start = first_score(a, g * R + (row + r) % R);  // its sum is the first chunk's
    Vec top = set1(start), sum = set1(0.f);
    for (int64_t j = 0; j < vectors; j += W) top = max(top, load(s + j));
    m[r] = reduce_max(top);
    for (int64_t j = 0; j < vectors; j += W) {
      const Vec p = exp(load(s + j) - set1(m[r]));
      store(s + j, p);
      sum = sum + p;
    }
    l[r] = reduce_add(sum) + (c == 0 ? first_sum(a) * exp(start - m[r]) : 0.f);
  }
  clear(q, RB * Dp);  // it is done with: the output's
  for (int64_t j = begin; j < least(count, CHUNK);) {
    const Run<C> v = run_from<C>(a, a.v, b, g, j0 + j, count - j);
    decode_values<RB>(scores + j, v.data, a.v.row, v.count, D, q, Dp);
    j += v.count;
  }
  for (int r = 0; r < RB; ++r) {
    const int64_t h = g * R + (row + r) % R, i = (row + r) / R;
    if (a.chunks() > 1) {
      float* part = a.partial + (((b * a.G + g) * a.chunks() + c) * a.S * R + row + r) * (D + 2);
      part[0] = m[r], part[1] = l[r];
      store_row(q + r * Dp, part + 2, D, 1.f);
    } else {
      const float norm = a.blind(b, i) ? 0.f : a.value_scale(g) / l[r];
      TW_FOR_DTYPE(a.dtype, T, store_row(q + r * Dp, at<T>(a.out, b, h, i), D, norm));
      a.lse[(b * a.H + h) * a.S + i] = lse_of(m[r], l[r]);
    }
  }
}

template <class C> void decode_item(const AttentionArgs& a, int64_t item, float* scratch) {
  const int64_t c = item % a.chunks(), bg = item / a.chunks(), b = bg / a.G, g = bg % a.G;
  const int64_t rows = a.S * a.group();
  float *q = scratch, *scores = scratch + 4 * a.padded();
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) decode_rows<4, C>(a, b, g, c, row, q, scores);
  if (rows - row == 3) decode_rows<3, C>(a, b, g, c, row, q, scores);
  if (rows - row == 2) decode_rows<2, C>(a, b, g, c, row, q, scores);
  if (rows - row == 1) decode_rows<1, C>(a, b, g, c, row, q, scores);
}

// One row's chunks, in order.
template <class T> void combine_row(const AttentionArgs& a, int64_t item) {
  const int64_t R = a.group(), D = a.D, rows = a.S * R, row = item % rows, bg = item / rows;
  const int64_t b = bg / a.G, g = bg % a.G, h = g * R + row % R, i = row / R, n = a.chunks();
  const int64_t step = rows * (D + 2);
  float* first = a.partial + (bg * n * rows + row) * (D + 2);
  float top = LOWEST, sum = 0.f;
  for (int64_t c = 0; c < n; ++c)
    if (first[c * step] > top) top = first[c * step];
  for (int64_t c = 0; c < n; ++c) {
    const float* part = first + c * step;
    const float weight = exp(part[0] - top);
    sum += part[1] * weight;
    if (c == 0) store_row(part + 2, first + 2, D, weight);
    if (c > 0) {
      int64_t d = 2;
      for (; d + W <= D + 2; d += W)
        store(first + d, fma(load(part + d), set1(weight), load(first + d)));
      for (; d < D + 2; ++d) first[d] += part[d] * weight;
    }
  }
  store_row(first + 2, at<T>(a.out, b, h, i), D, a.blind(b, i) ? 0.f : a.value_scale(g) / sum);
  a.lse[(b * a.H + h) * a.S + i] = lse_of(top, sum);
}

template <class C> void decode_items(const AttentionArgs& a, float* scratch, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) decode_item<C>(a, i, scratch);
}

}  // namespace

void attention_decode(const AttentionArgs& a, float* scratch, int64_t begin, int64_t end) {
  switch (a.cache) {
    case Cache::F32: return decode_items<float>(a, scratch, begin, end);
    case Cache::BF16: return decode_items<bf16>(a, scratch, begin, end);
    case Cache::F16: return decode_items<f16>(a, scratch, begin, end);
    case Cache::I8: return decode_items<int8_t>(a, scratch, begin, end);
    case Cache::E4M3: return decode_items<e4m3>(a, scratch, begin, end);
  }
}

void attention_combine(const AttentionArgs& a, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(a.dtype, T, for (int64_t i = begin; i < end; ++i) combine_row<T>(a, i));
}

}  // namespace tilewright::cpu::TW_ISA
