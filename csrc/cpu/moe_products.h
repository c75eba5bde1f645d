// The products of an expert's rows with its weight, MOE_ROWS rows by MOE_COLUMNS columns at a time.
//
// Few rows are multiplied as they lie, for then reading the weight is all the time; so are those of a type whose pairs
// the processor multiplies.  Of more rows the weight is widened once for all of them, and the lanes of a vector are
// rows: theirs are turned beforehand, so that one kernel sums along the weight's rows and across them.
#pragma once
#include "moe_experts.h"
#include "simd.h"

namespace tilewright::cpu::TW_ISA {
namespace {

constexpr int64_t FEW = 8;  // rows: less than a vector of them, or little more

#if defined(__AVX512F__)
constexpr int DOT_ROWS = 6, SUM_ROWS = 12;  // of accumulators, by DOT_COLUMNS and NV: 24 of 32 registers
#else
constexpr int DOT_ROWS = 2, SUM_ROWS = 6;  // 8 of 16, and 12
#endif
constexpr int DOT_COLUMNS = 4, NV = 2;
constexpr int64_t DEPTH = 64;  // of what is summed, widened at a time, and added up in one chain
constexpr int64_t MOE_ACROSS = 4 * MOE_COLUMNS;  // columns that lie across, at a time: lines of memory side by side

// STEP numbers of a row, and a sum of their products.
template <class T> struct Lanes {
  static constexpr int STEP = W;
  Vec v;
  static TW_INLINE Lanes of(const T* p) { return {load(p)}; }
  static TW_INLINE Lanes some(const T* p, int n) { return {load_tail(p, n)}; }
  static TW_INLINE Vec dot(Lanes a, Lanes b, Vec sum) { return fma(a.v, b.v, sum); }
};
#if defined(__AVX512BF16__)
template <> struct Lanes<bf16> {  // pairs
  static constexpr int STEP = 2 * W;
  __m512i v;
  static TW_INLINE Lanes of(const bf16* p) { return {_mm512_loadu_si512(p)}; }
  static TW_INLINE Lanes some(const bf16* p, int n) { return {_mm512_maskz_loadu_epi16((1u << n) - 1, p)}; }
  static TW_INLINE Vec dot(Lanes a, Lanes b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
};
#endif

// out[m][n] = <a_m, b_n> over K columns.
template <int M, int N, class T>
void dots(const T* const* a, const T* b, int64_t stride, int64_t K, float (*out)[MOE_COLUMNS]) {
  using L = Lanes<T>;
  Vec sum[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sum[m][n] = set1(0.f);
  const auto step = [&](auto get) {
    L w[N];
    for (int n = 0; n < N; ++n) w[n] = get(b + n * stride);
    for (int m = 0; m < M; ++m) {
      const L x = get(a[m]);
      for (int n = 0; n < N; ++n) sum[m][n] = L::dot(x, w[n], sum[m][n]);
    }
  };
  int64_t k = 0;
  for (; k + L::STEP <= K; k += L::STEP) step([&](const T* p) { return L::of(p + k); });
  if (k < K) step([&](const T* p) { return L::some(p + k, int(K - k)); });
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) out[m][n] = reduce_add(sum[m][n]);
}

// The same of any number of rows and columns up to MOE_ROWS and MOE_COLUMNS: the weight's few rows stay in L1.
template <class T>
void dot_block(const T* const* a, int64_t rows, const T* b, int64_t stride, int64_t columns, int64_t K,
               float (*out)[MOE_COLUMNS]) {
  int64_t n = 0;
  for (; n < columns; n += n + DOT_COLUMNS <= columns ? DOT_COLUMNS : 1) {
    const bool whole = n + DOT_COLUMNS <= columns;
    const T* w = b + n * stride;
    const auto at = reinterpret_cast<float (*)[MOE_COLUMNS]>(&out[0][n]);
    for (int64_t m = 0; m < rows;) {
      if (rows - m >= DOT_ROWS) {
        whole ? dots<DOT_ROWS, DOT_COLUMNS>(a + m, w, stride, K, at + m)
              : dots<DOT_ROWS, 1>(a + m, w, stride, K, at + m);
        m += DOT_ROWS;
      } else {
        whole ? dots<1, DOT_COLUMNS>(a + m, w, stride, K, at + m) : dots<1, 1>(a + m, w, stride, K, at + m);
        ++m;
      }
    }
  }
}

template <class T>
TW_INLINE void widened(const T* from, int64_t n, float* to) {
  int64_t j = 0;
  for (; j + W <= n; j += W) store(to + j, load(from + j));
  for (; j < n; ++j) to[j] = to_float(from[j]);
}

// Whether `rows` rows are multiplied as they lie.
template <class T>
constexpr bool direct(int64_t rows) { return rows <= FEW || Lanes<T>::STEP > W; }

TW_INLINE int64_t lanes_of(int64_t rows) { return (rows + W - 1) / W * W; }

// Asks for n numbers that are read next.
template <class T>
TW_INLINE void ahead(const T* p, int64_t n) {
  for (int64_t j = 0; j < n; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + j, 0, 2);
}

// to [K, MOE_ROWS]: rows of K numbers, row(i) the i-th, and zeros up to whole vectors of rows.
template <class Row>
void turn(Row row, int64_t rows, int64_t K, float* to) {
  constexpr int64_t SOME = 16;
  float tile[MOE_ROWS][SOME] = {};
  const int64_t lanes = lanes_of(rows);
  for (int64_t k0 = 0; k0 < K; k0 += SOME) {
    const int64_t some = K - k0 < SOME ? K - k0 : SOME;
    for (int64_t i = 0; i < rows; ++i) widened(row(i) + k0, some, tile[i]);
    for (int64_t k = 0; k < some; ++k)
      for (int64_t i = 0; i < lanes; ++i) to[(k0 + k) * MOE_ROWS + i] = tile[i][k];
  }
}

// out[m][V * W] = sum over k of left[m * row + k * step] times row k of right; plus what it was, if more.
template <int M, int V>
TW_INLINE void sums(const float* left, int64_t row, int64_t step, int64_t K, const float* right, float* out,
                    bool more) {
  Vec sum[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) sum[m][v] = set1(0.f);
  for (int64_t k = 0; k < K; ++k) {
    Vec x[V];
    for (int v = 0; v < V; ++v) x[v] = load(right + k * MOE_ROWS + v * W);
    for (int m = 0; m < M; ++m) {
      const Vec l = set1(left[m * row + k * step]);
      for (int v = 0; v < V; ++v) sum[m][v] = fma(l, x[v], sum[m][v]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      float* to = out + m * MOE_ROWS + v * W;
      store(to, more ? load(static_cast<const float*>(to)) + sum[m][v] : sum[m][v]);
    }
}

template <int M> struct Count { static constexpr int value = M; };

// The same of any number of rows of left.
template <int V>
void sum_rows(const float* left, int64_t row, int64_t step, int64_t rows, int64_t K, const float* right, float* out,
              bool more) {
  int64_t m = 0;
  const auto with = [&](auto count) {
    constexpr int M = decltype(count)::value;
    for (; m + M <= rows; m += M) sums<M, V>(left + m * row, row, step, K, right, out + m * MOE_ROWS, more);
  };
  with(Count<SUM_ROWS>{});
  with(Count<SUM_ROWS / 3>{});
  with(Count<1>{});
}

// The same of any number of lanes too.
TW_INLINE void sum_tile(const float* left, int64_t row, int64_t step, int64_t rows, int64_t K, const float* right,
                        int64_t lanes, float (*out)[MOE_ROWS], bool more) {
  for (int64_t at = 0; at < lanes;) {
    const bool wide = lanes - at > W;
    (wide ? sum_rows<NV> : sum_rows<1>)(left, row, step, rows, K, right + at, out[0] + at, more);
    at += wide ? NV * W : W;
  }
}

// out [columns, rows] = columns of w [columns, K] with rows turned [K, MOE_ROWS].  As many rows of w are read at a time
// as the kernel takes: each is a stream from memory.
template <class T>
void products_along(const float* turned, int64_t rows, int64_t K, const T* w, int64_t stride, int64_t columns,
                    float (*out)[MOE_ROWS]) {
  float wide[SUM_ROWS * DEPTH];
  for (int64_t n = 0; n < columns; n += SUM_ROWS) {
    const int64_t many = columns - n < SUM_ROWS ? columns - n : SUM_ROWS;
    for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += DEPTH) {  // sums of nothing are 0
      const int64_t some = K - k0 < DEPTH ? K - k0 : DEPTH;
      for (int64_t i = 0; i < many; ++i) {
        const T* row = w + (n + i) * stride + k0;
        widened(row, some, wide + i * DEPTH);
        if (k0 + DEPTH < K) ahead(row + DEPTH, DEPTH);
        else if (n + SUM_ROWS + i < columns) ahead(row - k0 + SUM_ROWS * stride, DEPTH);
      }
      sum_tile(wide, DEPTH, 1, many, some, turned + k0 * MOE_ROWS, lanes_of(rows), out + n, k0 > 0);
    }
  }
}

// The same of w [K, columns], up to MOE_ACROSS columns.
template <class T>
void products_across(const float* turned, int64_t rows, int64_t K, const T* w, int64_t stride, int64_t columns,
                     float (*out)[MOE_ROWS]) {
  float wide[DEPTH * MOE_ACROSS];
  for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += DEPTH) {
    const int64_t some = K - k0 < DEPTH ? K - k0 : DEPTH;
    for (int64_t k = 0; k < some; ++k) {
      const T* row = w + (k0 + k) * stride;
      widened(row, columns, wide + k * MOE_ACROSS);
      if (k0 + k + DEPTH < K) ahead(row + DEPTH * stride, columns);
    }
    sum_tile(wide, 1, MOE_ACROSS, columns, some, turned + k0 * MOE_ROWS, lanes_of(rows), out, k0 > 0);
  }
}

// out [rows, n] of columns [N, MOE_ROWS] as they are summed, n of them.
TW_INLINE void turn_back(const float (*columns)[MOE_ROWS], int64_t rows, int64_t n, float (*out)[MOE_COLUMNS]) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; ++j) out[i][j] = columns[j][i];
}

}  // namespace
}  // namespace tilewright::cpu::TW_ISA
