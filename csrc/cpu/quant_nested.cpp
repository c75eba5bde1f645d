// Scales that are codes themselves, worked out before the product.
#include "quant_linear.h"
#include "simd.h"

namespace tilewright::cpu::TW_ISA {

// Not contracted: QuantTensor.dequantize rounds the product too.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("fp-contract=off")))
#endif
void quant_plain_scales(const uint8_t* codes, int64_t count, const float* code, const float* blocks,
                        float offset, float* scales, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * NESTED_BLOCK, stop = first + NESTED_BLOCK < count ? first + NESTED_BLOCK : count;
    const float block = blocks[b];
    for (int64_t j = first; j < stop; ++j) {
      const float scale = code[codes[j]] * block;
      scales[j] = scale + offset;
    }
  }
}

}  // namespace tilewright::cpu::TW_ISA
