#include "rms_norm.h"

#include "rms_norm_row.h"

namespace tilewright::cpu::TW_ISA {

void rms_norm_scale(float* scale, const void* weight, DType weight_dtype, float offset, int64_t n) {
  if (weight == nullptr) {
    for (int64_t j = 0; j < n; ++j) scale[j] = 1.f;
    return;
  }
  TW_FOR_DTYPE(weight_dtype, T, {
    const T* w = static_cast<const T*>(weight);
    const Vec o = set1(offset);
    int64_t j = 0;
    for (; j + W <= n; j += W) store(scale + j, load(w + j) + o);
    for (; j < n; ++j) scale[j] = to_float(w[j]) + offset;
  })
}

template <class T>
static void fwd(const Rows& x_rows, const float* scale, T* y, float* rstd, int64_t n, float eps,
                bool past_caches, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = row_of<T>(x_rows, i);
    const double squares = row_sum(
        n,
        [&](int64_t j, Vec sum) {
          const Vec v = load(x + j);
          return fma(v, v, sum);
        },
        [&](int64_t j, int rest, Vec sum) {
          const Vec v = load_n(x + j, rest);
          return fma(v, v, sum);
        });
    rstd[i] = rstd_of(squares, n, eps);
    scale_row(x, scale, y + i * n, rstd[i], n, past_caches);
  }
  if (past_caches) end_streams();
}

void rms_norm_fwd(Rows x, const float* scale, void* y, float* rstd, DType dtype, int64_t n,
                  float eps, bool past_caches, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(dtype, T, fwd(x, scale, static_cast<T*>(y), rstd, n, eps, past_caches, begin, end))
}

// With xhat = x * rstd and g = dy * scale:  dx = rstd * (g - xhat * mean(g * xhat)).
template <class T, bool RESIDUAL, bool DW>
static void bwd(const Rows& dy_rows, const Rows& x_rows, const Rows& residual_rows,
                const float* scale, const float* rstd, T* dx, float* dw, int64_t n,
                bool past_caches, int64_t begin, int64_t end) {
  if (DW)
    for (int64_t j = 0; j < n; ++j) dw[j] = 0.f;
  for (int64_t i = begin; i < end; ++i) {
    const T* x = row_of<T>(x_rows, i);
    const T* dy = row_of<T>(dy_rows, i);
    const T* residual = RESIDUAL ? row_of<T>(residual_rows, i) : nullptr;
    T* out = dx + i * n;
    const bool past = past_caches && streams(out);
    const double dot = row_sum(
        n,
        [&](int64_t j, Vec sum) { return fma(load(dy + j) * load(scale + j), load(x + j), sum); },
        [&](int64_t j, int rest, Vec sum) {
          return fma(load_n(dy + j, rest) * load_n(scale + j, rest), load_n(x + j, rest), sum);
        });
    const Vec r = set1(rstd[i]), mean = set1(-float(dot * rstd[i] / double(n)));
    int64_t j = 0;
    for (; j + W <= n; j += W) {
      const Vec xhat = load(x + j) * r, d = load(dy + j);
      if (DW) store(dw + j, fma(d, xhat, load(dw + j)));
      Vec v = r * fma(xhat, mean, d * load(scale + j));
      if (RESIDUAL) v = v + load(residual + j);
      put(out + j, v, past);
    }
    if (j < n) {
      const int rest = int(n - j);
      const Vec xhat = load_n(x + j, rest) * r, d = load_n(dy + j, rest);
      if (DW) store_n(dw + j, fma(d, xhat, load_n(dw + j, rest)), rest);
      Vec v = r * fma(xhat, mean, d * load_n(scale + j, rest));
      if (RESIDUAL) v = v + load_n(residual + j, rest);
      store_n(out + j, v, rest);
    }
  }
  if (past_caches) end_streams();
}

void rms_norm_bwd(Rows dy, Rows x, Rows dresidual, const float* scale, const float* rstd, void* dx,
                  float* dw_partial, DType dtype, int64_t n, bool past_caches, int64_t begin,
                  int64_t end) {
  TW_FOR_DTYPE(dtype, T, {
    const bool residual = dresidual.p != nullptr, dw = dw_partial != nullptr;
    const auto f = residual ? (dw ? bwd<T, true, true> : bwd<T, true, false>)
                            : (dw ? bwd<T, false, true> : bwd<T, false, false>);
    f(dy, x, dresidual, scale, rstd, static_cast<T*>(dx), dw_partial, n, past_caches, begin, end);
  })
}

void rms_norm_dw(const float* partial, void* dw, DType dtype, int64_t blocks, int64_t n,
                 int64_t begin, int64_t end) {
  TW_FOR_DTYPE(dtype, T, {
    T* out = static_cast<T*>(dw);
    int64_t j = begin;
    for (; j + W <= end; j += W) {
      Vec sum = set1(0.f);
      for (int64_t b = 0; b < blocks; ++b) sum = sum + load(partial + b * n + j);
      store(out + j, sum);
    }
    for (; j < end; ++j) {
      float sum = 0.f;
      for (int64_t b = 0; b < blocks; ++b) sum += partial[b * n + j];
      out[j] = from_float<T>(sum);
    }
  })
}

}  // namespace tilewright::cpu::TW_ISA
