// tilewright::moe_losses_fwd and moe_losses_bwd on the CPU.
#include "../cpu/moe_losses.h"

#include <vector>

#include "rms_norm.h"

namespace tilewright {

using at::Tensor;

static int64_t grain(int64_t E) { return row_grain(4 * E); }  // an exponential and a quotient each

// Logits and a mask as the kernels take them.
struct Tokens {
  RowView rows;
  Tensor flat;
  cpu::Router router;
  int64_t M;

  Tokens(const Tensor& logits, const std::optional<Tensor>& mask, int64_t k, bool sigmoid) : rows(logits) {
    const auto leading = logits.sizes().slice(0, logits.dim() - 1);
    TORCH_CHECK_VALUE(!mask || (mask->scalar_type() == at::kBool && mask->sizes() == leading), "moe_losses: mask ",
                      mask->scalar_type(), " ", mask->sizes(), " must be bool ", leading);
    if (mask) flat = mask->contiguous();
    const int64_t E = logits.size(-1);
    TORCH_CHECK_VALUE(E >= 1 && E <= cpu::MOE_EXPERTS && k >= 1 && k <= cpu::MOE_CHOSEN, "moe_losses: ", E,
                      " experts and k ", k, "; from 1 to ", cpu::MOE_EXPERTS, " and ", cpu::MOE_CHOSEN, " are taken");
    router = {dtype_of(logits, "moe_losses", "logits"), rows.rows, mask ? flat.const_data_ptr<bool>() : nullptr, E, k,
              sigmoid};
    M = logits.numel() / E;
  }
};

static void check_dims(const Tensor& logits, int64_t least) {
  TORCH_CHECK_VALUE(logits.dim() >= least, "moe_losses: logits ", logits.sizes(), " must have ", least,
                    " dimensions or more");
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_losses_fwd(const Tensor& logits, const Tensor& ids,
                                                                         const std::optional<Tensor>& mask,
                                                                         bool sigmoid, bool per_sequence) {
  check_dims(logits, per_sequence ? 3 : 1);
  TORCH_CHECK_VALUE(ids.scalar_type() == at::kLong && ids.dim() == logits.dim() &&
                        ids.sizes().slice(0, ids.dim() - 1) == logits.sizes().slice(0, ids.dim() - 1),
                    "moe_losses: ids ", ids.scalar_type(), " ", ids.sizes(), " must be int64 and fit logits ",
                    logits.sizes());
  const Tokens tokens(logits, mask, ids.size(-1), sigmoid);
  const cpu::Router& r = tokens.router;
  const int64_t E = r.E, M = tokens.M;
  const int64_t G = per_sequence ? c10::multiply_integers(logits.sizes().slice(0, logits.dim() - 2)) : 1;
  const int64_t S = G ? M / G : 0;
  const Tensor dense = ids.contiguous();
  const int64_t* id = dense.const_data_ptr<int64_t>();

  // sums of blocks of rows, which depend on the shape alone, in their order: the same bit for bit whatever the number
  // of threads
  const int64_t block = std::max<int64_t>(1, std::min(S, std::max(grain(E), (S + 63) / 64)));
  const int64_t blocks = (S + block - 1) / block;
  Tensor sums = at::empty({G * blocks, E}, logits.options().dtype(at::kDouble));
  Tensor choices = at::empty({G * blocks, E}, logits.options().dtype(at::kLong));
  double* sum = sums.mutable_data_ptr<double>();
  int64_t* chosen = choices.mutable_data_ptr<int64_t>();
  std::vector<cpu::Tally> tallies(G * blocks);
  const auto f = TW_PICK(moe_losses_fwd);
  at::parallel_for(0, G * blocks, std::max<int64_t>(1, grain(E) / block), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      tallies[b] = {sum + b * E, chosen + b * E, 0., 0};
      const int64_t first = b / blocks * S, row = b % blocks * block;
      f(r, id, tallies[b], first + row, first + std::min(S, row + block));
    }
  });

  const auto floats = logits.options().dtype(at::kFloat);
  Tensor slopes = at::empty({G, E}, floats), totals = at::empty({2}, floats);
  Tensor counts = at::empty({E}, choices.options()), balance = at::empty({}, floats), z = at::empty({}, floats);
  float* slope = slopes.mutable_data_ptr<float>();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  std::fill(count, count + E, 0);
  double shares = 0., squares = 0.;
  int64_t counted = 0, active = 0;
  for (int64_t g = 0; g < G && M; ++g) {
    double* P = sum + g * blocks * E;
    int64_t* c = chosen + g * blocks * E;
    cpu::Tally all = tallies[g * blocks];
    for (int64_t b = 1; b < blocks; ++b) {
      all.tokens += tallies[g * blocks + b].tokens, all.squares += tallies[g * blocks + b].squares;
      for (int64_t e = 0; e < E; ++e) P[e] += P[b * E + e], c[e] += c[b * E + e];
    }
    const double some = double(std::max<int64_t>(1, all.tokens));
    double share = 0.;
    for (int64_t e = 0; e < E; ++e) {
      const double w = double(E * c[e]) / (some * some);
      share += w * P[e];
      slope[g * E + e] = float(w);
      count[e] += c[e];
    }
    shares += share, squares += all.squares;
    counted += all.tokens, active += all.tokens > 0;
  }
  if (M == 0) slopes.zero_();
  balance.mutable_data_ptr<float>()[0] = float(shares / double(std::max<int64_t>(1, active)));
  z.mutable_data_ptr<float>()[0] = float(squares / double(std::max<int64_t>(1, counted)));
  totals.mutable_data_ptr<float>()[0] = float(counted);
  totals.mutable_data_ptr<float>()[1] = float(active);
  return {std::move(balance), std::move(z), std::move(counts), std::move(slopes), std::move(totals)};
}

static double of(const std::optional<Tensor>& scalar) {
  TORCH_CHECK_VALUE(!scalar || scalar->numel() == 1, "moe_losses: a gradient of ", scalar->sizes(), " is no scalar");
  return scalar ? scalar->to(at::kDouble).item<double>() : 0.;
}

static Tensor moe_losses_bwd(const std::optional<Tensor>& dbalance, const std::optional<Tensor>& dz,
                             const Tensor& logits, const std::optional<Tensor>& mask, const Tensor& slopes,
                             const Tensor& totals, bool sigmoid) {
  check_dims(logits, 1);
  const Tokens tokens(logits, mask, 1, sigmoid);
  const int64_t E = tokens.router.E, M = tokens.M;
  for (const Tensor* t : {&slopes, &totals})
    TORCH_CHECK_VALUE(t->scalar_type() == at::kFloat && t->is_contiguous(), "moe_losses: ", t->scalar_type(), " ",
                      t->sizes(), " must be float32 and contiguous");
  TORCH_CHECK_VALUE(totals.numel() == 2 && slopes.dim() == 2 && slopes.size(1) == E &&
                        (M == 0 || (slopes.size(0) > 0 && M % slopes.size(0) == 0)),
                    "moe_losses: slopes ", slopes.sizes(), " and totals ", totals.sizes(), " do not fit logits ",
                    logits.sizes());
  Tensor dlogits = at::empty(logits.sizes(), logits.options());
  if (M == 0) return dlogits;
  const float* total = totals.const_data_ptr<float>();
  const cpu::Slopes g{dbalance ? slopes.const_data_ptr<float>() : nullptr, M / slopes.size(0),
                      float(of(dbalance) / std::max(1.f, total[1])), dz.has_value(),
                      2. * of(dz) / std::max(1.f, total[0])};
  void* to = dlogits.mutable_data_ptr();
  const auto f = TW_PICK(moe_losses_bwd);
  at::parallel_for(0, M, grain(E), [&](int64_t begin, int64_t end) { f(tokens.router, g, to, begin, end); });
  return dlogits;
}

}  // namespace tilewright

TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("moe_losses_fwd", &tilewright::moe_losses_fwd);
  m.impl("moe_losses_bwd", &tilewright::moe_losses_bwd);
}
