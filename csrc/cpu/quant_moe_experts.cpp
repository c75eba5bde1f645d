#include "quant_moe_experts.h"

#include "moe_gate.h"
#include "rms_norm_row.h"

namespace tilewright::cpu::TW_ISA {
namespace {

template <class Act, class T>
void gate_as(const QuantGate& m, int64_t begin, int64_t end) {
  const Limit limit(m.limit);
  const auto value = [&](Vec gate, Vec up) { return Act::value(limit.gate(gate)) * limit.up(up); };
  for (int64_t r = begin; r < end; ++r) {
    const T *gate = static_cast<const T*>(m.h) + r * 2 * m.I, *up = gate + m.I;
    T* a = static_cast<T*>(m.a) + r * m.I;
    int64_t j = 0;
    for (; j + W <= m.I; j += W) store(a + j, value(load(gate + j), load(up + j)));
    if (const int n = int(m.I - j)) store_n(a + j, value(load_n(gate + j, n), load_n(up + j, n)), n);
  }
}

template <class Act, class T>
void gate_bwd_as(const QuantGate& m, const T* bias, int64_t begin, int64_t end) {
  const Limit limit(m.limit);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t slot = m.order[r];
    const T *gate = static_cast<const T*>(m.h) + r * 2 * m.I, *up = gate + m.I, *dout = row_of<T>(m.dout, slot / m.k);
    const float* g = m.g + r * m.I;
    T *dgate = static_cast<T*>(m.dh) + r * 2 * m.I, *dup = dgate + m.I;
    const Vec weight = set1(m.weights[slot]);
    // a as the forward rounded it, of which a row's share of dw is made
    const auto rounded = [](Vec v) {
      T kept[W];
      store(kept, v);
      return load(static_cast<const T*>(kept));
    };
    const auto at = [&](Vec given, Vec with, Vec product, auto put) {
      const Vec factor = limit.up(with);
      Vec slope;
      const Vec value = Act::value(limit.gate(given), slope), d = weight * product;
      put(limit.of_gate(d * factor * slope, given), limit.of_up(d * value, with));
      return rounded(value * factor);
    };
    double dw = row_sum(
        m.I,
        [&](int64_t j, Vec sum) {
          const Vec product = load(g + j);
          const Vec a = at(load(gate + j), load(up + j), product,
                           [&](Vec by_gate, Vec by_up) { store(dgate + j, by_gate), store(dup + j, by_up); });
          return fma(product, a, sum);
        },
        [&](int64_t j, int n, Vec sum) {
          const Vec product = load_n(g + j, n);
          const Vec a = at(load_n(gate + j, n), load_n(up + j, n), product, [&](Vec by_gate, Vec by_up) {
            store_n(dgate + j, by_gate, n), store_n(dup + j, by_up, n);
          });
          return fma(product, a, sum);
        });
    if (bias)
      dw += row_sum(
          m.D, [&](int64_t j, Vec sum) { return fma(load(dout + j), load(bias + j), sum); },
          [&](int64_t j, int n, Vec sum) { return fma(load_n(dout + j, n), load_n(bias + j, n), sum); });
    m.dweights[slot] = float(dw);
  }
}

}  // namespace

void quant_moe_gate(const QuantGate& m, int64_t begin, int64_t end) {
  with_act(m.act, [&](auto act) { TW_FOR_DTYPE(m.dtype, T, gate_as<decltype(act), T>(m, begin, end)) });
}

void quant_moe_gate_bwd(const QuantGate& m, const void* bias2, int64_t begin, int64_t end) {
  with_act(m.act, [&](auto act) {
    TW_FOR_DTYPE(m.dtype, T, gate_bwd_as<decltype(act), T>(m, static_cast<const T*>(bias2), begin, end))
  });
}

}  // namespace tilewright::cpu::TW_ISA
