#include "../cpu/rms_norm_int8.h"

#include "rms_norm.h"

namespace tilewright {

static std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm_int8(
    const at::Tensor& x, const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& weight, double eps, double offset) {
  check_row_weight("rms_norm_int8", x, weight);
  const cpu::DType dtype = dtype_of(x, "rms_norm_int8", "x");
  if (residual)
    TORCH_CHECK_VALUE(
        residual->sizes() == x.sizes() && residual->scalar_type() == x.scalar_type(),
        "rms_norm_int8: residual ", residual->scalar_type(), " ", residual->sizes(),
        " does not fit x ", x.scalar_type(), " ", x.sizes());
  at::Tensor codes = at::empty(x.sizes(), x.options().dtype(at::kChar));
  at::Tensor scales = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  at::Tensor h = residual ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  const int64_t n = x.size(-1), m = scales.numel();
  const RowView rows(x);
  const std::optional<RowView> theirs =
      residual ? std::optional<RowView>(*residual) : std::nullopt;
  const cpu::Rows residual_rows = theirs ? theirs->rows : cpu::Rows{nullptr, 1, 0, 0};
  const Scale scale(weight, offset, n, "rms_norm_int8");
  const float* scale_data = scale.data();
  int8_t* c = codes.mutable_data_ptr<int8_t>();
  float* s = scales.mutable_data_ptr<float>();
  void* h_data = h.mutable_data_ptr();
  const auto f = TW_PICK(rms_norm_int8);
  at::parallel_for(0, m, row_grain(n), [&](int64_t begin, int64_t end) {
    f(rows.rows, residual_rows, scale_data, c, s, h_data, dtype, n, float(eps), begin, end);
  });
  return {std::move(codes), std::move(scales), std::move(h)};
}

}  // namespace tilewright

TORCH_LIBRARY_IMPL(tilewright, CPU, m) { m.impl("rms_norm_int8", &tilewright::rms_norm_int8); }
