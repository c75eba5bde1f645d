// The gate of a mixture's experts: which activation, and the limit of what it is given.
#pragma once
#include "glu_acts.h"
#include "moe_experts.h"

namespace tilewright::cpu::TW_ISA {
namespace {

// f(activation) of the kind asked for.
template <class F>
TW_INLINE void with_act(Gated act, F f) {
  switch (act) {
    case Gated::SILU: return f(Silu{});
    case Gated::GELU: return f(GeluErf{});
    case Gated::GELU_TANH: return f(GeluTanh{});
  }
}

struct Limit {  // of gates above, of ups both ways; inf: none
  Vec most, none, least;  // least: a positive number, so that what is at the limit passes
  bool is;
  TW_INLINE explicit Limit(float limit)
      : most(set1(limit)), none(set1(0.f)), least(set1(1e-38f)), is(limit < __builtin_inff()) {}
  TW_INLINE Vec gate(Vec g) const { return is ? select_positive(g - most, most, g) : g; }  // nan stays
  TW_INLINE Vec up(Vec u) const {
    return is ? select_positive(u - most, most, select_positive(none - most - u, none - most, u)) : u;
  }
  // their slopes: 0 past the limit, and of nan where there is one, as torch's clamp has it
  TW_INLINE Vec of_gate(Vec slope, Vec g) const { return is ? select_positive(most - g + least, slope, none) : slope; }
  TW_INLINE Vec of_up(Vec slope, Vec u) const {
    return is ? select_positive(min(most - u, most + u) + least, slope, none) : slope;
  }
};

}  // namespace
}  // namespace tilewright::cpu::TW_ISA
