// tilewright::moe_experts_fwd and moe_experts_bwd on the CPU.
#include "moe_lora.h"

namespace tilewright {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// What both passes are given, in the form cpu::Experts has it.
struct Given {
  cpu::Experts m{};
  int64_t P;
  Tensor order, rows, offsets, weights, w13, w2, bias13, bias2;  // contiguous; of w13 and w2 the last dimension
  MoeLora lora;
  std::optional<RowView> x;

  Given(const Tensor& x, const Tensor& weights, const Tensor& order, const Tensor& rows, const Tensor& offsets,
        const Tensor& w13, const Tensor& w2, const OptTensor& bias13, const OptTensor& bias2, const MoeLora& lora,
        c10::string_view activation, double limit)
      : lora(lora) {
    m.dtype = dtype_of(x, "moe_experts", "x");
    m.act = moe_activation("moe_experts", activation);
    m.limit = float(limit);
    TORCH_CHECK_VALUE(x.dim() > 0 && w13.dim() == 3 && w2.dim() == 3 && w2.size(1) == x.size(-1) &&
                          w13.sizes() == at::IntArrayRef({w2.size(0), 2 * w2.size(2), w2.size(1)}),
                      "moe_experts: x ", x.sizes(), ", w13 ", w13.sizes(), " and w2 ", w2.sizes(), " do not fit");
    m.E = w2.size(0), m.D = w2.size(1), m.I = w2.size(2);
    P = order.numel();
    m.k = rows.dim() ? rows.size(-1) : 0;
    TORCH_CHECK_VALUE(rows.dim() == x.dim() && rows.sizes() == weights.sizes() && rows.numel() == P &&
                          rows.sizes().slice(0, x.dim() - 1) == x.sizes().slice(0, x.dim() - 1) &&
                          offsets.numel() == m.E + 1,
                      "moe_experts: rows ", rows.sizes(), ", weights ", weights.sizes(), ", order ", order.sizes(),
                      " and offsets ", offsets.sizes(), " do not fit x ", x.sizes(), " and ", m.E, " experts");
    this->order = moe_order("moe_experts", order);
    this->offsets = moe_offsets("moe_experts", offsets, P);
    this->rows = moe_indices("moe_experts", "rows", rows, -1, this->offsets.const_data_ptr<int64_t>()[m.E]);
    this->x.emplace(x);
    this->weights = weights.to(at::kFloat).contiguous();
    m.order = this->order.const_data_ptr<int64_t>();
    m.offsets = this->offsets.const_data_ptr<int64_t>();
    m.weights = this->weights.const_data_ptr<float>();
    m.x = this->x->rows;
    m.w13 = matrices("w13", w13, x, this->w13);
    m.w2 = matrices("w2", w2, x, this->w2);
    m.bias13 = bias("bias13", bias13, x, 2 * m.I, this->bias13);
    m.bias2 = bias("bias2", bias2, x, m.D, this->bias2);
    lora.check("moe_experts", x, m.E, m.D, m.I);
  }

  int64_t here() const { return m.offsets[m.E]; }
  MoePlaced placed() const { return {m.dtype, m.E, m.k, P, m.order, m.offsets}; }

 private:
  static cpu::Matrices matrices(const char* name, const Tensor& w, const Tensor& x, Tensor& held) {
    TORCH_CHECK_VALUE(w.scalar_type() == x.scalar_type(), "moe_experts: ", name, " ", w.scalar_type(), ", x ",
                      x.scalar_type());
    held = w.stride(2) == 1 || w.size(2) == 1 ? w : w.contiguous();
    return {held.const_data_ptr(), held.stride(0), held.stride(1)};
  }

  const void* bias(const char* name, const OptTensor& b, const Tensor& x, int64_t n, Tensor& held) const {
    if (!b) return nullptr;
    TORCH_CHECK_VALUE(b->sizes() == at::IntArrayRef({m.E, n}) && b->scalar_type() == x.scalar_type(),
                      "moe_experts: ", name, " ", b->scalar_type(), " ", b->sizes(), " must be ", x.scalar_type(),
                      " ", at::IntArrayRef({m.E, n}));
    held = b->contiguous();
    return held.const_data_ptr();
  }
};

// f for blocks of m's N columns, each a sum over K.
template <class F>
void over(const cpu::Experts& m, int64_t N, int64_t work, int64_t K, F f) {
  moe_over(N, work, [&](int64_t begin, int64_t end) {
    const int64_t rows = std::min<int64_t>(cpu::MOE_GROUP * cpu::MOE_ROWS, m.offsets[m.E] + cpu::MOE_ROWS);
    Tensor scratch = at::empty({rows * K}, at::kFloat);
    f(m, scratch.mutable_data_ptr<float>(), begin, end);
  });
}

std::tuple<Tensor, Tensor> moe_experts_fwd(const Tensor& x, const Tensor& weights, const Tensor& order,
                                           const Tensor& rows, const Tensor& offsets, const Tensor& w13,
                                           const Tensor& w2, const OptTensor& bias13, const OptTensor& bias2,
                                           const OptTensor& a13, const OptTensor& b13, const OptTensor& a2,
                                           const OptTensor& b2, c10::string_view activation, double limit,
                                           double scale, bool save) {
  Given g(x, weights, order, rows, offsets, w13, w2, bias13, bias2, {a13, b13, a2, b2, scale}, activation, limit);
  cpu::Experts& m = g.m;
  Tensor h = at::empty({save ? g.P : 0, 2 * m.I}, x.options()), out = at::empty(x.sizes(), x.options());
  Tensor a = at::empty({g.P, m.I}, x.options()), y = at::empty({g.P, m.D}, x.options()), u13, u2;
  m.h = save ? h.mutable_data_ptr() : nullptr;
  m.a = a.mutable_data_ptr(), m.y = y.mutable_data_ptr();
  const auto up = TW_PICK(moe_experts_up), down = TW_PICK(moe_experts_down);
  if (g.lora.a13.defined()) {
    u13 = moe_thin(g.placed(), m.x, true, g.lora.a13, false, scale);
    m.lora_up = moe_low_rank(u13, g.lora.b13);
  }
  over(m, m.I, 2 * g.here() * m.D, m.D, up);
  if (g.lora.a2.defined()) {
    u2 = moe_thin(g.placed(), moe_own_rows(a), false, g.lora.a2, false, scale);
    m.lora_down = moe_low_rank(u2, g.lora.b2);
  }
  over(m, m.D, g.here() * m.I, m.I, down);
  moe_sum(y, m.weights, g.rows, out);
  return {std::move(out), std::move(h)};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients moe_experts_bwd(const Tensor& dout, const Tensor& x, const Tensor& h, const Tensor& weights,
                          const Tensor& order, const Tensor& rows, const Tensor& offsets, const Tensor& w13,
                          const Tensor& w2, const OptTensor& bias13, const OptTensor& bias2, const OptTensor& a13,
                          const OptTensor& b13, const OptTensor& a2, const OptTensor& b2,
                          c10::string_view activation, double limit, double scale, std::array<bool, 10> wanted) {
  Given g(x, weights, order, rows, offsets, w13, w2, bias13, bias2, {a13, b13, a2, b2, scale}, activation, limit);
  cpu::Experts& m = g.m;
  TORCH_CHECK_VALUE(dout.sizes() == x.sizes() && dout.scalar_type() == x.scalar_type() && h.dim() == 2 &&
                        h.size(0) == g.P && h.size(1) == 2 * m.I && h.scalar_type() == x.scalar_type(),
                    "moe_experts: dout ", dout.scalar_type(), " ", dout.sizes(), " and h ", h.scalar_type(), " ",
                    h.sizes(), " do not fit x ", x.scalar_type(), " ", x.sizes());
  const auto empty = [&](bool want, at::IntArrayRef sizes) {
    return at::empty(want ? sizes : at::IntArrayRef{0}, x.options());
  };
  Tensor dw13 = empty(wanted[2], w13.sizes()), dw2 = empty(wanted[3], w2.sizes());
  Tensor dbias13 = empty(wanted[4] && bias13, {m.E, 2 * m.I}), dbias2 = empty(wanted[5] && bias2, {m.E, m.D});
  Tensor dx = empty(wanted[0], x.sizes());
  const RowView gradient(dout);
  const Tensor kept = h.contiguous();
  Tensor a = empty(true, {g.P, m.I}), dh = empty(true, {g.P, 2 * m.I}), v13, v2;
  Tensor parts = at::zeros({g.P, moe_blocks(m.I)}, x.options().dtype(at::kFloat));
  m.dout = gradient.rows;
  m.h = const_cast<void*>(kept.const_data_ptr());
  m.a = a.mutable_data_ptr(), m.dh = dh.mutable_data_ptr(), m.parts = parts.mutable_data_ptr<float>();
  const auto f_dh = TW_PICK(moe_experts_dh), f_dx = TW_PICK(moe_experts_dx);
  if (g.lora.b2.defined()) {
    v2 = moe_thin(g.placed(), m.dout, true, g.lora.b2, true, scale);
    m.lora_dh = moe_low_rank(v2, g.lora.a2);
  }
  over(m, m.I, g.here() * m.D, m.D, f_dh);
  if (g.lora.b13.defined() && (wanted[0] || wanted[6])) {
    v13 = moe_thin(g.placed(), moe_own_rows(dh), false, g.lora.b13, true, scale);
    m.lora_dx = moe_low_rank(v13, g.lora.a13);
  }
  if (wanted[0]) {
    Tensor each = empty(true, {g.P, m.D}), ones = at::ones({g.P}, parts.options());
    m.dx = each.mutable_data_ptr();
    over(m, m.D, 2 * g.here() * m.I, 2 * m.I, f_dx);
    moe_sum(each, ones.const_data_ptr<float>(), g.rows, dx);
  }
  const auto ptr = [](Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; };
  cpu::Gradient of13 = moe_gradient(g.placed(), moe_own_rows(dh), false, 2 * m.I, m.x, true, m.D);
  of13.dw = ptr(dw13), of13.dbias = ptr(dbias13);
  moe_dw(of13);
  cpu::Gradient of2 = moe_gradient(g.placed(), m.dout, true, m.D, moe_own_rows(a), false, m.I);
  of2.weights = m.weights, of2.dw = ptr(dw2), of2.dbias = ptr(dbias2);
  moe_dw(of2);
  auto of_lora = g.lora.grads(g.placed(), m.weights, m.x, m.dout, a, dh, v13, v2,
                              {wanted[6], wanted[7], wanted[8], wanted[9]});
  Tensor dweights = wanted[1] ? parts.sum(1).view(weights.sizes()).to(weights.scalar_type())
                              : at::empty({0}, weights.options());
  return {std::move(dx),      std::move(dweights),   std::move(dw13),       std::move(dw2),        std::move(dbias13),
          std::move(dbias2), std::move(of_lora[0]), std::move(of_lora[1]), std::move(of_lora[2]), std::move(of_lora[3])};
}

}  // namespace

TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("moe_experts_fwd", &moe_experts_fwd);
  m.impl("moe_experts_bwd", &moe_experts_bwd);
}

}  // namespace tilewright
