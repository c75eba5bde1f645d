#include "rms_norm.h"

#include <vector>

namespace tilewright {

static bool fits_rows(const at::Tensor& t, cpu::Rows& rows) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t last = t.dim() - 1;
  if (sizes[last] > 1 && strides[last] != 1) return false;
  // the leading dimensions, innermost first, merged into at most two
  int64_t size[2] = {1, 1}, stride[2] = {0, 0};
  int count = 0;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (count > 0 && strides[d] == stride[count - 1] * size[count - 1]) {
      size[count - 1] *= sizes[d];
    } else if (count == 2) {
      return false;
    } else {
      size[count] = sizes[d];
      stride[count++] = strides[d];
    }
  }
  rows = count == 2 ? cpu::Rows{t.const_data_ptr(), size[0], stride[1], stride[0]}
                    : cpu::Rows{t.const_data_ptr(), 1, stride[0], 0};
  return true;
}

RowView::RowView(const at::Tensor& t) {
  if (t.numel() == 0) {
    rows = {t.const_data_ptr(), 1, 0, 0};
  } else if (!fits_rows(t, rows)) {
    held = t.contiguous();
    fits_rows(held, rows);
  }
}

Scale::Scale(const std::optional<at::Tensor>& weight, double offset, int64_t n, const char* op) {
  if (weight.has_value()) held_ = weight->is_contiguous() ? *weight : weight->contiguous();
  const cpu::DType dtype = held_.defined() ? dtype_of(held_, op, "weight") : cpu::DType::F32;
  if (held_.defined() && dtype == cpu::DType::F32 && offset == 0) {
    data_ = held_.const_data_ptr<float>();
    return;
  }
  // kept between calls: a decode step would allocate it hundreds of times
  static thread_local std::vector<float> buffer;
  if (buffer.size() < size_t(n)) buffer.resize(n);
  TW_PICK(rms_norm_scale)(buffer.data(), held_.defined() ? held_.const_data_ptr() : nullptr, dtype,
                          float(offset), n);
  data_ = buffer.data();
}

void check_row_weight(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& weight) {
  TORCH_CHECK_VALUE(x.dim() > 0, op, ": x must have at least one dimension");
  if (weight.has_value())
    TORCH_CHECK_VALUE(weight->dim() == 1 && weight->size(0) == x.size(-1), op, ": weight shape ",
                      weight->sizes(), " does not fit x ", x.sizes());
}

static at::Tensor empty_rstd(const at::Tensor& x) {
  return at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
}

static std::tuple<at::Tensor, at::Tensor> rms_norm_fwd(const at::Tensor& x,
                                                       const std::optional<at::Tensor>& weight,
                                                       double eps, double offset) {
  check_row_weight("rms_norm", x, weight);
  const cpu::DType dtype = dtype_of(x, "rms_norm", "x");
  at::Tensor y = at::empty(x.sizes(), x.options()), rstd = empty_rstd(x);
  const int64_t n = x.size(-1), m = rstd.numel();
  const RowView rows(x);
  const Scale scale(weight, offset, n, "rms_norm");
  const float* scale_data = scale.data();
  void* y_data = y.mutable_data_ptr();
  float* rstd_data = rstd.mutable_data_ptr<float>();
  const bool past_caches = y.nbytes() >= PAST_CACHES;
  const auto f = TW_PICK(rms_norm_fwd);
  at::parallel_for(0, m, row_grain(n), [&](int64_t begin, int64_t end) {
    f(rows.rows, scale_data, y_data, rstd_data, dtype, n, float(eps), past_caches, begin, end);
  });
  return {std::move(y), std::move(rstd)};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_bwd_rows(
    const char* op, const at::Tensor& dy, const std::optional<at::Tensor>& dresidual,
    const at::Tensor& x, const std::optional<at::Tensor>& weight, const at::Tensor& rstd,
    double offset, bool weight_grad) {
  check_row_weight(op, x, weight);
  const cpu::DType dtype = dtype_of(x, op, "x");
  TORCH_CHECK_VALUE(dy.sizes() == x.sizes() && dy.scalar_type() == x.scalar_type(), op, ": dy ",
                    dy.scalar_type(), " ", dy.sizes(), " does not fit x ", x.scalar_type(), " ",
                    x.sizes());
  if (dresidual.has_value())
    TORCH_CHECK_VALUE(
        dresidual->sizes() == x.sizes() && dresidual->scalar_type() == x.scalar_type(), op,
        ": dresidual ", dresidual->scalar_type(), " ", dresidual->sizes(), " does not fit x ",
        x.scalar_type(), " ", x.sizes());
  const int64_t n = x.size(-1), m = rstd.numel();
  TORCH_CHECK_VALUE(rstd.scalar_type() == at::kFloat && rstd.is_contiguous() && m * n == x.numel(),
                    op, ": rstd ", rstd.sizes(), " does not fit x ", x.sizes());

  const bool has_dw = weight_grad && weight.has_value();
  at::Tensor dx = at::empty(x.sizes(), x.options());
  at::Tensor dw = has_dw ? at::empty({n}, weight->options()) : at::empty({0}, x.options());
  const RowView dy_rows(dy), x_rows(x);
  const std::optional<RowView> residual =
      dresidual.has_value() ? std::optional<RowView>(*dresidual) : std::nullopt;
  const cpu::Rows residual_rows = residual ? residual->rows : cpu::Rows{nullptr, 1, 0, 0};
  const Scale scale(weight, offset, n, op);
  const float* scale_data = scale.data();
  const float* rstd_data = rstd.const_data_ptr<float>();
  void* dx_data = dx.mutable_data_ptr();
  const bool past_caches = dx.nbytes() >= PAST_CACHES;
  const auto f = TW_PICK(rms_norm_bwd);

  if (!has_dw) {
    at::parallel_for(0, m, row_grain(n), [&](int64_t begin, int64_t end) {
      f(dy_rows.rows, x_rows.rows, residual_rows, scale_data, rstd_data, dx_data, nullptr, dtype, n,
        past_caches, begin, end);
    });
    return {std::move(dx), std::move(dw)};
  }
  // one partial sum a block of rows; the blocks depend on the shape alone, so that dw is the same
  // bit for bit whatever the number of threads
  const int64_t block = std::max(row_grain(n), (m + 63) / 64);
  const int64_t blocks = (m + block - 1) / block;
  const at::Tensor partial = at::empty({blocks, n}, x.options().dtype(at::kFloat));
  float* partial_data = partial.mutable_data_ptr<float>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      f(dy_rows.rows, x_rows.rows, residual_rows, scale_data, rstd_data, dx_data,
        partial_data + b * n, dtype, n, past_caches, b * block, std::min(m, (b + 1) * block));
  });
  const cpu::DType weight_dtype = dtype_of(*weight, op, "weight");
  void* dw_data = dw.mutable_data_ptr();
  const auto sum = TW_PICK(rms_norm_dw);
  at::parallel_for(0, n, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, blocks)),
                   [&](int64_t begin, int64_t end) {
                     sum(partial_data, dw_data, weight_dtype, blocks, n, begin, end);
                   });
  return {std::move(dx), std::move(dw)};
}

static std::tuple<at::Tensor, at::Tensor> rms_norm_bwd(const at::Tensor& dy, const at::Tensor& x,
                                                       const std::optional<at::Tensor>& weight,
                                                       const at::Tensor& rstd, double offset,
                                                       bool weight_grad) {
  return rms_norm_bwd_rows("rms_norm", dy, std::nullopt, x, weight, rstd, offset, weight_grad);
}

static std::tuple<at::Tensor, at::Tensor> call_fwd(const at::Tensor& x,
                                                   const std::optional<at::Tensor>& weight,
                                                   double eps, double offset) {
  static const auto op = operator_of("rms_norm_fwd", &rms_norm_fwd);
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, weight, eps, offset);
}

struct RMSNorm : torch::autograd::Function<RMSNorm> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x,
                            const std::optional<at::Tensor>& weight, double eps, double offset) {
    auto [y, rstd] = call_fwd(x, weight, eps, offset);
    ctx->save_for_backward({x, weight.value_or(at::Tensor()), rstd});
    ctx->saved_data["offset"] = offset;
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    static const auto op = operator_of("rms_norm_bwd", &rms_norm_bwd);
    return once_differentiable(dy, [&]() -> variable_list {
      const variable_list saved = ctx->get_saved_variables();
      const auto weight = defined_or_none(saved[1]);
      const bool weight_grad = weight && ctx->needs_input_grad(1);
      auto [dx, dw] = op.call(dy[0], saved[0], weight, saved[2],
                              ctx->saved_data["offset"].toDouble(), weight_grad);
      return {dx, weight_grad ? dw : at::Tensor(), at::Tensor(), at::Tensor()};
    });
  }
};

static std::optional<at::Tensor> direct(pybind11::handle x_object, pybind11::handle weight_object,
                                        std::optional<double> eps_or_none, double offset) {
  const at::Tensor *x = plain_floats(x_object), *w = plain_floats(weight_object);
  if (x == nullptr || !row_weight_fits(*x, w, weight_object) || !undisturbed())
    return std::nullopt;
  const pybind11::gil_scoped_release unlocked;
  const auto weight = optional_of(w);
  const double eps = eps_or_none.value_or(F32_EPS);
  if (records(*x, weight)) return RMSNorm::apply(*x, weight, eps, offset);
  return std::get<0>(call_fwd(*x, weight, eps, offset));
}

static const Entry entry([](pybind11::module_& m) { m.def("rms_norm", &direct); });

}  // namespace tilewright

TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("rms_norm_fwd", &tilewright::rms_norm_fwd);
  m.impl("rms_norm_bwd", &tilewright::rms_norm_bwd);
}
