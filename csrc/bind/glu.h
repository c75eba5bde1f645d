// The bindings of the gated linear units: rows, allocation, threads.
#pragma once
#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <optional>

#include "../cpu/glu.h"
#include "direct.h"

namespace tilewright {

using GluFwdFn = void (*)(const cpu::GluFwd&, int64_t, int64_t);
using GluBwdFn = void (*)(const cpu::GluBwd&, int64_t, int64_t);

constexpr int64_t GLU_GRAIN = 32768;  // elements: about 10 us of work, what a fork costs
constexpr int64_t GLU_LINE = 64;      // threads' ranges start on vectors, and share no cache line

// t as rows of its last dimension: t itself where one stride steps through the rows, else a copy.
struct GluRows {
  at::Tensor tensor;
  int64_t stride;

  explicit GluRows(const at::Tensor& t) : tensor(t), stride(row_stride(t)) {
    if (stride >= 0) return;
    tensor = t.contiguous();
    stride = t.size(-1);
  }

  static int64_t row_stride(const at::Tensor& t) {
    const auto sizes = t.sizes(), strides = t.strides();
    const int64_t last = t.dim() - 1;
    if (sizes[last] != 1 && strides[last] != 1) return -1;
    bool found = false;
    int64_t stride = sizes[last], next = 0;
    for (int64_t d = last - 1; d >= 0; --d) {
      if (sizes[d] == 1) continue;
      if (!found) stride = strides[d];
      else if (strides[d] != next) return -1;
      found = true;
      next = strides[d] * sizes[d];
    }
    return stride;
  }

  const void* at(int64_t col) const {
    return static_cast<const char*>(tensor.const_data_ptr()) + col * tensor.element_size();
  }
};

template <class F>
void glu_parallel(int64_t count, const F& f) {
  at::parallel_for(0, (count + GLU_LINE - 1) / GLU_LINE, GLU_GRAIN / GLU_LINE,
                   [&](int64_t begin, int64_t end) {
                     f(begin * GLU_LINE, std::min(end * GLU_LINE, count));
                   });
}

inline at::Tensor glu_empty(at::IntArrayRef sizes, const at::Tensor& like) {
  return at::detail::empty_cpu(sizes, like.scalar_type());
}

inline void glu_check(const char* op, const at::Tensor& gate, const at::Tensor& other,
                      const char* name) {
  TORCH_CHECK_VALUE(gate.sizes() == other.sizes() && gate.scalar_type() == other.scalar_type(), op,
                    ": ", name, " ", other.sizes(), " ", other.scalar_type(),
                    " does not fit gate ", gate.sizes(), " ", gate.scalar_type());
}

inline at::DimVector glu_half(const char* op, const at::Tensor& packed) {
  TORCH_CHECK_VALUE(packed.dim() > 0 && packed.size(-1) % 2 == 0, op, ": packed gate ",
                    packed.sizes(), " has no two halves");
  at::DimVector sizes(packed.sizes());
  sizes.back() /= 2;
  return sizes;
}

inline at::Tensor glu_forward(const char* op, const at::Tensor& gate,
                              const std::optional<at::Tensor>& up, GluFwdFn fn) {
  cpu::GluFwd a;
  a.dtype = dtype_of(gate, op, "gate");
  if (up) glu_check(op, gate, *up, "up");
  const at::DimVector sizes = up ? at::DimVector(gate.sizes()) : glu_half(op, gate);
  at::Tensor y = glu_empty(sizes, gate);
  const int64_t count = y.numel();
  if (count == 0) return y;
  a.cols = sizes.back();
  const GluRows g(gate);
  const GluRows u = up ? GluRows(*up) : g;
  a.gate = g.at(0);
  a.up = u.at(up ? 0 : a.cols);
  a.y = y.mutable_data_ptr();
  a.stride_gate = g.stride;
  a.stride_up = u.stride;
  a.stride_y = a.cols;
  // gapless rows are one row: no tails
  if (a.stride_gate == a.cols && a.stride_up == a.cols) a.cols = count;
  a.past_caches = y.nbytes() >= PAST_CACHES;
  glu_parallel(count, [&](int64_t begin, int64_t end) { fn(a, begin, end); });
  return y;
}

inline void glu_backward_into(const char* op, const at::Tensor& dy_, const GluRows& g,
                              const GluRows& u, cpu::GluBwd a, GluBwdFn fn) {
  const GluRows dy(dy_);
  a.dtype = dtype_of(dy_, op, "dy");
  a.dy = dy.at(0);
  a.stride_dy = dy.stride;
  a.stride_gate = g.stride;
  a.stride_up = u.stride;
  const int64_t count = dy_.numel();
  if (a.stride_dy == a.cols && a.stride_gate == a.cols && a.stride_up == a.cols &&
      a.stride_dgate == a.cols)
    a.cols = count;
  a.past_caches = size_t(count) * dy_.element_size() >= PAST_CACHES;
  glu_parallel(count, [&](int64_t begin, int64_t end) { fn(a, begin, end); });
}

inline std::tuple<at::Tensor, at::Tensor> glu_backward(const char* op, const at::Tensor& dy,
                                                       const at::Tensor& gate,
                                                       const at::Tensor& up, GluBwdFn fn) {
  glu_check(op, gate, up, "up");
  glu_check(op, gate, dy, "dy");
  at::Tensor dgate = glu_empty(gate.sizes(), gate), dup = glu_empty(gate.sizes(), gate);
  if (dy.numel()) {
    const GluRows g(gate), u(up);
    cpu::GluBwd a;
    a.cols = a.stride_dgate = a.stride_dup = gate.size(-1);
    a.gate = g.at(0);
    a.up = u.at(0);
    a.dgate = dgate.mutable_data_ptr();
    a.dup = dup.mutable_data_ptr();
    glu_backward_into(op, dy, g, u, a, fn);
  }
  return {dgate, dup};
}

inline at::Tensor glu_packed_backward(const char* op, const at::Tensor& dy,
                                      const at::Tensor& gate_up, GluBwdFn fn) {
  const at::DimVector half = glu_half(op, gate_up);
  TORCH_CHECK_VALUE(dy.sizes() == at::IntArrayRef(half) && dy.scalar_type() == gate_up.scalar_type(),
                    op, ": dy ", dy.sizes(), " ", dy.scalar_type(), " does not fit packed gate ",
                    gate_up.sizes(), " ", gate_up.scalar_type());
  at::Tensor dgate_up = glu_empty(gate_up.sizes(), gate_up);
  if (dy.numel()) {
    const GluRows g(gate_up);
    cpu::GluBwd a;
    a.cols = half.back();
    a.stride_dgate = a.stride_dup = 2 * a.cols;
    a.gate = g.at(0);
    a.up = g.at(a.cols);
    a.dgate = dgate_up.mutable_data_ptr();
    a.dup = static_cast<char*>(a.dgate) + a.cols * gate_up.element_size();
    glu_backward_into(op, dy, g, g, a, fn);
  }
  return dgate_up;
}

// Autograd of a gated linear unit.  Op has static fwd(gate, up), bwd(dy, gate, up) and
// packed_bwd(dy, gate_up), which call the operators.
template <class Op>
struct GluFunction : torch::autograd::Function<GluFunction<Op>> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate,
                            const std::optional<at::Tensor>& up) {
    ctx->save_for_backward({gate, up.value_or(at::Tensor())});
    at::AutoDispatchBelowADInplaceOrView below;
    return Op::fwd(gate, up);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    return once_differentiable(dy, [&]() -> variable_list {
      const variable_list saved = ctx->get_saved_variables();
      if (!saved[1].defined()) return {Op::packed_bwd(dy[0], saved[0]), at::Tensor()};
      auto [dgate, dup] = Op::bwd(dy[0], saved[0], saved[1]);
      return {dgate, dup};
    });
  }
};

template <class Op>
std::optional<at::Tensor> glu_direct(pybind11::handle gate_object, pybind11::handle up_object) {
  const at::Tensor *gate = plain_floats(gate_object), *up_ = plain_floats(up_object);
  if (gate == nullptr || gate->dim() == 0) return std::nullopt;
  const bool fits = up_ == nullptr ? up_object.is_none() && gate->size(-1) % 2 == 0
                                   : gate->sizes() == up_->sizes() &&
                                         gate->scalar_type() == up_->scalar_type();
  if (!fits || !undisturbed()) return std::nullopt;
  const pybind11::gil_scoped_release unlocked;
  const auto up = optional_of(up_);
  if (records(*gate, up)) return GluFunction<Op>::apply(*gate, up);
  at::AutoDispatchBelowADInplaceOrView below;
  return Op::fwd(*gate, up);
}

}  // namespace tilewright
