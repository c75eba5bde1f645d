// Scales that are codes themselves, worked out before the product.
#include "quant_linear.h"

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
    float found[NESTED_BLOCK] = {};  // looked up apart, so that the rest is done in vectors
    for (int64_t j = first; j < stop; ++j) found[j - first] = code[codes[j]];
    for (int64_t j = 0; j < NESTED_BLOCK; ++j) {
      const float scale = found[j] * block;
      found[j] = scale + offset;
    }
    for (int64_t j = first; j < stop; ++j) scales[j] = found[j - first];
  }
}

}  // namespace tilewright::cpu::TW_ISA
