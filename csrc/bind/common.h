// What the torch bindings share.  Files under csrc/bind/ are the only ones that include torch.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../cpu/isa.h"

namespace tilewright {

// Outputs from here up are written past the caches (csrc/cpu/stream.h): few machines would still have
// them in one when they are read.
constexpr size_t PAST_CACHES = 16 << 20;

inline cpu::DType dtype_of(const at::Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return cpu::DType::F32;
    case at::kBFloat16: return cpu::DType::BF16;
    case at::kHalf: return cpu::DType::F16;
    default:
      TORCH_CHECK_VALUE(false, op, ": ", name, " must be float32, bfloat16 or float16, not ",
                        t.scalar_type());
  }
}

}  // namespace tilewright
