// A router's losses: sums over tokens of what its experts are given and of logsumexp^2, and their gradient.
#pragma once
#include "moe_route.h"

namespace tilewright::cpu {

struct Router {
  DType dtype;       // of logits and their gradient
  Rows logits;       // [M, E]
  const bool* mask;  // [M], which tokens count; null: all
  int64_t E, k;
  bool sigmoid;      // else softmax
};

struct Tally {
  double* sums;     // [E], of p
  int64_t* counts;  // [E], of choices
  double squares;   // of logsumexp
  int64_t tokens;   // that count
};

// Of rows [begin, end), from ids [M, k], any numbers.
TW_DECLARE(void, moe_losses_fwd, const Router& r, const int64_t* ids, Tally& to, int64_t begin, int64_t end)

struct Slopes {
  const float* by_expert;  // [M / S, E], each sequence's; null: none
  int64_t S;
  float balance;  // what they are multiplied by
  bool has_z;
  double z;  // and logsumexp
};

// Rows [begin, end) of dlogits [M, E].
TW_DECLARE(void, moe_losses_bwd, const Router& r, const Slopes& g, void* dlogits, int64_t begin, int64_t end)

}  // namespace tilewright::cpu
