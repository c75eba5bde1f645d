// tilewright::moe_combine_fwd and moe_combine_bwd on the CPU.
#include "moe_rows.h"

namespace tilewright {

using at::Tensor;

static void check(const Tensor& y, const Tensor& weights, int64_t slots) {
  TORCH_CHECK_VALUE(y.dim() == 2 && y.size(0) == slots && weights.dim() > 0 && weights.numel() == slots,
                    "moe_combine: y ", y.sizes(), " and weights ", weights.sizes(), " do not fit ", slots, " slots");
}

static Tensor moe_combine_fwd(const Tensor& y, const Tensor& weights, const Tensor& rows) {
  check(y, weights, rows.numel());
  const Tensor given = moe_indices("moe_combine", "rows", rows, -1, y.size(0)), w = weights.to(at::kFloat).contiguous();
  at::DimVector sizes(rows.sizes());
  sizes.back() = y.size(1);
  Tensor out = at::empty(sizes, y.options());
  moe_sum(y, w.const_data_ptr<float>(), given, out);
  return out;
}

static std::tuple<Tensor, Tensor> moe_combine_bwd(const Tensor& dout, const Tensor& y, const Tensor& weights,
                                                  const Tensor& order, const Tensor& offsets) {
  check(y, weights, order.numel());
  const int64_t P = y.size(0), d = y.size(1), k = weights.size(-1);
  TORCH_CHECK_VALUE(dout.scalar_type() == y.scalar_type() && dout.dim() > 0 && dout.size(-1) == d &&
                        dout.numel() * k == P * d,
                    "moe_combine: dout ", dout.scalar_type(), " ", dout.sizes(), " does not fit y ", y.sizes());
  const Tensor given = moe_order("moe_combine", order);
  const Tensor edges = moe_offsets("moe_combine", offsets, P);
  const Tensor w = weights.to(at::kFloat).contiguous();
  Tensor dy = at::empty(y.sizes(), y.options()), dweights = at::empty(weights.sizes(), w.options());
  const RowView g(dout), x(y);
  const auto dtype = dtype_of(y, "moe_combine", "y");
  const int64_t here = edges.const_data_ptr<int64_t>()[edges.numel() - 1];
  const int64_t* slot = given.const_data_ptr<int64_t>();
  const float* weight = w.const_data_ptr<float>();
  void* to = dy.mutable_data_ptr();
  float* dw = dweights.mutable_data_ptr<float>();
  const auto f = TW_PICK(moe_combine_bwd);
  at::parallel_for(0, P, row_grain(2 * d), [&](int64_t begin, int64_t end) {
    f(g.rows, x.rows, weight, slot, to, dw, dtype, k, d, here, begin, end);
  });
  return {std::move(dy), dweights.to(weights.scalar_type())};
}

}  // namespace tilewright

TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("moe_combine_fwd", &tilewright::moe_combine_fwd);
  m.impl("moe_combine_bwd", &tilewright::moe_combine_bwd);
}
