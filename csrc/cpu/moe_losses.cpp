#include "moe_losses.h"

#include "moe_row.h"

namespace tilewright::cpu::TW_ISA {
namespace {

constexpr float FAR = 1e30f;
constexpr int64_t CHAIN = 32;  // rows summed in float32 before float64 takes them

struct Token {  // padded to whole vectors; what stands there is 0 once it is multiplied with p, or nan in a row of nan
  float x[MOE_EXPERTS];
  float softmax[MOE_EXPERTS];
  float p[MOE_EXPERTS];         // a sigmoid's share of their sum
  float opposite[MOE_EXPERTS];  // 1 - sigmoid
  float most;                   // of x, 0 where that is infinite
  double lse;

  template <class T>
  void read(const T* row, int64_t E) {
    const int64_t end = padded(E);
    Vec top = set1(NONE);
    for (int64_t j = 0; j < end; j += W) {
      const Vec v = load_some(row, j, E, NONE);
      store(x + j, v);
      top = max(v, top);  // passes over nan, which the sum then is
    }
    most = reduce_max(top);
    if (__builtin_isinf(most)) most = 0.f;  // no inf - inf: lse is inf, or -inf
    const double total = shares(softmax, end, [&](int64_t j) { return exp(value(j) - set1(most)); });
    lse = double(most) + __builtin_log(total);
  }

  // Both sides of 1 / (1 + e^-x) multiplied so that the greatest is 1/2 at least: their sum is never 0.
  void share(int64_t E) {
    const Vec least = set1(most < 0.f ? most : 0.f), scale = exp(least), one = set1(1.f);
    const int64_t end = padded(E);
    shares(p, end, [&](int64_t j) {
      const Vec away = exp(least - value(j)), s = one / (scale + away);
      // inf * 0 where s is 0, and so is p
      store(opposite + j, select_positive(away - set1(FAR), one, away * s));
      return s;
    });
  }

 private:
  TW_INLINE Vec value(int64_t j) const { return load(static_cast<const float*>(x + j)); }

  // f(j) / sum f, and the sum.
  template <class F>
  TW_INLINE static double shares(float* to, int64_t end, F f) {
    const auto term = [&](int64_t j, Vec sum) {
      const Vec y = f(j);
      store(to + j, y);
      return sum + y;
    };
    const double total = row_sum(end, term, [](int64_t, int, Vec sum) { return sum; });
    const Vec whole = set1(float(total));
    for (int64_t j = 0; j < end; j += W) store(to + j, load(static_cast<const float*>(to + j)) / whole);
    return total;
  }
};

}  // namespace

void moe_losses_fwd(const Router& r, const int64_t* ids, Tally& to, int64_t begin, int64_t end) {
  Token t;
  float sums[MOE_EXPERTS];
  const float *p = r.sigmoid ? t.p : t.softmax, *had = sums;
  const int64_t whole = padded(r.E);
  to.squares = 0., to.tokens = 0;
  for (int64_t e = 0; e < r.E; ++e) to.sums[e] = 0., to.counts[e] = 0;
  for (int64_t chain = begin; chain < end; chain += CHAIN) {
    for (int64_t j = 0; j < whole; j += W) store(sums + j, set1(0.f));
    for (int64_t i = chain; i < end && i < chain + CHAIN; ++i) {
      if (r.mask && !r.mask[i]) continue;
      TW_FOR_DTYPE(r.dtype, T, { t.read(row_of<T>(r.logits, i), r.E); })
      if (r.sigmoid) t.share(r.E);
      for (int64_t j = 0; j < whole; j += W) store(sums + j, load(had + j) + load(p + j));
      to.squares += t.lse * t.lse;
      to.tokens += 1;
      for (int64_t j = 0; j < r.k; ++j) {
        const int64_t id = ids[i * r.k + j];
        if (id >= 0 && id < r.E) to.counts[id] += 1;
      }
    }
    for (int64_t e = 0; e < r.E; ++e) to.sums[e] += double(sums[e]);
  }
}

void moe_losses_bwd(const Router& r, const Slopes& g, void* dlogits, int64_t begin, int64_t end) {
  Token t;
  float slopes[MOE_EXPERTS];
  const float *p = r.sigmoid ? t.p : t.softmax, *w = slopes;
  const float *softmax = t.softmax, *opposite = t.opposite;
  const int64_t whole = padded(r.E);
  const bool shared = g.by_expert && r.sigmoid;
  for (int64_t j = 0; j < whole; j += W) store(slopes + j, set1(0.f));
  int64_t last = -1;
  for (int64_t i = begin; i < end; ++i) {
    if (r.mask && !r.mask[i]) {
      TW_FOR_DTYPE(r.dtype, T, { __builtin_memset(static_cast<T*>(dlogits) + i * r.E, 0, r.E * sizeof(T)); })
      continue;
    }
    TW_FOR_DTYPE(r.dtype, T, { t.read(row_of<T>(r.logits, i), r.E); })
    if (shared) t.share(r.E);
    Vec dot = set1(0.f);
    if (g.by_expert) {
      if (const int64_t sequence = i / g.S; sequence != last) {
        last = sequence;
        const float* of = g.by_expert + sequence * r.E;
        for (int64_t j = 0; j < whole; j += W) store(slopes + j, load_some(of, j, r.E, 0.f) * set1(g.balance));
      }
      const auto term = [&](int64_t j, Vec sum) { return fma(load(p + j), load(w + j), sum); };
      dot = set1(float(row_sum(whole, term, [](int64_t, int, Vec sum) { return sum; })));
    }
    const Vec by_z = set1(float(g.z * t.lse));
    // d sum w p = p (w - sum w p), by the sigmoids' logits 1 - s of it;  d lse = softmax
    const auto gradient = [&](int64_t j) {
      Vec d = set1(0.f);
      if (g.by_expert) d = load(p + j) * (load(w + j) - dot);
      if (shared) d = d * load(opposite + j);
      return g.has_z ? fma(load(softmax + j), by_z, d) : d;
    };
    TW_FOR_DTYPE(r.dtype, T, {
      T* to = static_cast<T*>(dlogits) + i * r.E;
      int64_t j = 0;
      for (; j + W <= r.E; j += W) store(to + j, gradient(j));
      if (j < r.E) store_n(to + j, gradient(j), int(r.E - j));
    })
  }
}

}  // namespace tilewright::cpu::TW_ISA
