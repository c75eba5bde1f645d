// Rotary position embedding of rows [begin, end), a row being one head of one token.
#pragma once
#include "isa.h"

namespace tilewright::cpu {

// Rows run over [batch, outer, inner] in the order of y's memory: outer, inner are sequence, heads
// where seq_major, else heads, sequence.  y is dense.
struct Rope {
  const void *x, *cos, *sin;
  const int64_t* positions;  // null: the index in the sequence
  void* y;
  int64_t stride_batch, stride_outer, stride_inner;  // of x
  int64_t stride_cos, stride_sin;
  int64_t stride_positions;  // from one batch to the next, 0 where shared
  int64_t outer, inner, dim, rotary;
  DType dtype, table_dtype;  // table_dtype is float32 or dtype
  bool seq_major;
  bool interleaved;  // pairs (2i, 2i + 1), else (i, i + rotary / 2)
  bool doubled;      // tables hold an angle for each element, not for each pair
  bool inverse;      // rotate by minus the angle
};

TW_DECLARE(void, rope, const Rope& args, int64_t begin, int64_t end)

}  // namespace tilewright::cpu
