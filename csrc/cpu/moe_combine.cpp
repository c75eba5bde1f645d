#include "moe_combine.h"

#include "rms_norm_row.h"

namespace tilewright::cpu::TW_ISA {
namespace {

// N vectors of a token's columns from j, the last of them of `count` numbers.
template <int N, class T>
TW_INLINE void sum_slots(const Rows& y, const float* w, const int64_t* rows, int64_t k, int64_t j, int count, T* out) {
  Vec sum[N];
  for (int n = 0; n < N; ++n) sum[n] = set1(0.f);
  for (int64_t i = 0; i < k; ++i) {
    if (rows[i] < 0) continue;
    const T* row = row_of<T>(y, rows[i]) + j;
    const Vec weight = set1(w[i]);
    for (int n = 0; n < N; ++n) {
      const Vec x = n + 1 < N || count == W ? load(row + n * W) : load_n(row + n * W, count);
      sum[n] = fma(weight, x, sum[n]);
    }
  }
  for (int n = 0; n < N; ++n) {
    if (n + 1 < N || count == W) store(out + j + n * W, sum[n]);
    else store_n(out + j + n * W, sum[n], count);
  }
}

}  // namespace

void moe_combine_fwd(Rows y, const float* weights, const int64_t* rows, void* out, DType dtype, int64_t k, int64_t d,
                     int64_t begin, int64_t end) {
  TW_FOR_DTYPE(dtype, T, {
    for (int64_t t = begin; t < end; ++t) {
      const float* w = weights + t * k;
      T* to = static_cast<T*>(out) + t * d;
      int64_t j = 0;
      for (; j + 8 * W <= d; j += 8 * W) sum_slots<8>(y, w, rows + t * k, k, j, W, to);
      for (; j < d; j += W) sum_slots<1>(y, w, rows + t * k, k, j, int(d - j < W ? d - j : W), to);
    }
  })
}

void moe_combine_bwd(Rows dout, Rows y, const float* weights, const int64_t* order, void* dy, float* dweights,
                     DType dtype, int64_t k, int64_t d, int64_t here, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(dtype, T, {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t slot = order[r];
      T* to = static_cast<T*>(dy) + r * d;
      if (r >= here) {
        dweights[slot] = 0.f;
        __builtin_memset(to, 0, size_t(d) * sizeof(T));
        continue;
      }
      const T *g = row_of<T>(dout, slot / k), *x = row_of<T>(y, r);
      const Vec w = set1(weights[slot]);
      dweights[slot] = float(row_sum(
          d,
          [&](int64_t j, Vec sum) {
            const Vec dj = load(g + j);
            store(to + j, w * dj);
            return fma(dj, load(x + j), sum);
          },
          [&](int64_t j, int count, Vec sum) {
            const Vec dj = load_n(g + j, count);
            store_n(to + j, w * dj, count);
            return fma(dj, load_n(x + j, count), sum);
          }));
    }
  })
}

}  // namespace tilewright::cpu::TW_ISA
