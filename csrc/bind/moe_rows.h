// Which row is whose, checked: what moe_combine and moe_experts are told by moe_dispatch.
// And what the experts' bindings share besides: the activation, the sum of a token's rows.
#pragma once
#include <vector>

#include "../cpu/moe_combine.h"
#include "../cpu/moe_experts.h"
#include "rms_norm.h"

namespace tilewright {

inline cpu::Gated moe_activation(const char* op, c10::string_view activation) {
  if (activation == "silu") return cpu::Gated::SILU;
  if (activation == "gelu") return cpu::Gated::GELU;
  TORCH_CHECK_VALUE(activation == "gelu_tanh", op, ": activation ", activation, " is none of silu, gelu, gelu_tanh");
  return cpu::Gated::GELU_TANH;
}

// Contiguous int64 from `least` up to, not including, `most`.
inline at::Tensor moe_indices(const char* op, const char* name, const at::Tensor& t, int64_t least, int64_t most) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kLong, op, ": ", name, " ", t.scalar_type(), " must be int64");
  at::Tensor dense = t.contiguous();
  const int64_t* p = dense.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < dense.numel(); ++i)
    TORCH_CHECK_VALUE(p[i] >= least && p[i] < most, op, ": ", p[i], " of ", name, " is none of ", most);
  return dense;
}

// [P], each of [0, P) once.
inline at::Tensor moe_order(const char* op, const at::Tensor& t) {
  const int64_t P = t.numel();
  at::Tensor dense = moe_indices(op, "order", t, 0, P);
  std::vector<char> seen(P, 0);
  for (int64_t i = 0; i < P; ++i) {
    const int64_t slot = dense.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_VALUE(!seen[slot], op, ": ", slot, " of order comes twice");
    seen[slot] = 1;
  }
  return dense;
}

// [E + 1] from 0, none below the one before, the last up to `slots`.
inline at::Tensor moe_offsets(const char* op, const at::Tensor& t, int64_t slots) {
  at::Tensor dense = moe_indices(op, "offsets", t, 0, slots + 1);
  const int64_t* p = dense.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(dense.dim() == 1 && dense.numel() > 0, op, ": offsets ", t.sizes(), " must be [E + 1]");
  TORCH_CHECK_VALUE(p[0] == 0, op, ": ", p[0], " of offsets must be 0, the first");
  for (int64_t e = 1; e < dense.numel(); ++e)
    TORCH_CHECK_VALUE(p[e - 1] <= p[e], op, ": offsets fall from ", p[e - 1], " to ", p[e]);
  return dense;
}

// out [..., D] of y [P, D], summed with weights [P] by slot; rows [..., k] as moe_dispatch's.
inline void moe_sum(const at::Tensor& y, const float* weights, const at::Tensor& rows, at::Tensor& out) {
  const RowView view(y);
  const cpu::DType dtype = dtype_of(y, "moe_combine", "y");
  const int64_t D = y.size(1), k = rows.size(-1);
  const int64_t* from = rows.const_data_ptr<int64_t>();
  void* to = out.mutable_data_ptr();
  const auto f = TW_PICK(moe_combine_fwd);
  at::parallel_for(0, D == 0 ? 0 : out.numel() / D, row_grain(k * D), [&](int64_t begin, int64_t end) {
    f(view.rows, weights, from, to, dtype, k, D, begin, end);
  });
}

}  // namespace tilewright
