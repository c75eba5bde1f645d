// What the bindings of attention and attention_decode share.
#pragma once
#include "../cpu/attention.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>

#include "common.h"

namespace tilewright {

using at::Tensor;
using cpu::AttentionArgs;
using cpu::AttentionView;

// q [B, H, S, D] against k, v [B, G, T, D]; the rows of a head's values must be dense, no more.
inline Tensor dense_rows(const Tensor& x) {
  return x.size(3) <= 1 || x.stride(3) == 1 ? x : x.contiguous();
}

inline AttentionView view(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// [B, N, rows, D] lying as [B, rows, N, D], so that merging heads into features is a view.
inline Tensor empty_like_heads(const Tensor& x) {
  const int64_t B = x.size(0), N = x.size(1), S = x.size(2), D = x.size(3);
  const auto some = [](int64_t n) { return std::max<int64_t>(n, 1); };
  return at::detail::empty_strided_cpu(
      {B, N, S, D}, {some(S) * some(N) * some(D), some(D), some(N) * some(D), 1}, x.scalar_type());
}

// Whose address the arguments take.
inline Tensor dense(const std::optional<Tensor>& x, at::ScalarType dtype = at::kFloat) {
  return x ? x->to(dtype).contiguous() : Tensor();
}

// The first key that any query sees.
inline int64_t earliest(const AttentionArgs& a) {
  if (a.begin == nullptr) return a.S ? std::min(a.from(0, 0), a.T) : 0;
  int64_t first = a.T;
  for (int64_t b = 0; b < a.B; ++b)
    for (int64_t i = 0; i < a.S; ++i)
      if (a.from(b, i) < a.to(b, i)) first = std::min(first, a.from(b, i));
  return first;
}

using Kernel = void (*)(const AttentionArgs&, float*, int64_t, int64_t);

// `each` is the multiply-adds of one item: below about 2^19 of them a fork costs more than it saves.
inline void run(Kernel kernel, const AttentionArgs& a, int64_t items, int64_t each, int64_t scratch) {
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 19) / std::max<int64_t>(1, each));
  at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    const auto space = c10::GetCPUAllocator()->allocate(size_t(scratch) * sizeof(float));
    kernel(a, static_cast<float*>(space.get()), begin, end);
  });
}

// Flash decoding of arguments that are whole but for `partial`.
void decode(AttentionArgs& a);

}  // namespace tilewright
