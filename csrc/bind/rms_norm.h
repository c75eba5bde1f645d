// What the bindings of rms_norm and add_rms_norm share.
#pragma once
#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "../cpu/rms_norm.h"
#include "direct.h"

namespace tilewright {

// Below this many elements a fork costs more than it saves.
constexpr int64_t GRAIN = 32768;

inline int64_t row_grain(int64_t n) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, n)); }

// A [..., N] tensor as rows; `held` keeps the copy made where its strides do not fit Rows.
struct RowView {
  at::Tensor held;
  cpu::Rows rows;
  explicit RowView(const at::Tensor& t);
};

// offset + weight in float32 (1 without a weight): the weight itself where that is the same.
class Scale {
 public:
  Scale(const std::optional<at::Tensor>& weight, double offset, int64_t n, const char* op);
  const float* data() const { return data_; }

 private:
  at::Tensor held_;
  const float* data_;
};

void check_row_weight(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& weight);

// What eps=None is, as torch's for a float32 computation.
constexpr double F32_EPS = std::numeric_limits<float>::epsilon();

// Whether a direct entry takes x with the weight in `object`, which is `weight` if it is plain.
inline bool row_weight_fits(const at::Tensor& x, const at::Tensor* weight,
                            pybind11::handle object) {
  if (x.dim() == 0) return false;
  if (weight == nullptr) return object.is_none();
  return weight->dim() == 1 && weight->size(0) == x.size(-1);
}

std::tuple<at::Tensor, at::Tensor> rms_norm_bwd_rows(
    const char* op, const at::Tensor& dy, const std::optional<at::Tensor>& dresidual,
    const at::Tensor& x, const std::optional<at::Tensor>& weight, const at::Tensor& rstd,
    double offset, bool weight_grad);

}  // namespace tilewright
