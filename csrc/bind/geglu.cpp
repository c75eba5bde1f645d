#include "../cpu/geglu.h"

#include "glu.h"

namespace tilewright {
namespace {

bool is_tanh(c10::string_view approximate) {
  if (approximate == "tanh") return true;
  TORCH_CHECK_VALUE(approximate == "none", "geglu: approximate must be 'tanh' or 'none', not '",
                    approximate, "'");
  return false;
}

GluBwdFn backward(c10::string_view approximate) {
  return is_tanh(approximate) ? TW_PICK(geglu_tanh_bwd) : TW_PICK(geglu_erf_bwd);
}

at::Tensor geglu_fwd(const at::Tensor& gate, const std::optional<at::Tensor>& up,
                     c10::string_view approximate) {
  const GluFwdFn fn = is_tanh(approximate) ? TW_PICK(geglu_tanh_fwd) : TW_PICK(geglu_erf_fwd);
  return glu_forward("geglu", gate, up, fn);
}

std::tuple<at::Tensor, at::Tensor> geglu_bwd(const at::Tensor& dy, const at::Tensor& gate,
                                             const at::Tensor& up, c10::string_view approximate) {
  return glu_backward("geglu", dy, gate, up, backward(approximate));
}

at::Tensor geglu_packed_bwd(const at::Tensor& dy, const at::Tensor& gate_up,
                            c10::string_view approximate) {
  return glu_packed_backward("geglu", dy, gate_up, backward(approximate));
}

template <bool TANH>
struct GeGLU {
  static constexpr c10::string_view APPROXIMATE = TANH ? "tanh" : "none";

  static at::Tensor fwd(const at::Tensor& gate, const std::optional<at::Tensor>& up) {
    static const auto op = operator_of("geglu_fwd", &geglu_fwd);
    return op.call(gate, up, APPROXIMATE);
  }
  static std::tuple<at::Tensor, at::Tensor> bwd(const at::Tensor& dy, const at::Tensor& gate,
                                                const at::Tensor& up) {
    static const auto op = operator_of("geglu_bwd", &geglu_bwd);
    return op.call(dy, gate, up, APPROXIMATE);
  }
  static at::Tensor packed_bwd(const at::Tensor& dy, const at::Tensor& gate_up) {
    static const auto op = operator_of("geglu_packed_bwd", &geglu_packed_bwd);
    return op.call(dy, gate_up, APPROXIMATE);
  }
};

std::optional<at::Tensor> direct(pybind11::handle gate, pybind11::handle up, bool tanh) {
  return tanh ? glu_direct<GeGLU<true>>(gate, up) : glu_direct<GeGLU<false>>(gate, up);
}

const Entry entry([](pybind11::module_& m) { m.def("geglu", &direct); });

}  // namespace

TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("geglu_fwd", &geglu_fwd);
  m.impl("geglu_bwd", &geglu_bwd);
  m.impl("geglu_packed_bwd", &geglu_packed_bwd);
}

}  // namespace tilewright
