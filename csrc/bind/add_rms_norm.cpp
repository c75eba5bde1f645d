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
  const bool past_caches = y.nbytes() >= PAST_CACHES;
  const auto f = TW_PICK(add_rms_norm_fwd);
  at::parallel_for(0, m, row_grain(n), [&](int64_t begin, int64_t end) {
    f(x_rows.rows, residual_rows.rows, scale_data, y_data, h_data, rstd_data, dtype, n, float(eps),
      past_caches, begin, end);
  });
  return {std::move(y), std::move(h), std::move(rstd)};
}

static std::tuple<at::Tensor, at::Tensor> add_rms_norm_bwd(
    const at::Tensor& dy, const at::Tensor& dresidual, const at::Tensor& h,
    const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    bool weight_grad) {
  return rms_norm_bwd_rows("add_rms_norm", dy, dresidual, h, weight, rstd, offset, weight_grad);
}

static std::tuple<at::Tensor, at::Tensor, at::Tensor> call_fwd(
    const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& weight,
    double eps, double offset) {
  static const auto op = operator_of("add_rms_norm_fwd", &add_rms_norm_fwd);
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, residual, weight, eps, offset);
}

struct AddRMSNorm : torch::autograd::Function<AddRMSNorm> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x,
                               const at::Tensor& residual, const std::optional<at::Tensor>& weight,
                               double eps, double offset) {
    auto [y, h, rstd] = call_fwd(x, residual, weight, eps, offset);
    ctx->save_for_backward({h, weight.value_or(at::Tensor()), rstd});
    ctx->saved_data["offset"] = offset;
    return {y, h};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& douts) {
    static const auto op = operator_of("add_rms_norm_bwd", &add_rms_norm_bwd);
    return once_differentiable(douts, [&]() -> variable_list {
      const variable_list saved = ctx->get_saved_variables();
      const auto weight = defined_or_none(saved[1]);
      const bool weight_grad = weight && ctx->needs_input_grad(2);
      auto [dx, dw] = op.call(douts[0], douts[1], saved[0], weight, saved[2],
                              ctx->saved_data["offset"].toDouble(), weight_grad);
      return {dx, dx, weight_grad ? dw : at::Tensor(), at::Tensor(), at::Tensor()};
    });
  }
};

static std::optional<std::tuple<at::Tensor, at::Tensor>> direct(
    pybind11::handle x_object, pybind11::handle residual_object, pybind11::handle weight_object,
    std::optional<double> eps_or_none, double offset) {
  const at::Tensor *x = plain_floats(x_object), *residual = plain_floats(residual_object),
                   *w = plain_floats(weight_object);
  if (x == nullptr || residual == nullptr || residual->sizes() != x->sizes() ||
      residual->scalar_type() != x->scalar_type() || !row_weight_fits(*x, w, weight_object) ||
      !undisturbed())
    return std::nullopt;
  const pybind11::gil_scoped_release unlocked;
  const auto weight = optional_of(w);
  const double eps = eps_or_none.value_or(F32_EPS);
  if (records(*x, *residual, weight)) {
    const variable_list out = AddRMSNorm::apply(*x, *residual, weight, eps, offset);
    return std::tuple(out[0], out[1]);
  }
  auto [y, h, _] = call_fwd(*x, *residual, weight, eps, offset);
  return std::tuple(std::move(y), std::move(h));
}

static const Entry entry([](pybind11::module_& m) { m.def("add_rms_norm", &direct); });

}  // namespace tilewright

TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("add_rms_norm_fwd", &tilewright::add_rms_norm_fwd);
  m.impl("add_rms_norm_bwd", &tilewright::add_rms_norm_bwd);
}
