// An op's direct way in from Python, `_C.<op>`: what its public function does for plain CPU
// tensors, but without torch.ops and autograd.Function in Python, which cost a decode step more
// than the kernels.
//
// An entry answers None to all it does not take (another device or dtype, shapes that do not fit,
// a subclass, any mode, transform or tracer): ops/<op>.py then goes its ordinary way, and says what
// is wrong.  Every call still passes torch's dispatcher.
#pragma once
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "common.h"
#include "entries.h"

namespace tilewright {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The operator tilewright::<name> of the kernel's signature.  Python defines it after this library
// is loaded: look it up at the first call, into a static.
template <class Kernel>
auto operator_of(const char* name, Kernel*) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("tilewright::") + name).c_str(), "")
      .template typed<Kernel>();
}

// Whether a call made now would meet nothing before the CPU kernels but autograd.
inline bool undisturbed() {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet usual(
      {DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU});
  return (c10::impl::tls_local_dispatch_key_set().included_ | usual) == usual &&
         !at::impl::torch_function_mode_enabled();
}

// The tensor in `object`, if it is torch's own class, dense and on the CPU; else null.
inline const at::Tensor* plain_tensor(pybind11::handle object) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet usual({DispatchKey::CPU, DispatchKey::ADInplaceOrView,
                                       DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});
  if (!THPVariable_CheckExact(object.ptr())) return nullptr;
  const at::Tensor& t = THPVariable_Unpack(object.ptr());
  return (t.key_set() | usual) == usual ? &t : nullptr;
}

// The same, of a dtype that has kernels.
inline const at::Tensor* plain_floats(pybind11::handle object) {
  const at::Tensor* t = plain_tensor(object);
  if (t == nullptr) return nullptr;
  const auto type = t->scalar_type();
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf ? t : nullptr;
}

inline std::optional<at::Tensor> optional_of(const at::Tensor* t) {
  return t == nullptr ? std::nullopt : std::optional<at::Tensor>(*t);
}

inline std::optional<at::Tensor> defined_or_none(const at::Tensor& saved) {
  return saved.defined() ? std::optional<at::Tensor>(saved) : std::nullopt;
}

inline bool wants_grad(const at::Tensor& t) { return t.requires_grad(); }
inline bool wants_grad(const std::optional<at::Tensor>& t) { return t && t->requires_grad(); }

// Whether autograd records a call with these inputs.
template <class... Inputs>
bool records(const Inputs&... inputs) {
  return at::GradMode::is_enabled() && (... || wants_grad(inputs));
}

// torch.autograd.function.once_differentiable: gradients that raise when they are differentiated.
template <class F>
variable_list once_differentiable(const variable_list& douts, F gradients) {
  variable_list grads;
  {
    at::NoGradGuard none;
    grads = gradients();
  }
  bool twice = false;
  for (const at::Tensor& d : douts) twice |= d.defined() && d.requires_grad();
  if (!twice || !at::GradMode::is_enabled()) return grads;
  for (at::Tensor& g : grads)
    if (g.defined()) g = g.detach().set_requires_grad(true);
  const auto error = std::make_shared<torch::autograd::DelayedError>(
      "trying to differentiate twice a function that was marked with @once_differentiable",
      int64_t(grads.size()));
  return (*error)(std::move(grads));
}

}  // namespace tilewright
