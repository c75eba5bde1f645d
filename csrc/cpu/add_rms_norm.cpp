#include "add_rms_norm.h"

#include "rms_norm_row.h"

namespace tilewright::cpu::TW_ISA {

template <class T>
static void fwd(const Rows& x_rows, const Rows& residual_rows, const float* scale, T* y, T* h_out,
                float* rstd, int64_t n, float eps, bool past_caches, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = row_of<T>(x_rows, i);
    const T* residual = row_of<T>(residual_rows, i);
    T* h = h_out + i * n;
    // the norm is of h as stored, so that it agrees with rms_norm(h)
    const double squares = row_sum(
        n,
        [&](int64_t j, Vec sum) {
          store(h + j, load(x + j) + load(residual + j));
          const Vec v = load(h + j);
          return fma(v, v, sum);
        },
        [&](int64_t j, int rest, Vec sum) {
          store_n(h + j, load_n(x + j, rest) + load_n(residual + j, rest), rest);
          const Vec v = load_n(h + j, rest);
          return fma(v, v, sum);
        });
    rstd[i] = rstd_of(squares, n, eps);
    scale_row(static_cast<const T*>(h), scale, y + i * n, rstd[i], n, past_caches);
  }
  if (past_caches) end_streams();
}

void add_rms_norm_fwd(Rows x, Rows residual, const float* scale, void* y, void* h, float* rstd,
                      DType dtype, int64_t n, float eps, bool past_caches, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(dtype, T,
               fwd(x, residual, scale, static_cast<T*>(y), static_cast<T*>(h), rstd, n, eps,
                   past_caches, begin, end))
}

}  // namespace tilewright::cpu::TW_ISA
