// What the experts' bindings share of products: their threads, gradients of weights, adapters (LoRA).
#pragma once
#include <array>
#include <optional>

#include "moe_rows.h"

namespace tilewright {

// Which slot each of P rows is, and whose.
struct MoePlaced {
  cpu::DType dtype;  // of rows and weights
  int64_t E, k, P;
  const int64_t *order, *offsets;

  int64_t here() const { return offsets[E]; }
};

inline int64_t moe_blocks(int64_t n) { return (n + cpu::MOE_COLUMNS - 1) / cpu::MOE_COLUMNS; }

// The blocks of an [.., n] result shared among threads, a block at least of some work each.
template <class F>
void moe_over(int64_t n, int64_t work, F f) {
  at::parallel_for(0, moe_blocks(n), row_grain(work * cpu::MOE_COLUMNS / 4), f);
}

inline cpu::Rows moe_own_rows(const at::Tensor& t) { return {t.const_data_ptr(), 1, t.size(1), 0}; }

inline cpu::LowRank moe_low_rank(const at::Tensor& u, const at::Tensor& b) {
  return {u.const_data_ptr(), b.const_data_ptr(), u.size(1)};
}

// scale in w^T of each row with an expert's w [E, N, K], or in w [E, K, N] across -> [P, N].
inline at::Tensor moe_thin(const MoePlaced& p, const cpu::Rows& in, bool tokens, const at::Tensor& w, bool across,
                           double scale) {
  const int64_t N = w.size(across ? 2 : 1), K = w.size(across ? 1 : 2);
  at::Tensor out = at::empty({p.P, N}, w.options());
  const cpu::Thin m{p.dtype, p.E, p.k, N, K, p.order, p.offsets, in, tokens, w.const_data_ptr(), across, float(scale),
                    out.mutable_data_ptr()};
  const auto f = TW_PICK(moe_experts_thin);
  at::parallel_for(0, p.here(), row_grain(N * K / 4), [&](int64_t begin, int64_t end) {
    at::Tensor scratch = at::empty({across ? cpu::MOE_ROWS * K : 0}, at::kFloat);
    f(m, scratch.mutable_data_ptr<float>(), begin, end);
  });
  return out;
}

inline cpu::Gradient moe_gradient(const MoePlaced& p, const cpu::Rows& left, bool left_tokens, int64_t M,
                                  const cpu::Rows& right, bool right_tokens, int64_t N) {
  return {p.dtype, p.E, p.k, M, N, p.order, p.offsets, left, right, left_tokens, right_tokens,
          nullptr, nullptr, nullptr, false};
}

// m's dw and dbias, where they are.
inline void moe_dw(const cpu::Gradient& m) {
  if (!m.dw && !m.dbias) return;
  int64_t most = 0;  // rows of an expert
  for (int64_t e = 0; e < m.E; ++e) most = std::max(most, m.offsets[e + 1] - m.offsets[e]);
  const auto f = TW_PICK(moe_experts_dw);
  moe_over(m.M, (m.offsets[m.E] + m.E) * m.N, [&](int64_t begin, int64_t end) {
    at::Tensor scratch = at::empty({most * cpu::MOE_COLUMNS}, at::kFloat), pointers = at::empty({most}, at::kLong);
    f(m, scratch.mutable_data_ptr<float>(), reinterpret_cast<const void**>(pointers.mutable_data_ptr<int64_t>()),
      begin, end);
  });
}

// Adapters of w13 and w2, contiguous; undefined: none.
struct MoeLora {
  at::Tensor a13, b13, a2, b2;  // [E, R, D], [E, 2 I, R], [E, R, I], [E, D, R]
  double scale;

  MoeLora(const std::optional<at::Tensor>& a13, const std::optional<at::Tensor>& b13,
          const std::optional<at::Tensor>& a2, const std::optional<at::Tensor>& b2, double scale)
      : a13(dense(a13)), b13(dense(b13)), a2(dense(a2)), b2(dense(b2)), scale(scale) {}

  void check(const char* op, const at::Tensor& x, int64_t E, int64_t D, int64_t I) const {
    const auto fits = [&](const at::Tensor& a, const at::Tensor& b, int64_t rows, int64_t columns) {
      if (!a.defined() && !b.defined()) return true;
      if (!a.defined() || !b.defined() || a.dim() != 3) return false;
      const int64_t R = a.size(1);
      return R >= 1 && R <= 512 && a.sizes() == at::IntArrayRef({E, R, columns}) &&
             b.sizes() == at::IntArrayRef({E, rows, R}) && a.scalar_type() == x.scalar_type() &&
             b.scalar_type() == x.scalar_type();
    };
    TORCH_CHECK_VALUE(fits(a13, b13, 2 * I, D) && fits(a2, b2, D, I), op, ": the adapters do not fit x ",
                      x.scalar_type(), " ", x.sizes(), ", ", E, " experts and ", I, " features between");
  }

  // The gradients of a13, b13, a2 and b2, empty where not wanted: of tokens' x and dout, rows' a and dh,
  // v13 = scale dh b13 and v2 = scale dout b2.
  std::array<at::Tensor, 4> grads(const MoePlaced& p, const float* weights, const cpu::Rows& x, const cpu::Rows& dout,
                                  const at::Tensor& a, const at::Tensor& dh, const at::Tensor& v13,
                                  const at::Tensor& v2, std::array<bool, 4> wanted) const {
    const at::TensorOptions options = dh.options();
    std::array<at::Tensor, 4> found;
    const auto make = [&](int i, const at::Tensor& of) {
      const bool want = wanted[i] && of.defined();
      found[i] = at::empty(want ? of.sizes() : at::IntArrayRef{0}, options);
      return want;
    };
    // of thin rows the other side's columns are shared among threads, and the gradient is written turned
    if (make(0, a13)) {
      cpu::Gradient m = moe_gradient(p, x, true, a13.size(2), moe_own_rows(v13), false, a13.size(1));
      m.dw = found[0].mutable_data_ptr(), m.turned = true;
      moe_dw(m);
    }
    if (make(1, b13)) {
      const at::Tensor u13 = moe_thin(p, x, true, a13, false, scale);
      cpu::Gradient m = moe_gradient(p, moe_own_rows(dh), false, b13.size(1), moe_own_rows(u13), false, b13.size(2));
      m.dw = found[1].mutable_data_ptr();
      moe_dw(m);
    }
    if (make(2, a2)) {
      cpu::Gradient m = moe_gradient(p, moe_own_rows(a), false, a2.size(2), moe_own_rows(v2), false, a2.size(1));
      m.weights = weights, m.dw = found[2].mutable_data_ptr(), m.turned = true;
      moe_dw(m);
    }
    if (make(3, b2)) {
      const at::Tensor u2 = moe_thin(p, moe_own_rows(a), false, a2, false, scale);
      cpu::Gradient m = moe_gradient(p, dout, true, b2.size(1), moe_own_rows(u2), false, b2.size(2));
      m.weights = weights, m.dw = found[3].mutable_data_ptr();
      moe_dw(m);
    }
    return found;
  }

 private:
  static at::Tensor dense(const std::optional<at::Tensor>& t) { return t ? t->contiguous() : at::Tensor(); }
};

}  // namespace tilewright
