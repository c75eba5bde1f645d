#include "../cpu/rope.h"

#include <ATen/EmptyTensor.h>

#include <optional>

#include "direct.h"

namespace tilewright {
namespace {

constexpr int64_t GRAIN = 32768;  // elements: about 10 us of work, what a fork costs

at::Tensor inner_contiguous(const at::Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous();
}

at::Tensor rotate(const at::Tensor& x_, const at::Tensor& cos_, const at::Tensor& sin_,
                  const std::optional<at::Tensor>& position_ids, bool interleaved, bool inverse) {
  TORCH_CHECK_VALUE(x_.dim() == 4 && cos_.dim() == 2 && cos_.sizes() == sin_.sizes() &&
                        cos_.scalar_type() == sin_.scalar_type(),
                    "rope: cos ", cos_.sizes(), ", sin ", sin_.sizes(), " do not fit x ", x_.sizes());
  const at::Tensor x = inner_contiguous(x_), cos = inner_contiguous(cos_),
                   sin = inner_contiguous(sin_);
  const int64_t B = x.size(0), H = x.size(1), S = x.size(2), D = x.size(3);
  const int64_t table_rows = cos.size(0), width = cos.size(1);
  TORCH_CHECK_VALUE(width <= D, "rope: cos ", cos.sizes(), " is wider than x ", x.sizes());

  cpu::Rope a;
  a.dtype = dtype_of(x, "rope", "x");
  a.table_dtype = dtype_of(cos, "rope", "cos");
  TORCH_CHECK_VALUE(a.table_dtype == cpu::DType::F32 || a.table_dtype == a.dtype,
                    "rope: cos must be float32 or ", x.scalar_type(), ", not ", cos.scalar_type());
  // the same choice as the fake's: on x's own strides, before any copy
  a.seq_major = x_.stride(1) < x_.stride(2);
  const auto h = std::max<int64_t>(H, 1), s = std::max<int64_t>(S, 1), d = std::max<int64_t>(D, 1);
  const int64_t strides[4] = {h * s * d, a.seq_major ? d : s * d, a.seq_major ? h * d : d, 1};
  at::Tensor y = at::detail::empty_strided_cpu(x.sizes(), strides, x.scalar_type());
  if (y.numel() == 0) return y;

  at::Tensor positions;
  a.positions = nullptr;
  a.stride_positions = 0;
  if (position_ids) {
    TORCH_CHECK_VALUE(position_ids->scalar_type() == at::kLong &&
                          position_ids->numel() == (position_ids->dim() == 1 ? S : B * S),
                      "rope: position_ids ", position_ids->sizes(), " does not fit x ", x.sizes());
    positions = position_ids->contiguous();
    a.positions = positions.const_data_ptr<int64_t>();
    a.stride_positions = positions.dim() == 1 ? 0 : S;
    for (int64_t i = 0; i < positions.numel(); ++i)
      TORCH_CHECK_VALUE(a.positions[i] >= 0 && a.positions[i] < table_rows, "rope: position ",
                        a.positions[i], " is outside cos and sin, which have ", table_rows,
                        " rows");
  } else {
    TORCH_CHECK_VALUE(S <= table_rows, "rope: cos ", cos.sizes(), " has too few rows for x ",
                      x.sizes());
  }
  a.x = x.const_data_ptr();
  a.cos = cos.const_data_ptr();
  a.sin = sin.const_data_ptr();
  a.y = y.mutable_data_ptr();
  a.stride_batch = x.stride(0);
  a.stride_outer = x.stride(a.seq_major ? 2 : 1);
  a.stride_inner = x.stride(a.seq_major ? 1 : 2);
  a.stride_cos = cos.stride(0);
  a.stride_sin = sin.stride(0);
  a.outer = a.seq_major ? S : H;
  a.inner = a.seq_major ? H : S;
  a.dim = D;
  a.doubled = 2 * width > D;
  a.rotary = a.doubled ? width : 2 * width;
  a.interleaved = interleaved;
  a.inverse = inverse;
  const auto fn = TW_PICK(rope);
  const int64_t grain = std::max<int64_t>(1, GRAIN / D);
  at::parallel_for(0, B * H * S, grain, [&](int64_t begin, int64_t end) { fn(a, begin, end); });
  return y;
}

at::Tensor rope_fwd(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                    const std::optional<at::Tensor>& position_ids, bool interleaved) {
  return rotate(x, cos, sin, position_ids, interleaved, false);
}

at::Tensor rope_bwd(const at::Tensor& dy, const at::Tensor& cos, const at::Tensor& sin,
                    const std::optional<at::Tensor>& position_ids, bool interleaved) {
  return rotate(dy, cos, sin, position_ids, interleaved, true);
}

at::Tensor call_fwd(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                    const std::optional<at::Tensor>& position_ids, bool interleaved) {
  static const auto op = operator_of("rope_fwd", &rope_fwd);
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, cos, sin, position_ids, interleaved);
}

struct RopeFunction : torch::autograd::Function<RopeFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin, const std::optional<at::Tensor>& position_ids,
                            bool interleaved) {
    ctx->save_for_backward({cos, sin, position_ids.value_or(at::Tensor())});
    ctx->saved_data["interleaved"] = interleaved;
    return call_fwd(x, cos, sin, position_ids, interleaved);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    static const auto op = operator_of("rope_bwd", &rope_bwd);
    return once_differentiable(dy, [&]() -> variable_list {
      const variable_list saved = ctx->get_saved_variables();
      const at::Tensor none;
      return {op.call(dy[0], saved[0], saved[1], defined_or_none(saved[2]),
                      ctx->saved_data["interleaved"].toBool()),
              none, none, none, none};
    });
  }
};

// What ops/rope.py's _check asks.
bool fits(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
          const at::Tensor* positions) {
  if (x.dim() != 4 || cos.dim() != 2 || cos.sizes() != sin.sizes()) return false;
  const int64_t B = x.size(0), S = x.size(2), D = x.size(3), rows = cos.size(0), C = cos.size(1);
  if (C > D || (2 * C > D && C % 2 != 0)) return false;
  if (cos.scalar_type() != sin.scalar_type()) return false;
  if (cos.scalar_type() != at::kFloat && cos.scalar_type() != x.scalar_type()) return false;
  if (positions == nullptr) return rows >= S;
  const bool shared = positions->dim() == 1 && positions->size(0) == S;
  const bool own = positions->dim() == 2 && positions->size(0) == B && positions->size(1) == S;
  return (shared || own) && positions->scalar_type() == at::kLong && rows > 0;
}

std::optional<at::Tensor> direct(pybind11::handle x_object, pybind11::handle cos_object,
                                 pybind11::handle sin_object, pybind11::handle positions_object,
                                 bool interleaved) {
  const at::Tensor *x = plain_floats(x_object), *cos = plain_floats(cos_object),
                   *sin = plain_floats(sin_object), *positions = plain_tensor(positions_object);
  if (x == nullptr || cos == nullptr || sin == nullptr) return std::nullopt;
  if (positions == nullptr && !positions_object.is_none()) return std::nullopt;
  if (!fits(*x, *cos, *sin, positions) || !undisturbed()) return std::nullopt;
  const pybind11::gil_scoped_release unlocked;
  if (records(*x)) return RopeFunction::apply(*x, *cos, *sin, optional_of(positions), interleaved);
  return call_fwd(*x, *cos, *sin, optional_of(positions), interleaved);
}

const Entry entry([](pybind11::module_& m) { m.def("rope", &direct); });

}  // namespace

TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("rope_fwd", &rope_fwd);
  m.impl("rope_bwd", &rope_bwd);
}

}  // namespace tilewright
