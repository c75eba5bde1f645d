// tilewright::moe_route_fwd and moe_route_bwd on the CPU.
#include "../cpu/moe_route.h"

#include "rms_norm.h"

namespace tilewright {

using at::Tensor;

static cpu::Routing routing(const Tensor& logits, const RowView& rows, int64_t k, bool sigmoid, bool renormalise,
                            double scale) {
  cpu::Routing r{};
  r.dtype = dtype_of(logits, "moe_route", "logits");
  r.logits = rows.rows;
  r.E = logits.size(-1), r.k = k;
  r.sigmoid = sigmoid, r.renormalise = renormalise, r.scale = float(scale);
  TORCH_CHECK_VALUE(r.E >= 1 && r.E <= cpu::MOE_EXPERTS && k >= 1 && k <= cpu::MOE_CHOSEN, "moe_route: ", r.E,
                    " experts and k ", k, "; from 1 to ", cpu::MOE_EXPERTS, " and ", cpu::MOE_CHOSEN, " are taken");
  return r;
}

// [M, k], every id -1 or an expert's.
static Tensor checked(const Tensor& ids, const Tensor& logits, int64_t k) {
  at::DimVector sizes(logits.sizes());
  sizes.back() = k;
  TORCH_CHECK_VALUE(ids.scalar_type() == at::kLong && ids.sizes() == at::IntArrayRef(sizes), "moe_route: ids ",
                    ids.scalar_type(), " ", ids.sizes(), " must be int64 ", at::IntArrayRef(sizes));
  Tensor dense = ids.contiguous();
  const int64_t* id = dense.const_data_ptr<int64_t>();
  const int64_t E = logits.size(-1);
  for (int64_t i = 0; i < dense.numel(); ++i)
    TORCH_CHECK_VALUE(id[i] >= -1 && id[i] < E, "moe_route: id ", id[i], " of ids is none of ", E,
                      " experts, nor -1");
  return dense;
}

static int64_t grain(int64_t E) { return row_grain(4 * E); }  // an exponential and a choice each

static std::tuple<Tensor, Tensor> moe_route_fwd(const Tensor& logits, const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& ids, int64_t k, int64_t groups,
                                                int64_t group_k, int64_t group_top, bool sigmoid,
                                                bool renormalise, double scale) {
  TORCH_CHECK_VALUE(logits.dim() > 0, "moe_route: logits must be [..., E]");
  const RowView rows(logits);
  const cpu::Routing r = routing(logits, rows, k, sigmoid, renormalise, scale);
  TORCH_CHECK_VALUE(groups >= 1 && r.E % groups == 0 && group_k >= 1 && group_k <= groups && group_top >= 1 &&
                        (ids || k <= r.E / groups * group_k),
                    "moe_route: groups ", groups, ", group_k ", group_k, ", group_top ", group_top, " and k ", k,
                    " do not fit ", r.E, " experts");
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == r.E), "moe_route: bias must be [", r.E, "]");
  at::DimVector sizes(logits.sizes());
  sizes.back() = k;
  Tensor weights = at::empty(sizes, logits.options().dtype(at::kFloat));
  Tensor found = at::empty(ids ? at::DimVector{0} : sizes, logits.options().dtype(at::kLong));
  const Tensor wide = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  const Tensor given = ids ? checked(*ids, logits, k) : Tensor();
  const cpu::Choice c{bias ? wide.const_data_ptr<float>() : nullptr,
                      ids ? given.const_data_ptr<int64_t>() : nullptr, groups, group_k, group_top};
  float* w = weights.mutable_data_ptr<float>();
  int64_t* to = found.mutable_data_ptr<int64_t>();
  const auto f = TW_PICK(moe_route_fwd);
  at::parallel_for(0, weights.numel() / k, grain(r.E),
                   [&](int64_t begin, int64_t end) { f(r, c, w, to, begin, end); });
  return {std::move(weights), std::move(found)};
}

static Tensor moe_route_bwd(const Tensor& dweights, const Tensor& logits, const Tensor& ids, bool sigmoid,
                            bool renormalise, double scale) {
  TORCH_CHECK_VALUE(logits.dim() > 0 && ids.dim() > 0, "moe_route: logits must be [..., E] and ids [..., k]");
  const RowView rows(logits);
  const cpu::Routing r = routing(logits, rows, ids.size(-1), sigmoid, renormalise, scale);
  const Tensor given = checked(ids, logits, r.k);
  TORCH_CHECK_VALUE(dweights.sizes() == ids.sizes(), "moe_route: dweights ", dweights.sizes(),
                    " do not fit ids ", ids.sizes());
  const Tensor dw = dweights.to(at::kFloat).contiguous();
  Tensor dlogits = at::empty(logits.sizes(), logits.options());
  const float* g = dw.const_data_ptr<float>();
  const int64_t* id = given.const_data_ptr<int64_t>();
  void* to = dlogits.mutable_data_ptr();
  const auto f = TW_PICK(moe_route_bwd);
  at::parallel_for(0, ids.numel() / r.k, grain(r.E),
                   [&](int64_t begin, int64_t end) { f(r, g, id, to, begin, end); });
  return dlogits;
}

}  // namespace tilewright

TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("moe_route_fwd", &tilewright::moe_route_fwd);
  m.impl("moe_route_bwd", &tilewright::moe_route_bwd);
}
