#include "../cpu/add_rms_norm.h"

#include "rms_norm.h"

namespace tilewright {

static std::tuple<at::Tensor, at::Tensor, at::Tensor> add_rms_norm_fwd(
    const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& weight,
    double eps, double offset) {
  check_row_weight("add_rms_norm", x, weight);
  const cpu::DType dtype = dtype_of(x, "add_rms_norm", "x");
  TORCH_CHECK_VALUE(
      residual.sizes() == x.sizes() && residual.scalar_type() == x.scalar_type(),
      "add_rms_norm: residual ", residual.scalar_type(), " ", residual.sizes(), " does not fit x ",
      x.scalar_type(), " ", x.sizes());
  at::Tensor y = at::empty(x.sizes(), x.options()), h = at::empty(x.sizes(), x.options());
  at::Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  const int64_t n = x.size(-1), m = rstd.numel();
  const RowView x_rows(x), residual_rows(residual);
  const Scale scale(weight, offset, n, "add_rms_norm");
  const float* scale_data = scale.data();
  void *y_data = y.mutable_data_ptr(), *h_data = h.mutable_data_ptr();
  float* rstd_data = rstd.mutable_data_ptr<float>();
  const auto f = TW_PICK(add_rms_norm_fwd);
  at::parallel_for(0, m, row_grain(n), [&](int64_t begin, int64_t end) {
    f(x_rows.rows, residual_rows.rows, scale_data, y_data, h_data, rstd_data, dtype, n, float(eps),
      begin, end);
  });
  return {std::move(y), std::move(h), std::move(rstd)};
}

static std::tuple<at::Tensor, at::Tensor> add_rms_norm_bwd(
    const at::Tensor& dy, const at::Tensor& dresidual, const at::Tensor& h,
    const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    bool weight_grad) {
  return rms_norm_bwd_rows("add_rms_norm", dy, dresidual, h, weight, rstd, offset, weight_grad);
}

}  // namespace tilewright

TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("add_rms_norm_fwd", &tilewright::add_rms_norm_fwd);
  m.impl("add_rms_norm_bwd", &tilewright::add_rms_norm_bwd);
}
