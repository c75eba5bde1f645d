// Which k experts each token takes, and their weights, from its logits.
#pragma once
#include "isa.h"
#include "rms_norm.h"

namespace tilewright::cpu {

constexpr int MOE_EXPERTS = 1024, MOE_CHOSEN = 32;  // E and k at most

struct Routing {
  DType dtype;     // of logits and their gradient
  Rows logits;     // [M, E]
  int64_t E, k;
  bool sigmoid;    // else softmax
  bool renormalise;
  float scale;
};

struct Choice {
  const float* bias;     // [E], or null
  const int64_t* given;  // [M, k], -1 or below E; null: to be found
  int64_t groups, group_k, group_top;
};

// Rows [begin, end) of weights [M, k] and, where none are given, ids [M, k].
TW_DECLARE(void, moe_route_fwd, const Routing& r, const Choice& c, float* weights, int64_t* ids, int64_t begin,
           int64_t end)

// Of dlogits [M, E], from dweights [M, k] and ids [M, k], -1 or below E.
TW_DECLARE(void, moe_route_bwd, const Routing& r, const float* dweights, const int64_t* ids, void* dlogits,
           int64_t begin, int64_t end)

}  // namespace tilewright::cpu
