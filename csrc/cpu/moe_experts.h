// Experts over rows sorted by expert: slots of k of each token, expert e's from offsets[e] to offsets[e + 1].
//   h = w13 x + bias13 + b13 u13,  a = f(gate) up,  y = w2 a + bias2 + b2 u2     and of those the gradients, where
//   u13 = scale a13 x,  u2 = scale a2 a  are adapters' (LoRA), or are not
#pragma once
#include "isa.h"
#include "rms_norm.h"

namespace tilewright::cpu {

constexpr int MOE_COLUMNS = 32;  // of a product, or rows of a weight's gradient: what one thread takes at a time
constexpr int MOE_ROWS = 32;     // of an expert at a time, and
constexpr int MOE_GROUP = 4;     // times as many that share what reading its weight costs

enum class Gated : int { SILU = 0, GELU = 1, GELU_TANH = 2 };

struct Matrices {  // [E, N, K], the last stride 1
  const void* p;
  int64_t stride_e, stride_n;
};

struct LowRank {  // what an adapter adds to a product [P, N]: u b of an expert's b
  const void* u;  // [P, R]; null: nothing
  const void* b;  // [E, N, R], or [E, R, N] across
  int64_t R;
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
  LowRank lora_up, lora_down, lora_dh, lora_dx;  // the last two across
};

// Blocks [begin, end) of MOE_COLUMNS columns of a (and h), of y, of dh (and a, parts), of dx.  scratch: MOE_GROUP
// MOE_ROWS times as many floats as are summed over.
TW_DECLARE(void, moe_experts_up, const Experts& m, float* scratch, int64_t begin, int64_t end)
TW_DECLARE(void, moe_experts_down, const Experts& m, float* scratch, int64_t begin, int64_t end)
TW_DECLARE(void, moe_experts_dh, const Experts& m, float* scratch, int64_t begin, int64_t end)
TW_DECLARE(void, moe_experts_dx, const Experts& m, float* scratch, int64_t begin, int64_t end)

// Adapters' products of rows with an expert's w:  out = scale in w^T  or  scale in w, rounded.
struct Thin {
  DType dtype;
  int64_t E, k, N, K;
  const int64_t *order, *offsets;
  Rows in;        // [P, K], or [T, K] of tokens
  bool tokens;
  const void* w;  // [E, N, K], or [E, K, N] across
  bool across;
  float scale;
  void* out;      // [P, N]
};

// Rows [begin, end) of out.  scratch: MOE_ROWS K floats, where it is across.
TW_DECLARE(void, moe_experts_thin, const Thin& m, float* scratch, int64_t begin, int64_t end)

// out [rows, stop - n], of T or of float32 if wide, plus columns n.. of what an adapter adds to rows r.. of expert e,
// N columns in all.
TW_DECLARE(void, moe_experts_add, const LowRank& l, DType dtype, bool across, bool wide, int64_t N, int64_t e,
           int64_t r, int64_t rows, int64_t n, int64_t stop, void* out, int64_t out_stride)

// left^T right over an expert's rows.
struct Gradient {
  DType dtype;  // of all but `weights`
  int64_t E, k, M, N;
  const int64_t *order, *offsets;
  Rows left, right;               // [P, M] and [P, N], or [T, ..] of tokens
  bool left_tokens, right_tokens;
  const float* weights;           // [P], by slot, of left; null: 1
  void *dw, *dbias;               // [E, M, N] and [E, M]; either may be null
  bool turned;                    // dw [E, N, M]
};

// Blocks [begin, end) of MOE_COLUMNS of M.  scratch: MOE_COLUMNS floats a row of the largest expert, pointers: one.
TW_DECLARE(void, moe_experts_dw, const Gradient& m, float* scratch, const void** pointers, int64_t begin, int64_t end)

}  // namespace tilewright::cpu
