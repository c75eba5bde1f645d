// A quantised weight as the operators take it, checked: what quant_linear and quant_moe_experts share.
#pragma once
#include <optional>
#include <vector>

#include "../cpu/quant_linear.h"
#include "common.h"

namespace tilewright {

struct HeldWeight {  // the weight, and the contiguous tensors its pointers look into
  cpu::QuantWeight view;
  at::Tensor codes, scales, zeros, minima, codebook;
};

// The scales that codes [N, G] stand for, by nested's code [256], its scales, one to 256 codes, and its offset; not
// those of blocks of 256 for which `unused` is not 0.
inline at::Tensor plain_scales(const char* op, const at::Tensor& codes_in, at::TensorList nested,
                               const std::vector<char>& unused) {
  const int64_t count = codes_in.numel(), blocks = (count + cpu::NESTED_BLOCK - 1) / cpu::NESTED_BLOCK;
  TORCH_CHECK_VALUE(nested.size() == 3 && codes_in.scalar_type() == at::kByte, op,
                    ": nested scales are uint8 beside a code, scales and an offset, not ",
                    codes_in.scalar_type(), " beside ", nested.size(), " tensors");
  const int64_t wanted[] = {256, blocks, 1};
  for (int i = 0; i < 3; ++i)
    TORCH_CHECK_VALUE(nested[i].scalar_type() == at::kFloat && nested[i].numel() == wanted[i], op,
                      ": nested must be float32 of 256, ", blocks, " and 1, not ",
                      nested[i].scalar_type(), " ", nested[i].sizes());
  const at::Tensor codes = codes_in.contiguous(), code = nested[0].contiguous(), block = nested[1].contiguous();
  at::Tensor scales = at::empty(codes.sizes(), codes.options().dtype(at::kFloat));
  const uint8_t* from = codes.const_data_ptr<uint8_t>();
  const float *c = code.const_data_ptr<float>(), *b = block.const_data_ptr<float>();
  const float offset = *nested[2].const_data_ptr<float>();
  float* to = scales.mutable_data_ptr<float>();
  const auto run = TW_PICK(quant_plain_scales);
  at::parallel_for(0, blocks, 64, [&](int64_t begin, int64_t end) {
    if (unused.empty()) return run(from, count, c, b, offset, to, begin, end);
    for (int64_t i = begin; i < end; ++i)
      if (!unused[i]) run(from, count, c, b, offset, to, i, i + 1);
  });
  return scales;
}

inline HeldWeight hold_weight(const char* op, int bits, const at::Tensor& qweight, const at::Tensor& scales,
                              const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& minima,
                              const std::optional<at::Tensor>& codebook, at::TensorList nested,
                              const std::vector<char>& unused = {}) {
  TORCH_CHECK_VALUE(qweight.dim() == 2 && qweight.scalar_type() == at::kByte, op,
                    ": qweight must be 2-D uint8, not ", qweight.scalar_type(), " ",
                    qweight.sizes());
  TORCH_CHECK_VALUE(scales.dim() == 2 && scales.size(0) == qweight.size(0), op, ": scales ",
                    scales.sizes(), " do not fit qweight ", qweight.sizes());
  TORCH_CHECK_VALUE(int(zeros.has_value()) + int(minima.has_value()) + int(codebook.has_value()) <= 1,
                    op, ": give one of zeros, minima and codebook");
  TORCH_CHECK_VALUE(!codebook || (bits == 4 && codebook->scalar_type() == at::kFloat &&
                                  codebook->dim() == 1 && codebook->size(0) == 16),
                    op, ": codebook must be float32 [16], of 4 bits");
  HeldWeight w;
  w.codes = qweight.contiguous();
  w.scales = nested.empty() ? scales.contiguous() : plain_scales(op, scales, nested, unused);
  const int64_t N = qweight.size(0), K = qweight.size(1) * (8 / bits), G = scales.size(1);
  TORCH_CHECK_VALUE(G > 0 && K % G == 0, op, ": ", K, " columns do not divide into ", G, " groups");
  TORCH_CHECK_VALUE(bits == 8 || G == 1 || K / G % 2 == 0, op, ": groups of ", K / G,
                    " columns of 4 bits end within a byte");
  for (const auto* extra : {&zeros, &minima}) {
    if (!*extra) continue;
    TORCH_CHECK_VALUE((*extra)->sizes() == scales.sizes() &&
                          (*extra)->scalar_type() == w.scales.scalar_type(),
                      op, ": zeros or minima ", (*extra)->sizes(), " ", (*extra)->scalar_type(),
                      " differ from scales ", scales.sizes(), " ", w.scales.scalar_type());
  }
  if (zeros) w.zeros = zeros->contiguous();
  if (minima) w.minima = minima->contiguous();
  if (codebook) w.codebook = codebook->contiguous();
  w.view = {w.codes.const_data_ptr<uint8_t>(),
            w.scales.const_data_ptr(),
            zeros ? w.zeros.const_data_ptr() : nullptr,
            minima ? w.minima.const_data_ptr() : nullptr,
            codebook ? w.codebook.const_data_ptr<float>() : nullptr,
            dtype_of(w.scales, op, "scales"),
            bits,
            N,
            K,
            G};
  return w;
}

}  // namespace tilewright
