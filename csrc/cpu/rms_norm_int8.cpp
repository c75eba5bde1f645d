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
    const double squares = row_sum(
        n,
        [&](int64_t j, Vec sum) {
          const Vec v = load(h + j);
          return fma(v, v, sum);
        },
        [&](int64_t j, int rest, Vec sum) {
          const Vec v = load_n(h + j, rest);
          return fma(v, v, sum);
        });
    const Vec rstd = set1(rstd_of(squares, n, eps));
    scales[i] = store_row(codes + i * n, n, [&](int64_t j, int count) {
      if (count == W) return load(h + j) * rstd * load(scale + j);
      return load_n(h + j, count) * rstd * load_n(scale + j, count);
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
