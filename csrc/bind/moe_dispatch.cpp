// tilewright::moe_dispatch on the CPU: slots counted by expert, then placed.  No vectors, and no level's.
#include <utility>
#include <vector>

#include "common.h"

namespace tilewright {

using at::Tensor;

static std::tuple<Tensor, Tensor, Tensor> moe_dispatch(const Tensor& ids, int64_t E) {
  TORCH_CHECK_VALUE(ids.scalar_type() == at::kLong && E >= 1, "moe_dispatch: ids ", ids.scalar_type(),
                    " must be int64, of one expert or more, not ", E);
  const Tensor dense = ids.contiguous();
  const int64_t P = ids.numel();
  const int64_t* id = dense.const_data_ptr<int64_t>();
  std::vector<int64_t> next(E + 1, 0);  // by expert, last of no expert: how many, then the next's row
  for (int64_t i = 0; i < P; ++i) {
    TORCH_CHECK_VALUE(id[i] >= -1 && id[i] < E, "moe_dispatch: id ", id[i], " of ids is none of ", E,
                      " experts, nor -1");
    ++next[id[i] < 0 ? E : id[i]];
  }
  Tensor order = at::empty({P}, ids.options()), rows = at::empty(ids.sizes(), ids.options());
  Tensor offsets = at::empty({E + 1}, ids.options());
  int64_t* begins = offsets.mutable_data_ptr<int64_t>();
  int64_t row = 0;
  for (int64_t e = 0; e <= E; ++e) {
    begins[e] = row;
    row += std::exchange(next[e], row);
  }
  int64_t *slot = order.mutable_data_ptr<int64_t>(), *to = rows.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < P; ++i) {
    const int64_t r = next[id[i] < 0 ? E : id[i]]++;
    slot[r] = i;
    to[i] = id[i] < 0 ? -1 : r;
  }
  return {std::move(order), std::move(rows), std::move(offsets)};
}

}  // namespace tilewright

TORCH_LIBRARY_IMPL(tilewright, CPU, m) { m.impl("moe_dispatch", &tilewright::moe_dispatch); }
