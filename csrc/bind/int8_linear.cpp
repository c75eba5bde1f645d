// tilewright::int8_rows and int8_linear on the CPU.
#include "../cpu/int8_linear.h"

#include "rms_norm.h"

namespace tilewright {

using at::Tensor;

static std::tuple<Tensor, Tensor> int8_rows(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() > 0, "int8_rows: x must have at least one dimension");
  const cpu::DType dtype = dtype_of(x, "int8_rows", "x");
  const int64_t n = x.size(-1);
  Tensor codes = at::empty(x.sizes(), x.options().dtype(at::kChar));
  Tensor scales = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  const RowView rows(x);
  int8_t* c = codes.mutable_data_ptr<int8_t>();
  float* s = scales.mutable_data_ptr<float>();
  const auto f = TW_PICK(int8_rows);
  at::parallel_for(0, scales.numel(), row_grain(n), [&](int64_t begin, int64_t end) {
    f(rows.rows, dtype, n, c, s, begin, end);
  });
  return {std::move(codes), std::move(scales)};
}

constexpr int64_t SERIAL = 1 << 16;  // products below which a fork costs more than it saves

static Tensor int8_linear(const Tensor& codes, const Tensor& row_scales, const Tensor& qweight,
                          const Tensor& scales, const std::optional<Tensor>& bias_in,
                          at::ScalarType dtype) {
  const char* op = "int8_linear";
  TORCH_CHECK_VALUE(codes.dim() > 0 && codes.scalar_type() == at::kChar, op, ": codes must be int8, not ",
                    codes.scalar_type(), " ", codes.sizes());
  const int64_t K = codes.size(-1);
  TORCH_CHECK_VALUE(row_scales.scalar_type() == at::kFloat &&
                        row_scales.sizes() == codes.sizes().slice(0, codes.dim() - 1),
                    op, ": row_scales ", row_scales.scalar_type(), " ", row_scales.sizes(),
                    " do not fit codes ", codes.sizes());
  TORCH_CHECK_VALUE(qweight.dim() == 2 && qweight.scalar_type() == at::kByte && qweight.size(1) == K, op,
                    ": qweight ", qweight.scalar_type(), " ", qweight.sizes(), " does not fit codes ",
                    codes.sizes());
  TORCH_CHECK_VALUE(K < (1 << 17), op, ": sums of ", K, " products pass int32");
  const int64_t N = qweight.size(0);
  TORCH_CHECK_VALUE(scales.dim() == 2 && scales.size(0) == N && scales.size(1) == 1, op, ": scales ",
                    scales.sizes(), " do not fit qweight ", qweight.sizes());
  at::DimVector sizes(codes.sizes());
  sizes.back() = N;
  Tensor y = at::empty(sizes, codes.options().dtype(dtype));
  cpu::Int8Product p{};
  p.dtype = dtype_of(y, op, "y");
  Tensor bias;
  if (bias_in) {
    TORCH_CHECK_VALUE(bias_in->dim() == 1 && bias_in->size(0) == N && bias_in->scalar_type() == dtype, op,
                      ": bias ", bias_in->scalar_type(), " ", bias_in->sizes(), " does not fit y ", dtype,
                      " ", sizes);
    bias = bias_in->contiguous();
    p.bias = bias.const_data_ptr();
  }
  p.M = row_scales.numel(), p.N = N, p.K = K;
  if (p.M == 0 || N == 0) return y;
  if (K == 0) return bias_in ? y.copy_(bias.expand(sizes)) : y.zero_();
  const Tensor x = codes.contiguous(), x_scale = row_scales.contiguous(), w = qweight.contiguous();
  const Tensor w_scale = scales.to(at::kFloat).contiguous();
  p.x = x.const_data_ptr<int8_t>(), p.x_scale = x_scale.const_data_ptr<float>();
  p.w = w.const_data_ptr<uint8_t>(), p.w_scale = w_scale.const_data_ptr<float>();
  p.y = y.mutable_data_ptr();
  Tensor sums;
  if (TW_PICK(int8_wants_sums)()) {
    sums = at::empty({p.M}, codes.options().dtype(at::kInt));
    int32_t* s = sums.mutable_data_ptr<int32_t>();
    const auto add = TW_PICK(int8_sums);
    at::parallel_for(0, p.M, row_grain(K), [&](int64_t begin, int64_t end) { add(p.x, K, s, begin, end); });
    p.x_sum = s;
  }
  const auto run = TW_PICK(int8_linear);
  const int64_t threads = p.M * N * K < SERIAL ? 1 : at::get_num_threads();
  const int64_t grain = ((N + threads - 1) / threads + 3) / 4 * 4;
  at::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) { run(p, begin, end); });
  return y;
}

}  // namespace tilewright

TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("int8_rows", &tilewright::int8_rows);
  m.impl("int8_linear", &tilewright::int8_linear);
}
