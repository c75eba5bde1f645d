// tilewright::attention_fwd and attention_bwd on the CPU.
#include <ATen/autocast_mode.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "attention.h"
#include "direct.h"

namespace tilewright {
namespace {

// How a call of attention differs from softmax(q kᵀ) v, as the operators take it.
struct Options {
  Tensor sinks, bias, begin, end, blocks;  // undefined where there is none; all but bias dense
  std::optional<Tensor> seed;              // of dropout
  int64_t left, right, block_size;         // left, right -1: without end
  double softcap;                          // 0: none
  double scale, dropout;
};

// Strides of what broadcasts to [B, H, S, T], 0 where it is of size 1.
cpu::AttentionBias bias_view(const char* op, const Tensor& bias, const AttentionArgs& a) {
  const int64_t sizes[4] = {a.B, a.H, a.S, a.T}, missing = 4 - bias.dim();
  TORCH_CHECK_VALUE(missing >= 0, op, ": bias ", bias.sizes(), " has more than four dimensions");
  int64_t strides[4] = {0, 0, 0, 0};
  for (int64_t axis = 0; axis < bias.dim(); ++axis) {
    const int64_t size = bias.size(axis), whole = sizes[axis + missing];
    TORCH_CHECK_VALUE(size == 1 || size == whole, op, ": bias ", bias.sizes(), " does not broadcast to [", a.B, ", ",
                      a.H, ", ", a.S, ", ", a.T, "]");
    if (size != 1) strides[axis + missing] = bias.stride(axis);
  }
  return {bias.data_ptr<float>(), strides[0], strides[1], strides[2], strides[3]};
}

cpu::AttentionBlocks blocks_view(const char* op, const Tensor& mask, int64_t size, const AttentionArgs& a) {
  const auto count = [size](int64_t n) { return (n + size - 1) / size; };
  TORCH_CHECK_VALUE(size > 0, op, ": blocks of ", size);
  TORCH_CHECK_VALUE(mask.dim() == 4 && (mask.size(0) == 1 || mask.size(0) == a.B) &&
                        (mask.size(1) == 1 || mask.size(1) == a.H) && mask.size(2) == count(a.S) &&
                        mask.size(3) == count(a.T),
                    op, ": blocks ", mask.sizes(), " of ", size, " do not fit [", a.B, ", ", a.H, ", ", a.S, ", ", a.T, "]");
  const int64_t batch = mask.size(0) == 1 ? 0 : mask.stride(0), head = mask.size(1) == 1 ? 0 : mask.stride(1);
  return {mask.const_data_ptr<bool>(), batch, head, mask.size(3), size};
}

cpu::AttentionDropout dropout_of(const char* op, const std::optional<Tensor>& seed, double dropout) {
  TORCH_CHECK_VALUE(dropout >= 0 && dropout <= 1, op, ": dropout must be from 0 to 1, not ", dropout);
  if (dropout == 0) return {};
  TORCH_CHECK_VALUE(seed && seed->numel() == 1 && seed->scalar_type() == at::kLong, op,
                    ": dropout draws by a seed, an int64");
  const auto bits = uint64_t(*seed->const_data_ptr<int64_t>());
  const float p = float(dropout);
  return {{uint32_t(bits), uint32_t(bits >> 32)},
          uint32_t(uint64_t(double(p) * 4294967296.0)),
          p < 1.f ? 1.f / (1.f - p) : 0.f};
}

AttentionArgs arguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Options& o) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && k.size(0) == q.size(0) &&
                        k.size(3) == q.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                    op, ": q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(), " do not fit");
  TORCH_CHECK_VALUE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), op,
                    ": q ", q.scalar_type(), ", k ", k.scalar_type(), ", v ", v.scalar_type(), " differ");
  AttentionArgs a{};
  a.q = view(q), a.k = view(k), a.v = view(v);
  a.B = q.size(0), a.H = q.size(1), a.G = k.size(1), a.S = q.size(2), a.T = k.size(2), a.D = q.size(3);
  TORCH_CHECK_VALUE(!o.sinks.defined() || (o.sinks.dim() == 1 && o.sinks.size(0) == a.H), op,
                    ": sinks of another size than ", a.H, " heads");
  a.sinks = o.sinks.defined() ? o.sinks.const_data_ptr<float>() : nullptr;
  TORCH_CHECK_VALUE(o.begin.defined() == o.end.defined(), op, ": begin and end come together");
  if (o.begin.defined()) {
    for (const Tensor& x : {o.begin, o.end})
      TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) == a.B && x.size(1) == a.S, op, ": ranges ", x.sizes(),
                        " do not fit q ", q.sizes());
    a.begin = o.begin.const_data_ptr<int32_t>(), a.end = o.end.const_data_ptr<int32_t>();
  }
  const int64_t all = a.S + a.T;
  a.left = o.left < 0 ? all : std::min(o.left, all), a.right = o.right < 0 ? all : std::min(o.right, all);
  a.softcap = float(o.softcap), a.scale = float(o.scale), a.dtype = dtype_of(q, op, "q");
  a.cache = cpu::Cache(int(a.dtype));
  a.earliest = earliest(a);
  if (o.blocks.defined()) a.blocks = blocks_view(op, o.blocks, o.block_size, a);
  if (o.bias.defined()) a.bias = bias_view(op, o.bias, a);
  a.dropout = dropout_of(op, o.seed, o.dropout);
  return a;
}

// Few rows leave the blocked kernel's lanes empty, and too few tiles to share out a long cache.
bool is_decode(const AttentionArgs& a) {
  return a.S <= 8 && a.S * a.group() <= 64 && a.bias.data == nullptr && a.blocks.data == nullptr && a.dropout.none();
}

// What is expanded stays one.
Tensor as_float(const std::optional<Tensor>& x) {
  if (!x) return {};
  Tensor once = *x;
  for (int64_t axis = 0; axis < once.dim(); ++axis)
    if (once.stride(axis) == 0 && once.size(axis) > 1) once = once.narrow(axis, 0, 1);
  return once.to(at::kFloat);
}

// The keys a query meets at the most.
int64_t span(const AttentionArgs& a) { return a.begin ? a.T : std::min(a.T, a.left + a.right + 1); }

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                         const std::optional<Tensor>& sinks, const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& begin, const std::optional<Tensor>& end,
                                         const std::optional<Tensor>& blocks, const std::optional<Tensor>& seed,
                                         int64_t left, int64_t right, int64_t block_size, double softcap, double scale,
                                         double dropout) {
  const Tensor q = dense_rows(q_), k = dense_rows(k_), v = dense_rows(v_);
  const Options options{dense(sinks), as_float(bias), dense(begin, at::kInt), dense(end, at::kInt),
                        dense(blocks, at::kBool), seed, left, right, block_size, softcap, scale, dropout};
  AttentionArgs a = arguments("attention", q, k, v, options);
  const Tensor out = empty_like_heads(q);
  const Tensor lse = at::detail::empty_cpu({a.B, a.H, a.S}, at::kFloat);
  if (out.numel() == 0) return {out, lse};
  a.out = view(out), a.lse = lse.mutable_data_ptr<float>();
  if (!is_decode(a)) {
    run(TW_PICK(attention_prefill), a, a.B * a.G * a.row_tiles(),
        2 * cpu::ATTENTION_LANES * span(a) * a.D, a.blocked_scratch());
    return {out, lse};
  }
  decode(a);
  return {out, lse};
}

// The sum of a sink's dS over its rows: it is a key whose dP is 0.
Tensor sink_gradient(const AttentionArgs& a) {
  if (a.sinks == nullptr) return at::detail::empty_cpu({0}, at::kFloat);
  const Tensor dsinks = at::detail::empty_cpu({a.H}, at::kFloat);
  float* const out = dsinks.mutable_data_ptr<float>();
  for (int64_t h = 0; h < a.H; ++h) {
    double sum = 0;
    for (int64_t b = 0; b < a.B; ++b)
      for (int64_t at = (b * a.H + h) * a.S; at < (b * a.H + h + 1) * a.S; ++at)
        sum -= std::exp(double(a.sinks[h]) - a.rows.top[at]) * a.rows.norm[at] *
               (double(a.rows.mean[at]) + a.rows.drift[at]);
    out[h] = float(sum);
  }
  return dsinks;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout_, const std::optional<Tensor>& dlse_, const Tensor& q_, const Tensor& k_, const Tensor& v_,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& bias, const std::optional<Tensor>& begin,
    const std::optional<Tensor>& end, const std::optional<Tensor>& blocks, const std::optional<Tensor>& seed,
    int64_t left, int64_t right, int64_t block_size, double softcap, double scale, double dropout, bool bias_grad) {
  const Tensor q = dense_rows(q_), k = dense_rows(k_), v = dense_rows(v_), dout = dense_rows(dout_);
  const Tensor dlse = dense(dlse_);
  const Options options{dense(sinks), as_float(bias), dense(begin, at::kInt), dense(end, at::kInt),
                        dense(blocks, at::kBool), seed, left, right, block_size, softcap, scale, dropout};
  AttentionArgs a = arguments("attention_bwd", q, k, v, options);
  TORCH_CHECK_VALUE(!dlse.defined() || dlse.numel() == a.B * a.H * a.S, "attention_bwd: dlse ", dlse.sizes(),
                    " does not fit q ", q.sizes());
  a.dlse = dlse.defined() ? dlse.const_data_ptr<float>() : nullptr;
  TORCH_CHECK_VALUE(dout.sizes() == q.sizes() && dout.scalar_type() == q.scalar_type(), "attention_bwd: dout ",
                    dout.sizes(), " ", dout.scalar_type(), " does not fit q ", q.sizes(), " ", q.scalar_type());
  const Tensor dq = empty_like_heads(q), dk = empty_like_heads(k), dv = empty_like_heads(k);
  const int64_t n = a.B * a.H * a.S, each = 3 * cpu::ATTENTION_LANES * a.D;
  const auto space = c10::GetCPUAllocator()->allocate(size_t(4 * n) * sizeof(float));
  float* const rows = static_cast<float*>(space.get());
  a.rows = {rows, rows + n, rows + 2 * n, rows + 3 * n};
  a.dout = view(dout), a.dq = view(dq), a.dk = view(dk), a.dv = view(dv);
  if (dq.numel())
    run(TW_PICK(attention_dq), a, a.B * a.G * a.row_tiles(), each * span(a), a.blocked_scratch());
  if (dk.numel())
    run(TW_PICK(attention_dkv), a, a.B * a.G * a.key_tiles(),
        each * (a.begin ? a.S : std::min(a.S, a.left + a.right + 1)) * a.group(), a.blocked_scratch());
  Tensor dbias = at::detail::empty_cpu({0}, at::kFloat);
  if (options.bias.defined() && bias_grad) {
    dbias = at::zeros(bias->sizes(), at::kFloat);
    a.dbias = bias_view("attention_bwd", dbias, a);
    if (dbias.numel() && dk.numel() && dq.numel())
      run(TW_PICK(attention_dbias), a, a.dbias_items(),
          3 * a.D * a.S * (a.B * a.H * a.T / a.dbias_items() + 1), a.blocked_scratch());
  }
  return {dq, dk, dv, sink_gradient(a), dbias};
}

Tensor call_fwd(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale) {
  static const auto op = operator_of("attention_fwd", &attention_fwd);
  return std::get<0>(op.call(q, k, v, std::nullopt, std::nullopt, std::nullopt, std::nullopt, std::nullopt,
                             std::nullopt, -1, causal ? 0 : -1, 0, 0.0, scale, 0.0));
}

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                        bool causal, double scale) {
    ctx->save_for_backward({q, k, v});
    ctx->saved_data["causal"] = causal;
    ctx->saved_data["scale"] = scale;
    return call_fwd(q, k, v, causal, scale);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dout) {
    static const auto op = operator_of("attention_bwd", &attention_bwd);
    return once_differentiable(dout, [&]() -> variable_list {
      const variable_list saved = ctx->get_saved_variables();
      const int64_t right = ctx->saved_data["causal"].toBool() ? 0 : -1;
      const double scale = ctx->saved_data["scale"].toDouble();
      const auto [dq, dk, dv, dsinks, dbias] =
          op.call(dout[0], std::nullopt, saved[0], saved[1], saved[2], std::nullopt, std::nullopt, std::nullopt,
                  std::nullopt, std::nullopt, std::nullopt, -1, right, 0, 0.0, scale, 0.0, false);
      const Tensor none;
      return {dq, dk, dv, none, none};
    });
  }
};

constexpr int64_t MAX_D = 256;  // ops/attention.py's

// What ops/attention.py's _fits asks, and that the head dim has kernels.
bool fits(const Tensor& q, const Tensor& k, const Tensor& v) {
  return q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && k.size(0) == q.size(0) &&
         k.size(3) == q.size(3) && q.size(3) > 0 && q.size(3) <= MAX_D && k.size(1) > 0 &&
         q.size(1) % k.size(1) == 0 && k.scalar_type() == q.scalar_type() &&
         v.scalar_type() == q.scalar_type();
}

std::optional<Tensor> direct(pybind11::handle q_object, pybind11::handle k_object, pybind11::handle v_object,
                             bool causal, std::optional<double> scale) {
  const Tensor *q = plain_floats(q_object), *k = plain_floats(k_object), *v = plain_floats(v_object);
  // autocast may mend dtypes that differ: that is the ordinary way's to do
  if (q == nullptr || k == nullptr || v == nullptr || !fits(*q, *k, *v) || !undisturbed()) return std::nullopt;
  if (at::autocast::is_autocast_enabled(at::kCPU) &&
      at::autocast::get_autocast_dtype(at::kCPU) != q->scalar_type())
    return std::nullopt;
  const double factor = scale.value_or(std::pow(double(q->size(3)), -0.5));
  const pybind11::gil_scoped_release unlocked;
  if (records(*q, *k, *v)) return AttentionFunction::apply(*q, *k, *v, causal, factor);
  return call_fwd(*q, *k, *v, causal, factor);
}

const Entry entry([](pybind11::module_& m) { m.def("attention", &direct); });

}  // namespace

TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("attention_fwd", &attention_fwd);
  m.impl("attention_bwd", &attention_bwd);
}

}  // namespace tilewright
