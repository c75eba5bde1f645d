#include "moe_row.h"

namespace tilewright::cpu::TW_ISA {
namespace {

struct Token {  // rows padded to whole vectors
  float logits[MOE_EXPERTS];  // padded with -inf
  float s[MOE_EXPERTS];       // scores; what they are padded with is 0, or nan in a row of nan
  float ranked[MOE_EXPERTS];
};

template <class T>
void score(const T* row, int64_t E, bool sigmoid, Token& t) {
  const int64_t end = padded(E);
  float *logits = t.logits, *s = t.s;
  if (sigmoid) {
    const Vec one = set1(1.f);
    for (int64_t j = 0; j < end; j += W) {
      const Vec x = load_some(row, j, E, NONE);
      store(logits + j, x);
      store(s + j, one / (one + exp(set1(0.f) - x)));
    }
    return;
  }
  Vec top = set1(NONE);
  for (int64_t j = 0; j < end; j += W) {
    const Vec x = load_some(row, j, E, NONE);
    store(logits + j, x);
    top = max(x, top);  // passes over nan, which the sum then is
  }
  const Vec most = set1(reduce_max(top));
  const auto term = [&](int64_t j, Vec sum) {
    const Vec p = exp(load(logits + j) - most);
    store(s + j, p);
    return sum + p;
  };
  const Vec total = set1(float(row_sum(end, term, [](int64_t, int, Vec sum) { return sum; })));
  for (int64_t j = 0; j < end; j += W) store(s + j, load(s + j) / total);
}

// The `most` greatest of the numbers shown, none nan, greatest first; of equals the first shown.
struct Best {
  float values[MOE_EXPERTS];
  int32_t ids[MOE_EXPERTS];
  int64_t most, count;

  TW_INLINE bool takes(float v) const { return count < most || v > values[most - 1]; }

  TW_INLINE void show(float v, int64_t id) {
    if (!takes(v)) return;
    int64_t at = count < most ? count++ : most - 1;
    for (; at > 0 && values[at - 1] < v; --at) values[at] = values[at - 1], ids[at] = ids[at - 1];
    values[at] = v, ids[at] = int32_t(id);
  }

  void show(const float* x, int64_t begin, int64_t end) {
    int64_t e = begin;
    for (; e + W <= end; e += W)
      if (takes(reduce_max(load(x + e))))
        for (int64_t i = e; i < e + W; ++i) show(x[i], i);
    for (; e < end; ++e) show(x[e], e);
  }
};

// Whether each of the groups is among the group_k whose group_top best have the greatest sum.
void keep(const float* ranked, int64_t E, const Choice& c, Best& best, bool* kept) {
  const int64_t size = E / c.groups;
  float totals[MOE_EXPERTS];
  for (int64_t g = 0; g < c.groups; ++g) {
    best.most = c.group_top < size ? c.group_top : size, best.count = 0;
    best.show(ranked, g * size, (g + 1) * size);
    float total = 0.f;
    for (int64_t i = 0; i < best.count; ++i) total += best.values[i];
    totals[g] = total == total ? total : NONE;  // inf - inf
    kept[g] = false;
  }
  best.most = c.group_k, best.count = 0;
  best.show(totals, 0, c.groups);
  for (int64_t i = 0; i < c.group_k; ++i) kept[best.ids[i]] = true;
}

void choose(Token& t, int64_t E, int64_t k, const Choice& c, int64_t* ids) {
  const bool grouped = c.group_k < c.groups;
  const float* by = c.bias || grouped ? t.s : t.logits;
  float* ranked = t.ranked;
  for (int64_t j = 0; j < padded(E); j += W) {
    Vec x = load(by + j);
    if (c.bias) x = x + load_some(c.bias, j, E, 0.f);
    store(ranked + j, max(x, set1(NONE)));  // nan is -inf
  }
  Best best;
  bool kept[MOE_EXPERTS];
  if (grouped) keep(ranked, E, c, best, kept);
  best.most = k, best.count = 0;
  if (grouped) {
    const int64_t size = E / c.groups;
    for (int64_t g = 0; g < c.groups; ++g)
      if (kept[g]) best.show(ranked, g * size, (g + 1) * size);
  } else {
    best.show(ranked, 0, E);
  }
  for (int64_t j = 0; j < k; ++j) ids[j] = best.ids[j];
}

}  // namespace

void moe_route_fwd(const Routing& r, const Choice& c, float* weights, int64_t* ids, int64_t begin, int64_t end) {
  Token t;
  for (int64_t i = begin; i < end; ++i) {
    TW_FOR_DTYPE(r.dtype, T, { score(row_of<T>(r.logits, i), r.E, r.sigmoid, t); })
    if (!c.given) choose(t, r.E, r.k, c, ids + i * r.k);
    const int64_t* chosen = (c.given ? c.given : ids) + i * r.k;
    float* w = weights + i * r.k;
    float total = 0.f;
    for (int64_t j = 0; j < r.k; ++j) {
      w[j] = chosen[j] < 0 ? 0.f : t.s[chosen[j]];
      total += w[j];
    }
    for (int64_t j = 0; j < r.k; ++j) w[j] = (r.renormalise ? w[j] / (total + 1e-20f) : w[j]) * r.scale;
  }
}

void moe_route_bwd(const Routing& r, const float* dweights, const int64_t* ids, void* dlogits, int64_t begin,
                   int64_t end) {
  Token t;
  float by_score[MOE_EXPERTS];
  const float *s = t.s, *ds = by_score;
  const int64_t whole = padded(r.E);
  for (int64_t i = begin; i < end; ++i) {
    TW_FOR_DTYPE(r.dtype, T, { score(row_of<T>(r.logits, i), r.E, r.sigmoid, t); })
    const float* g = dweights + i * r.k;
    const int64_t* chosen = ids + i * r.k;
    float total = 1e-20f, dot = 0.f;
    for (int64_t j = 0; j < r.k; ++j)
      if (chosen[j] >= 0) total += s[chosen[j]];
    for (int64_t j = 0; j < r.k; ++j)  // divided first: of one expert the weight is 1 and the gradient 0
      if (chosen[j] >= 0) dot += g[j] * (s[chosen[j]] / total);
    for (int64_t e = 0; e < whole; e += W) store(by_score + e, set1(0.f));
    for (int64_t j = 0; j < r.k; ++j)  // an id may come twice
      if (chosen[j] >= 0) by_score[chosen[j]] += (r.renormalise ? (g[j] - dot) / total : g[j]) * r.scale;
    Vec shared = set1(0.f);
    if (!r.sigmoid) {
      for (int64_t j = 0; j < whole; j += W) shared = fma(load(ds + j), load(s + j), shared);
      shared = set1(reduce_add(shared));
    }
    // d sigmoid = s (1 - s) ds,  d softmax = s (ds - sum s ds)
    const auto gradient = [&](int64_t j) {
      const Vec p = load(s + j), d = load(ds + j);
      return r.sigmoid ? d * p * (set1(1.f) - p) : p * (d - shared);
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
