#include "../cpu/swiglu.h"

#include "glu.h"

namespace tilewright {
namespace {

at::Tensor swiglu_fwd(const at::Tensor& gate, const std::optional<at::Tensor>& up) {
  return glu_forward("swiglu", gate, up, TW_PICK(swiglu_fwd));
}

std::tuple<at::Tensor, at::Tensor> swiglu_bwd(const at::Tensor& dy, const at::Tensor& gate,
                                              const at::Tensor& up) {
  return glu_backward("swiglu", dy, gate, up, TW_PICK(swiglu_bwd));
}

at::Tensor swiglu_packed_bwd(const at::Tensor& dy, const at::Tensor& gate_up) {
  return glu_packed_backward("swiglu", dy, gate_up, TW_PICK(swiglu_bwd));
}

struct SwiGLU {
  static at::Tensor fwd(const at::Tensor& gate, const std::optional<at::Tensor>& up) {
    static const auto op = operator_of("swiglu_fwd", &swiglu_fwd);
    return op.call(gate, up);
  }
  static std::tuple<at::Tensor, at::Tensor> bwd(const at::Tensor& dy, const at::Tensor& gate,
                                                const at::Tensor& up) {
    static const auto op = operator_of("swiglu_bwd", &swiglu_bwd);
    return op.call(dy, gate, up);
  }
  static at::Tensor packed_bwd(const at::Tensor& dy, const at::Tensor& gate_up) {
    static const auto op = operator_of("swiglu_packed_bwd", &swiglu_packed_bwd);
    return op.call(dy, gate_up);
  }
};

const Entry entry([](pybind11::module_& m) { m.def("swiglu", &glu_direct<SwiGLU>); });

}  // namespace

TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("swiglu_fwd", &swiglu_fwd);
  m.impl("swiglu_bwd", &swiglu_bwd);
  m.impl("swiglu_packed_bwd", &swiglu_packed_bwd);
}

}  // namespace tilewright
