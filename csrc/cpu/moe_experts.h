// Experts over rows sorted by expert: slots of k of each token, expert e's from offsets[e] to offsets[e + 1].
//   h = w13 x + bias13,  a = f(gate) up,  y = w2 a + bias2     and of those the gradients
#pragma once
#include "isa.h"
#include "rms_norm.h"

namespace tilewright::cpu {

constexpr int MOE_COLUMNS = 32;  // of a product, or rows of a weight's gradient: what one thread takes at a time
constexpr int MOE_ROWS = 32;     // of an expert at a time

enum class Gated : int { SILU = 0, GELU = 1, GELU_TANH = 2 };

struct Matrices {  // [E, N, K], the last stride 1
  const void* p;
  int64_t stride_e, stride_n;
};

struct Experts {
  DType dtype;  // of all but `weights` and `parts`
  Gated act;
  float limit;  // of gates above, of ups both ways
  int64_t E, k, D, I;
  const int64_t *order, *offsets;  // each order one of [0, P)
  const float* weights;            // [P], by slot
  Rows x, dout;                    // [T, D]
  Matrices w13, w2;                // [E, 2 I, D], [E, D, I]
  const void *bias13, *bias2;      // [E, 2 I], [E, D], or null
  void *h, *a, *y;                 // [P, 2 I] or null, [P, I], [P, D]
  void *dh, *dx;                   // [P, 2 I], [P, D]
  float* parts;                    // [P, blocks of I], by slot: of the weights' gradients
};

// Blocks [begin, end) of MOE_COLUMNS columns of a (and h), of y, of dh (and a, parts), of dx.  scratch: MOE_ROWS times
// as many floats as are summed over, for the last two.
TW_DECLARE(void, moe_experts_up, const Experts& m, int64_t begin, int64_t end)
TW_DECLARE(void, moe_experts_down, const Experts& m, int64_t begin, int64_t end)
TW_DECLARE(void, moe_experts_dh, const Experts& m, float* scratch, int64_t begin, int64_t end)
TW_DECLARE(void, moe_experts_dx, const Experts& m, float* scratch, int64_t begin, int64_t end)

// Blocks [begin, end) of MOE_COLUMNS rows of each expert's dw13 [E, 2 I, D] and dbias13 [E, 2 I], of dw2 [E, D, I] and
// dbias2 [E, D]; either may be null.  scratch: MOE_COLUMNS floats a row of the largest expert, pointers: one.
TW_DECLARE(void, moe_experts_dw13, const Experts& m, void* dw, void* dbias, float* scratch, const void** pointers,
           int64_t begin, int64_t end)
TW_DECLARE(void, moe_experts_dw2, const Experts& m, void* dw, void* dbias, float* scratch, const void** pointers,
           int64_t begin, int64_t end)

}  // namespace tilewright::cpu
