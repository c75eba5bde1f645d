#include "rms_norm_int8.h"

#include "int8_row.h"
#include "rms_norm_row.h"

namespace tilewright::cpu::TW_ISA {

template <class T, bool RESIDUAL>
static void fwd(const Rows& x_rows, const Rows& residual_rows, const float* scale, int8_t* codes,
                float* scales, T* h_out, int64_t n, float eps, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = row_of<T>(x_rows, i);
    const T* h = x;
    if constexpr (RESIDUAL) {
      const T* residual = row_of<T>(residual_rows, i);
      T* to = h_out + i * n;
      int64_t j = 0;
      for (; j + W <= n; j += W) store(to + j, load(x + j) + load(residual + j));
      if (j < n) {
        const int rest = int(n - j);
        store_n(to + j, load_n(x + j, rest) + load_n(residual + j, rest), rest);
      }
      h = to;
    }
    // the largest |h scale|, as the row is summed: rstd is positive
    Vec largest = set1(0.f), zero = set1(0.f);
    const auto see = [&](Vec v, Vec s) {
      const Vec scaled = v * s;
      largest = max(largest, size_of(scaled));
      zero = fma(scaled, set1(0.f), zero);
    };
    const double squares = row_sum(
        n,
        [&](int64_t j, Vec sum) {
          const Vec v = load(h + j);
          see(v, load(scale + j));
          return fma(v, v, sum);
        },
        [&](int64_t j, int rest, Vec sum) {
          const Vec v = load_n(h + j, rest);
          see(v, load_n(scale + j, rest));
          return fma(v, v, sum);
        });
    const float rstd = rstd_of(squares, n, eps);
    const RowScale s = row_scale(reduce_max(largest) * rstd, reduce_add(zero));
    scales[i] = s.scale;
    const Vec r = set1(rstd);
    store_row(codes + i * n, n, s, [&](int64_t j, int count) {
      if (count == W) return load(h + j) * r * load(scale + j);
      return load_n(h + j, count) * r * load_n(scale + j, count);
    });
  }
}

void rms_norm_int8(Rows x, Rows residual, const float* scale, int8_t* codes, float* scales, void* h,
                   DType dtype, int64_t n, float eps, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(dtype, T, {
    const auto run = residual.p ? fwd<T, true> : fwd<T, false>;
    run(x, residual, scale, codes, scales, static_cast<T*>(h), n, eps, begin, end);
  })
}

}  // namespace tilewright::cpu::TW_ISA
