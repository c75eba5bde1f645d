// What the gated linear units share on either side of the instruction-set line: the arguments.
// Rows of `cols` elements; work is counted in elements, row after row, so one long row splits too.
#pragma once
#include "isa.h"

namespace tilewright::cpu {

struct GluFwd {
  const void *gate, *up;
  void* y;
  int64_t stride_gate, stride_up, stride_y, cols;
  DType dtype;
  bool past_caches;  // stream.h's
};

struct GluBwd {
  const void *dy, *gate, *up;
  void *dgate, *dup;
  int64_t stride_dy, stride_gate, stride_up, stride_dgate, stride_dup, cols;
  DType dtype;
  bool past_caches;  // stream.h's
};

}  // namespace tilewright::cpu
