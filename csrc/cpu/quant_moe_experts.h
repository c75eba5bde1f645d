// What experts of quantised weights do between their products, which are quant_linear's of an expert's rows:
//   a = f(gate) up,  and with g = dout w2 of each row  dh = w g df(gate) up,  dw = <g, a> + <dout, bias2>
#pragma once
#include "moe_experts.h"

namespace tilewright::cpu {

struct QuantGate {
  DType dtype;  // of all but `weights`, `g` and `dweights`
  Gated act;
  float limit;  // of gates above, of ups both ways
  int64_t k, D, I;
  const int64_t* order;  // [P]
  const float* weights;  // [P], by slot
  const void* h;         // [P, 2 I]
  void* a;               // [P, I]
  const float* g;        // [P, I]
  Rows dout;             // [T, D]
  void* dh;              // [P, 2 I]
  float* dweights;       // [P], by slot
};

// Rows [begin, end) of a; of dh, and their slots of dweights, all of one expert, whose bias2 [D] may be null.
TW_DECLARE(void, quant_moe_gate, const QuantGate& m, int64_t begin, int64_t end)
TW_DECLARE(void, quant_moe_gate_bwd, const QuantGate& m, const void* bias2, int64_t begin, int64_t end)

}  // namespace tilewright::cpu
