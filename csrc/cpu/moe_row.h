// What a router's kernels share: a token's logits, padded to whole vectors, at one instruction-set level.
#pragma once
#include "moe_route.h"
#include "rms_norm_row.h"

namespace tilewright::cpu::TW_ISA {

static_assert(MOE_EXPERTS % 16 == 0, "a row padded to whole vectors must fit");

constexpr float NONE = -__builtin_inff();

TW_INLINE int64_t padded(int64_t E) { return (E + W - 1) / W * W; }

template <class T>
TW_INLINE Vec load_some(const T* row, int64_t j, int64_t E, float fill) {
  return j + W <= E ? load(row + j) : load_n(row + j, int(E - j), fill);
}

}  // namespace tilewright::cpu::TW_ISA
