// tilewright::linear_int4, linear_int8 and their input gradients on the CPU.
#include "../cpu/quant_linear.h"

#include <ATen/autocast_mode.h>

#include <atomic>

#include "direct.h"
#include "quant_weight.h"

namespace tilewright {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// x as contiguous float32 rows, converted where it is not.
Tensor as_float(const Tensor& x) { return x.to(at::kFloat).contiguous(); }

// A tensor like x [..., K] with `columns` for its last dimension.
Tensor with_columns(const Tensor& x, int64_t columns) {
  at::DimVector sizes(x.sizes());
  sizes.back() = columns;
  return at::empty(sizes, x.options());
}

// How many rows x [..., K] has, also where K is 0.
int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

constexpr int64_t SERIAL = 1 << 14;  // weights below which a fork costs more than it saves

template <class F> void over_columns(int64_t count, int64_t work, int64_t multiple, const F& body) {
  if (work < SERIAL) {
    body(0, count);
    return;
  }
  const int64_t threads = at::get_num_threads();
  int64_t grain = (count + threads - 1) / threads;
  grain = (grain + multiple - 1) / multiple * multiple;
  at::parallel_for(0, count, grain, body);
}

// Whether rows of n bfloat16 are such as the path in bfloat16 takes; sums of their groups, where asked for.
bool prepared_bf16(const void* x, int64_t M, int64_t n, int64_t group, float* sums) {
  const auto prepare = TW_PICK(quant_prepare_bf16);
  std::atomic<bool> fit{true};
  at::parallel_for(0, M, M * n < SERIAL ? M : 8, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      if (!prepare(static_cast<const char*>(x) + m * n * 2, n, group, sums ? sums + m * (n / group) : nullptr))
        fit = false;
  });
  return fit;
}

Tensor linear(const char* op, int bits, const Tensor& x_in, const Tensor& qweight,
              const Tensor& scales, const OptTensor& zeros, const OptTensor& minima,
              const OptTensor& codebook, at::TensorList nested, const OptTensor& bias_in,
              c10::string_view activations) {
  const HeldWeight held = hold_weight(op, bits, qweight, scales, zeros, minima, codebook, nested);
  const cpu::QuantWeight& w = held.view;
  TORCH_CHECK_VALUE(x_in.dim() >= 1 && x_in.size(-1) == w.K, op, ": x ", x_in.sizes(),
                    " does not fit a weight of ", w.K, " columns");
  const bool integer = activations == "int8";
  TORCH_CHECK_VALUE(integer || activations == "float", op,
                    ": activations must be 'float' or 'int8', not '", activations, "'");
  const cpu::DType dtype = dtype_of(x_in, op, "x");
  Tensor bias;
  if (bias_in) {
    TORCH_CHECK_VALUE(bias_in->dim() == 1 && bias_in->size(0) == w.N &&
                          bias_in->scalar_type() == x_in.scalar_type(),
                      op, ": bias ", bias_in->scalar_type(), " ", bias_in->sizes(),
                      " does not fit x ", x_in.scalar_type(), " and ", w.N, " output features");
    bias = bias_in->contiguous();
  }
  const void* bias_ptr = bias_in ? bias.const_data_ptr() : nullptr;
  const int64_t M = rows_of(x_in);
  Tensor y = with_columns(x_in, w.N);
  if (M == 0 || w.N == 0) return y;
  if (w.K == 0) return bias_in ? y.copy_(bias.expand(y.sizes())) : y.zero_();
  const Tensor x = x_in.contiguous();
  const char* x_ptr = static_cast<const char*>(x.const_data_ptr());
  const int64_t x_bytes = w.K * x.element_size(), pad = cpu::padded(w.K);

  const bool gemv = M <= cpu::GEMV_ROWS && TW_PICK(quant_has_gemv)(w);
  const bool vnni = integer && TW_PICK(quant_has_int8)(w);
  cpu::QuantActivations a{};
  a.x_stride = w.K;
  a.M = M;
  Tensor rows, lanes, sums, codes, block_scales, isums;
  const auto over_rows = [&](const auto& body) {
    at::parallel_for(0, M, M * w.K < SERIAL ? M : 8, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) body(m);
    });
  };
  // of 16-bit floats two bytes hold more than the weight's rounding to their dtype would leave
  const int slices = integer ? 1 : dtype == cpu::DType::F32 ? 3 : 2;
  // float activations in fixed point: as good as float32 once enough rounding errors average out
  const bool averages = w.K >= 256 && w.N >= 32;
  bool fixed = gemv && TW_PICK(quant_has_int8)(w) && (integer || averages);
  if (fixed) {
    const int64_t row = TW_PICK(quant_fixed_bytes)(w, slices);
    lanes = at::empty({M * row + M * w.G * 4}, x.options().dtype(at::kByte));
    uint8_t* l = lanes.mutable_data_ptr<uint8_t>();
    float* s = reinterpret_cast<float*>(l + M * row);
    const auto prepare = TW_PICK(quant_prepare_fixed);
    for (int64_t m = 0; m < M && fixed; ++m)
      fixed = prepare(w, x_ptr + m * x_bytes, dtype, slices, l + m * row, s + m * w.G);
    a.fixed = l, a.sums = s;
  }
  bool half = !gemv && !integer && dtype == cpu::DType::BF16 && TW_PICK(quant_has_bf16)(w);
  if (half) {
    const bool offsets = zeros || minima;
    if (offsets) sums = at::empty({M, w.G}, x.options().dtype(at::kFloat));
    float* s = offsets ? sums.mutable_data_ptr<float>() : nullptr;
    half = prepared_bf16(x_ptr, M, w.K, w.K / w.G, s);
    a.half = x_ptr, a.sums = s;
  }
  if (fixed || half) {
    // prepared above
  } else if (vnni && !gemv) {
    codes = at::empty({M, pad}, x.options().dtype(at::kChar));
    block_scales = at::empty({M, pad / 32}, x.options().dtype(at::kFloat));
    isums = at::empty({M, pad / 32}, x.options().dtype(at::kInt));
    const auto prepare = TW_PICK(quant_prepare_int8);
    int8_t* c = codes.mutable_data_ptr<int8_t>();
    float* s = block_scales.mutable_data_ptr<float>();
    int32_t* i = isums.mutable_data_ptr<int32_t>();
    over_rows([&](int64_t m) {
      prepare(w, x_ptr + m * x_bytes, dtype, c + m * pad, s + m * (pad / 32), i + m * (pad / 32),
              nullptr);
    });
    a.codes = c, a.scales = s, a.isums = i;
  } else {
    if (integer) {
      rows = at::empty({M, w.K}, x.options().dtype(at::kFloat));
      float* r = rows.mutable_data_ptr<float>();
      const auto prepare = TW_PICK(quant_prepare_int8);
      over_rows([&](int64_t m) {
        prepare(w, x_ptr + m * x_bytes, dtype, nullptr, nullptr, nullptr, r + m * w.K);
      });
    } else {
      rows = as_float(x);
    }
    a.x = rows.const_data_ptr<float>();
    if (gemv) {
      lanes = at::empty({M, pad}, rows.options());
      sums = at::empty({M, w.G}, rows.options());
      const auto prepare = TW_PICK(quant_prepare_float);
      float *l = lanes.mutable_data_ptr<float>(), *s = sums.mutable_data_ptr<float>();
      for (int64_t m = 0; m < M; ++m)
        prepare(w, a.x + m * w.K, cpu::DType::F32, nullptr, l + m * pad, s + m * w.G);
      a.lanes = l, a.sums = s;
    }
  }

  void* out = y.mutable_data_ptr();
  if (fixed) {
    const auto run = TW_PICK(quant_gemv_fixed);
    over_columns(w.N, w.N * w.K, 4, [&](int64_t begin, int64_t end) {
      run(w, a, slices, bias_ptr, out, w.N, dtype, begin, end);
    });
  } else if (gemv) {
    const auto run = TW_PICK(quant_gemv);
    over_columns(w.N, w.N * w.K, 4, [&](int64_t begin, int64_t end) {
      run(w, a, bias_ptr, out, w.N, dtype, begin, end);
    });
  } else {
    const auto run = half ? TW_PICK(quant_gemm_bf16)
                     : vnni ? TW_PICK(quant_gemm_int8) : TW_PICK(quant_gemm);
    const int64_t block = TW_PICK(quant_block)(), room = TW_PICK(quant_scratch)(M);
    over_columns((w.N + block - 1) / block, M * w.N * w.K, 1, [&](int64_t begin, int64_t end) {
      Tensor scratch = at::empty({room}, at::TensorOptions().dtype(at::kFloat));
      run(w, a, bias_ptr, out, w.N, dtype, scratch.mutable_data_ptr<float>(), begin, end);
    });
  }
  return y;
}

Tensor dgrad(const char* op, int bits, const Tensor& dy_in, const Tensor& qweight,
             const Tensor& scales, const OptTensor& zeros, const OptTensor& minima,
             const OptTensor& codebook, at::TensorList nested) {
  const HeldWeight held = hold_weight(op, bits, qweight, scales, zeros, minima, codebook, nested);
  const cpu::QuantWeight& w = held.view;
  TORCH_CHECK_VALUE(dy_in.dim() >= 1 && dy_in.size(-1) == w.N, op, ": dy ", dy_in.sizes(),
                    " does not fit a weight of ", w.N, " rows");
  const cpu::DType dtype = dtype_of(dy_in, op, "dy");
  const int64_t M = rows_of(dy_in);
  Tensor dx = with_columns(dy_in, w.K);
  if (M == 0 || w.K == 0) return dx;
  if (w.N == 0) return dx.zero_();
  cpu::QuantActivations a{};
  a.x_stride = w.N;
  a.M = M;
  Tensor dy = dy_in.contiguous();
  const bool half = dtype == cpu::DType::BF16 && M > cpu::HALF_ROWS && w.N % 2 == 0 &&
                    TW_PICK(quant_has_bf16)(w) && prepared_bf16(dy.const_data_ptr(), M, w.N, w.N, nullptr);
  if (half) {
    a.half = dy.const_data_ptr();
  } else {
    dy = as_float(dy);
    a.x = dy.const_data_ptr<float>();
  }
  const auto run = half ? TW_PICK(quant_dgrad_bf16) : TW_PICK(quant_dgrad);
  const int64_t block = TW_PICK(quant_block)(), room = TW_PICK(quant_scratch)(M);
  void* out = dx.mutable_data_ptr();
  over_columns((w.K + block - 1) / block, M * w.N * w.K, 1, [&](int64_t begin, int64_t end) {
    Tensor scratch = at::empty({room}, at::TensorOptions().dtype(at::kFloat));
    run(w, a, out, w.K, dtype, scratch.mutable_data_ptr<float>(), begin, end);
  });
  return dx;
}

Tensor linear_int4(const Tensor& x, const Tensor& q, const Tensor& s, const OptTensor& z,
                   const OptTensor& m, const OptTensor& c, at::TensorList nested, const OptTensor& b,
                   c10::string_view activations) {
  return linear("linear_int4", 4, x, q, s, z, m, c, nested, b, activations);
}
Tensor linear_int8(const Tensor& x, const Tensor& q, const Tensor& s, const OptTensor& z,
                   const OptTensor& m, const OptTensor& c, at::TensorList nested, const OptTensor& b,
                   c10::string_view activations) {
  return linear("linear_int8", 8, x, q, s, z, m, c, nested, b, activations);
}
Tensor linear_int4_dgrad(const Tensor& dy, const Tensor& q, const Tensor& s, const OptTensor& z,
                         const OptTensor& m, const OptTensor& c, at::TensorList nested) {
  return dgrad("linear_int4_dgrad", 4, dy, q, s, z, m, c, nested);
}
Tensor linear_int8_dgrad(const Tensor& dy, const Tensor& q, const Tensor& s, const OptTensor& z,
                         const OptTensor& m, const OptTensor& c, at::TensorList nested) {
  return dgrad("linear_int8_dgrad", 8, dy, q, s, z, m, c, nested);
}

using Linear = decltype(linear_int4);
using Dgrad = decltype(linear_int4_dgrad);

const c10::TypedOperatorHandle<Linear>& linear_operator(int64_t bits) {
  static const auto four = operator_of("linear_int4", &linear_int4);
  static const auto eight = operator_of("linear_int8", &linear_int8);
  return bits == 4 ? four : eight;
}
const c10::TypedOperatorHandle<Dgrad>& dgrad_operator(int64_t bits) {
  static const auto four = operator_of("linear_int4_dgrad", &linear_int4_dgrad);
  static const auto eight = operator_of("linear_int8_dgrad", &linear_int8_dgrad);
  return bits == 4 ? four : eight;
}

struct QuantLinear : torch::autograd::Function<QuantLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptTensor& bias,
                        const Tensor& qweight, const Tensor& scales, const OptTensor& zeros,
                        const OptTensor& minima, int64_t bits, c10::string_view activations) {
    ctx->save_for_backward(
        {qweight, scales, zeros.value_or(Tensor()), minima.value_or(Tensor())});
    ctx->saved_data["bits"] = bits;
    at::AutoDispatchBelowADInplaceOrView below;
    return linear_operator(bits).call(x, qweight, scales, zeros, minima, std::nullopt, {}, bias, activations);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    return once_differentiable(dys, [&]() -> variable_list {
      const variable_list saved = ctx->get_saved_variables();
      const Tensor& dy = dys[0];
      variable_list grads(8);
      if (ctx->needs_input_grad(0))
        grads[0] = dgrad_operator(ctx->saved_data["bits"].toInt())
                       .call(dy, saved[0], saved[1], defined_or_none(saved[2]),
                             defined_or_none(saved[3]), std::nullopt, {});
      if (ctx->needs_input_grad(1)) grads[1] = dy.reshape({-1, dy.size(-1)}).sum(0);
      return grads;
    });
  }
};

// A weight as QuantTensor checks it; what is the caller's to get wrong is checked here.
std::optional<Tensor> direct(pybind11::handle x_object, pybind11::handle bias_object,
                             pybind11::handle qweight_object, pybind11::handle scales_object,
                             pybind11::handle zeros_object, pybind11::handle minima_object,
                             int64_t bits, c10::string_view activations) {
  const Tensor *x = plain_floats(x_object), *bias = plain_floats(bias_object),
               *qweight = plain_tensor(qweight_object), *scales = plain_floats(scales_object),
               *zeros = plain_floats(zeros_object), *minima = plain_floats(minima_object);
  if (x == nullptr || qweight == nullptr || scales == nullptr || x->dim() == 0 ||
      x->size(-1) != qweight->size(1) * (8 / bits))
    return std::nullopt;
  const bool fits =
      (bias == nullptr ? bias_object.is_none()
                       : bias->dim() == 1 && bias->size(0) == qweight->size(0) &&
                             bias->scalar_type() == x->scalar_type()) &&
      (zeros != nullptr || zeros_object.is_none()) &&
      (minima != nullptr || minima_object.is_none()) &&
      (activations == "float" || activations == "int8");
  if (!fits || !undisturbed() || at::autocast::is_autocast_enabled(at::kCPU)) return std::nullopt;
  const pybind11::gil_scoped_release unlocked;
  const auto b = optional_of(bias), z = optional_of(zeros), m = optional_of(minima);
  if (records(*x, b))
    return QuantLinear::apply(*x, b, *qweight, *scales, z, m, bits, activations);
  at::AutoDispatchBelowADInplaceOrView below;
  return linear_operator(bits).call(*x, *qweight, *scales, z, m, std::nullopt, {}, b, activations);
}

const Entry entry([](pybind11::module_& m) { m.def("quant_linear", &direct); });

}  // namespace

TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("linear_int4", &linear_int4);
  m.impl("linear_int8", &linear_int8);
  m.impl("linear_int4_dgrad", &linear_int4_dgrad);
  m.impl("linear_int8_dgrad", &linear_int8_dgrad);
}

}  // namespace tilewright
