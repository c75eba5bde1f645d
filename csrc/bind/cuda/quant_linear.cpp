// tilewright::linear_int4_rows, the CUDA C++ kernel for up to 16 rows of 16 bits.  `linear_int4` runs the
// Triton kernel until this one has passed its tests on a GPU, or TILEWRIGHT_CUDA=1 chooses it.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "../../cuda/quant_linear.h"

namespace tilewright {
namespace {

cuda::Float float_of(const at::Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return cuda::Float::F32;
    case at::kBFloat16: return cuda::Float::BF16;
    case at::kHalf: return cuda::Float::F16;
    default:
      TORCH_CHECK_VALUE(false, "linear_int4_rows: ", name,
                        " must be float32, bfloat16 or float16, not ", t.scalar_type());
  }
}

// The kernel reads 16 bytes at a time.
at::Tensor aligned(const at::Tensor& t) {
  const at::Tensor dense = t.contiguous();
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 ? dense.clone() : dense;
}

at::Tensor linear_int4_rows(const at::Tensor& x, const at::Tensor& qweight, const at::Tensor& scales,
                            const std::optional<at::Tensor>& zeros,
                            const std::optional<at::Tensor>& minima,
                            const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(x.dim() == 2 && qweight.dim() == 2 && scales.dim() == 2,
                    "linear_int4_rows: x ", x.sizes(), ", qweight ", qweight.sizes(), " and scales ",
                    scales.sizes(), " must be 2-D");
  const int64_t M = x.size(0), K = x.size(1), N = qweight.size(0), G = scales.size(1);
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
                    "linear_int4_rows: x must be bfloat16 or float16, not ", x.scalar_type());
  TORCH_CHECK_VALUE(K < cuda::INT4_COLUMNS, "linear_int4_rows: ", K, " columns, fewer than ",
                    cuda::INT4_COLUMNS, " are taken");
  TORCH_CHECK_VALUE(qweight.scalar_type() == at::kByte && qweight.size(1) * 2 == K,
                    "linear_int4_rows: qweight ", qweight.scalar_type(), " ", qweight.sizes(),
                    " does not fit x ", x.sizes());
  TORCH_CHECK_VALUE(M <= cuda::INT4_ROWS, "linear_int4_rows: ", M, " rows, ",
                    cuda::INT4_ROWS, " at most");
  TORCH_CHECK_VALUE(G > 0 && scales.size(0) == N && K % G == 0 && (K / G) % 32 == 0,
                    "linear_int4_rows: scales ", scales.sizes(), " do not give ", N, " x ", K,
                    " groups that are multiples of 32");
  TORCH_CHECK_VALUE(!zeros || !minima, "linear_int4_rows: give zeros or minima, not both");
  const auto& given = zeros ? zeros : minima;
  TORCH_CHECK_VALUE(!given || (given->sizes() == scales.sizes() &&
                               given->scalar_type() == scales.scalar_type()),
                    "linear_int4_rows: zeros or minima must have the shape and dtype of scales");
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == N &&
                              bias->scalar_type() == x.scalar_type()),
                    "linear_int4_rows: bias must be ", x.scalar_type(), " [", N, "]");
  for (const auto* t : {&qweight, &scales})
    TORCH_CHECK_VALUE(t->device() == x.device(), "linear_int4_rows: x is on ", x.device(),
                      ", the weight on ", t->device());
  for (const auto* t : {&given, &bias})
    TORCH_CHECK_VALUE(!*t || (*t)->device() == x.device(), "linear_int4_rows: x is on ", x.device(),
                      ", an offset or bias on ", (*t)->device());

  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor y = at::empty({M, N}, x.options());
  if (M == 0 || N == 0) return y;
  if (K == 0) return bias ? y.copy_(bias->expand({M, N})) : y.zero_();
  const at::Tensor x_ = aligned(x), q = aligned(qweight), s = scales.contiguous();
  const at::Tensor o = given ? given->contiguous() : at::Tensor();
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();

  cuda::Int4Rows a{};
  a.x = x_.const_data_ptr();
  a.qweight = q.const_data_ptr<uint8_t>();
  a.scales = s.const_data_ptr();
  a.offset = given ? o.const_data_ptr() : nullptr;
  a.bias = bias ? b.const_data_ptr() : nullptr;
  a.y = y.mutable_data_ptr();
  a.N = N, a.K = K, a.group = K / G, a.G = G;
  a.M = static_cast<int>(M);
  a.kind = float_of(x, "x");
  a.scale_kind = float_of(scales, "scales");
  a.offset_is_minimum = minima.has_value();
  C10_CUDA_CHECK(tilewright_int4_rows(a, c10::cuda::getCurrentCUDAStream().stream()));
  return y;
}

}  // namespace
}  // namespace tilewright

TORCH_LIBRARY_FRAGMENT(tilewright, m) {
  m.def(
      "linear_int4_rows(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? minima, "
      "Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(tilewright, CUDA, m) { m.impl("linear_int4_rows", &tilewright::linear_int4_rows); }
