// What rms_norm and add_rms_norm do with one row, at one instruction-set level.
#pragma once
#include "rms_norm.h"
#include "simd.h"
#include "stream.h"

namespace tilewright::cpu::TW_ISA {

// Columns a float32 accumulator sums before it is emptied into the float64 total: a scalar build
// would otherwise add 131072 squares into one float.
constexpr int64_t CHUNK = 1024;

template <class T>
TW_INLINE const T* row_of(const Rows& rows, int64_t i) {
  const T* p = static_cast<const T*>(rows.p);
  if (rows.inner == 1) return p + i * rows.outer_stride;
  return p + (i / rows.inner) * rows.outer_stride + (i % rows.inner) * rows.inner_stride;
}

// Sum over columns of term(j) for whole vectors and tail(j, count) for the rest.
template <class Term, class Tail>
TW_INLINE double row_sum(int64_t n, Term term, Tail tail) {
  double total = 0;
  for (int64_t chunk = 0; chunk < n; chunk += CHUNK) {
    const int64_t end = chunk + CHUNK < n ? chunk + CHUNK : n;
    // four chains of adds: one would wait for the adder's latency at every step
    Vec a = set1(0.f), b = a, c = a, d = a;
    int64_t j = chunk;
    for (; j + 4 * W <= end; j += 4 * W) {
      a = term(j, a);
      b = term(j + W, b);
      c = term(j + 2 * W, c);
      d = term(j + 3 * W, d);
    }
    for (; j + W <= end; j += W) a = term(j, a);
    if (j < end) b = tail(j, int(end - j), b);
    total += reduce_add((a + b) + (c + d));
  }
  return total;
}

TW_INLINE float rstd_of(double sum_squares, int64_t n, float eps) {
  // float64, once a row: two roundings the whole row would share
  return float(1.0 / __builtin_sqrt(sum_squares / double(n) + double(eps)));
}

template <class T>
TW_INLINE void scale_row(const T* x, const float* scale, T* y, float rstd, int64_t n,
                         bool past_caches) {
  const Vec r = set1(rstd);
  const bool past = past_caches && streams(y);
  int64_t j = 0;
  for (; j + W <= n; j += W) put(y + j, load(x + j) * r * load(scale + j), past);
  if (j < n) {
    const int rest = int(n - j);
    store_n(y + j, load_n(x + j, rest) * r * load_n(scale + j, rest), rest);
  }
}

}  // namespace tilewright::cpu::TW_ISA
