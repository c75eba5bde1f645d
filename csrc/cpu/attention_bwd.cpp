// Attention's backward, one translation unit per instruction set: Dao 2023, arXiv:2307.08691,
// algorithm 2, but for what it knows of a row.  There P = e^(s - lse) and delta = rowsum(dO O), both
// rounded: at scores of 1000, lse is off by 3e-5 and P with it, and where one probability is near 1,
// all that is left of dP - delta is the rounding.  Here dq finds the row's maximum, sum and mean of dP
// again, as it goes.
#include "attention_tile.h"

namespace tilewright::cpu::TW_ISA {
namespace {

// Running statistics of a tile's rows, [L] each: maximum m and sum l of e^(s - m); mean, what dP is
// measured from, near its mean under P; excess, the sum of p (dP - mean), 0 but for rounding.  A step
// turns the sum of ds K so far into alpha times it plus beta times that of p K.
struct Stats {
  float *m, *l, *mean, *excess, *alpha, *beta;
};

// One step over scores p and products ds = dP, [count, L]: they become e^(s - m) and p (dP - mean).
// Where one probability is 1, the mean is that dP and its ds 0, exactly.
TW_INLINE void statistics_step(float* p, float* ds, int64_t count, int vectors, const Stats& x) {
  for (int c = 0; c < vectors; ++c) {
    const int at = c * W;
    const Vec old = load(x.m + at), mean = load(x.mean + at);
    Vec top = old;
    for (int64_t j = 0; j < count; ++j) top = max(top, load(p + j * L + at));
    const Vec a = exp(old - top);
    Vec sum = set1(0.f), mix = set1(0.f);
    for (int64_t j = 0; j < count; ++j) {
      const Vec e = exp(load(p + j * L + at) - top);
      store(p + j * L + at, e);
      sum = sum + e;
      mix = fma(e, load(ds + j * L + at), mix);
    }
    const Vec kept = load(x.l + at) * a, total = kept + sum;
    // a row that saw nothing yet has total 0, and mean 0
    const Vec now = fma(mean, kept, mix) / max(total, set1(1e-37f)), shift = now - mean;
    Vec excess = set1(0.f);
    for (int64_t j = 0; j < count; ++j) {
      const Vec g = load(p + j * L + at) * (load(ds + j * L + at) - now);
      store(ds + j * L + at, g);
      excess = excess + g;
    }
    store(x.excess + at, fma(load(x.excess + at), a, excess) - shift * kept);
    store(x.m + at, top);
    store(x.l + at, total);
    store(x.mean + at, now);
    store(x.alpha + at, a);
    store(x.beta + at, (mean - now) * a);
  }
}

// dQ = scale sum_j dS_j K_j.
template <class T> void dq_tile(const AttentionArgs& a, int64_t item, float* scratch) {
  const Tile x = row_tile(a, item);
  const int64_t R = a.group(), D = a.D;
  float *qt = scratch, *dot = qt + D * L, *dqt = dot + D * L, *pkt = dqt + D * L, *p = pkt + D * L,
        *ds = p + NB * L, *slopes = ds + NB * L, *lanes = slopes + NB * L, *k_space = lanes + 6 * L,
        *v_space = k_space + NB * a.padded();
  const Stats stats = {lanes, lanes + L, lanes + 2 * L, lanes + 3 * L, lanes + 4 * L, lanes + 5 * L};
  RowWords words;
  if (!a.dropout.none()) draw_words(a, x, words);
  if (x.rows < L) clear(qt, 2 * D * L);
  clear(dqt, 2 * D * L);
  clear(lanes, 4 * L);
  for (int lane = 0; lane < L; ++lane) {
    stats.m[lane] = first_score(a, x.g * R + (x.first + lane) % R);
    stats.l[lane] = first_sum(a);  // of the sink's dP, which is 0
  }
  for (int lane = 0; lane < x.rows; ++lane) {
    const int64_t row = x.first + lane, h = x.g * R + row % R, i = row / R;
    transpose_in(at<T>(a.q, x.b, h, i), qt, lane, D);
    transpose_in(at<T>(a.dout, x.b, h, i), dot, lane, D);
  }
  for (int64_t j = x.from; j < x.to; j += NB) {
    const int64_t count = least(NB, x.to - j);
    if (a.blocks.data && !sees_any(a, x, j, count)) continue;
    const Rows k = stage(at<T>(a.k, x.b, x.g, j), a.k.row, count, D, k_space);
    const Rows v = stage(at<T>(a.v, x.b, x.g, j), a.v.row, count, D, v_space);
    gemm<true, SET>(k.data, k.stride, qt, p, count, D, x.vectors, {score_factor(a)});
    gemm_in_parts(v.data, v.stride, dot, ds, count, D, x.vectors);
    if (!a.dropout.none()) drop(ds, a.dropout, words, j, count);
    if (a.softcap != 0.f) cap(p, slopes, count, x.vectors, a.softcap);
    if (a.bias.data) add_bias(a, x, p, j, count);
    mask_rows(p, j, count, x);
    if (a.blocks.data) keep_blocks(a, x, p, j, count);
    statistics_step(p, ds, count, x.vectors, stats);
    if (a.softcap != 0.f) {
      times(p, slopes, count, x.vectors);
      times(ds, slopes, count, x.vectors);
    }
    const Carry carry = {1.f, stats.alpha, stats.beta, pkt};
    gemm<false, SHIFT>(k.data, k.stride, ds, dqt, D, count, x.vectors, carry);
    gemm<false, RESCALE>(k.data, k.stride, p, pkt, D, count, x.vectors, carry);
  }
  for (int lane = 0; lane < x.rows; ++lane) {
    const int64_t row = x.first + lane, h = x.g * R + row % R, i = row / R, flat = (x.b * a.H + h) * a.S + i;
    const float norm = blind(a, x.b, i, stats.l[lane]) ? 0.f : 1.f / stats.l[lane];
    const float drift = stats.excess[lane] * norm - (a.dlse ? a.dlse[flat] : 0.f);
    for (int64_t d = 0; d < D; ++d) dqt[d * L + lane] -= drift * pkt[d * L + lane];
    transpose_out(dqt, at<T>(a.dq, x.b, h, i), lane, D, a.scale * norm, k_space);
    a.rows.top[flat] = stats.m[lane];
    a.rows.norm[flat] = norm;
    a.rows.mean[flat] = stats.mean[lane];
    a.rows.drift[flat] = drift;
  }
}

// Scores p and products ds = dP of queries (rows) and keys (lanes) become P and dS.
TW_INLINE void score_gradient(float* p, float* ds, int64_t count, int vectors, const AttentionRows& rows, int64_t flat) {
  for (int64_t j = 0; j < count; ++j) {
    const Vec top = set1(rows.top[flat + j]), norm = set1(rows.norm[flat + j]), mean = set1(rows.mean[flat + j]),
              drift = set1(rows.drift[flat + j]);
    for (int c = 0; c < vectors; ++c) {
      float *pj = p + j * L + c * W, *dj = ds + j * L + c * W;
      const Vec prob = exp(load(pj) - top) * norm;
      store(pj, prob);
      store(dj, prob * ((load(dj) - mean) - drift));
    }
  }
}

// Lanes of one row, of keys from j0 on: times what dropout makes of them.
TW_INLINE void drop_row(float* x, const AttentionDropout& dropout, Words words, int64_t j0) {
  for (int lane = 0; lane < L; ++lane) x[lane] *= kept(dropout, uint32_t(j0 + lane), words);
}

// Whether any of queries i .. i + count - 1 of head h sees one of keys first .. first + keys - 1.
TW_INLINE bool meets(const AttentionArgs& a, int64_t b, int64_t h, int64_t i, int64_t count, int64_t first, int64_t keys) {
  for (int64_t r = i; r < i + count; ++r)
    if (most(first, a.from(b, r)) < least(first + keys, a.to(b, r)) &&
        (!a.blocks.data || sees_any(a.blocks.of(b, h, r), a.blocks.size, first, keys)))
      return true;
  return false;
}

// L keys, in the lanes.
struct Keys {
  int64_t b, g, first;
  int count, vectors;
  int64_t start, stop;  // the queries that may see one
  float *kt, *vt;       // [D, L]
};

template <class T> Keys key_tile(const AttentionArgs& a, int64_t b, int64_t g, int64_t first, float* kt) {
  const int64_t D = a.D, offset = a.T - a.S;
  Keys x = {b, g, first, int(least(L, a.T - first)), 0, 0, a.S, kt, kt + D * L};
  x.vectors = (x.count + W - 1) / W;
  if (!a.begin) x.start = most(0, first - offset - a.right), x.stop = least(a.S, first + x.count - offset + a.left);
  if (x.count < L) clear(kt, 2 * D * L);
  for (int lane = 0; lane < x.count; ++lane) {
    transpose_in(at<T>(a.k, b, g, first + lane), x.kt, lane, D);
    transpose_in(at<T>(a.v, b, g, first + lane), x.vt, lane, D);
  }
  return x;
}

// Of queries i .. i + count - 1 of head h, which is broadcast, and a tile of keys: P, of which dropout
// leaves what dv takes, dS, and the slopes of the cap, [count, L] each.
struct Scores {
  float *p, *ds, *slopes, *q_space, *do_space;
  Rows q, dout;
};

template <class T>
void scores_of(const AttentionArgs& a, const Keys& x, int64_t h, int64_t i, int64_t count, Scores& s) {
  s.q = stage(at<T>(a.q, x.b, h, i), a.q.row, count, a.D, s.q_space);
  s.dout = stage(at<T>(a.dout, x.b, h, i), a.dout.row, count, a.D, s.do_space);
  gemm<true, SET>(s.q.data, s.q.stride, x.kt, s.p, count, a.D, x.vectors, {score_factor(a)});
  gemm_in_parts(s.dout.data, s.dout.stride, x.vt, s.ds, count, a.D, x.vectors);
  if (a.softcap != 0.f) cap(s.p, s.slopes, count, x.vectors, a.softcap);
  for (int64_t r = 0; r < count; ++r) {
    float* const p = s.p + r * L;
    if (a.bias.data) {
      const float* const bias = a.bias.at(x.b, h, i + r, x.first);
      for (int lane = 0; lane < x.count; ++lane) p[lane] += hiding(bias[lane * a.bias.key]);
    }
    keep_lanes(p, a.from(x.b, i + r) - x.first, a.to(x.b, i + r) - x.first);
    if (a.blocks.data) keep_blocks(p, 1, a.blocks.of(x.b, h, i + r), a.blocks.size, x.first, x.count);
    if (!a.dropout.none()) drop_row(s.ds + r * L, a.dropout, row_words(a, x.b, h, i + r), x.first);
  }
  score_gradient(s.p, s.ds, count, x.vectors, a.rows, (x.b * a.H + h) * a.S + i);
  if (!a.dropout.none())
    for (int64_t r = 0; r < count; ++r)
      drop_row(s.p + r * L, a.dropout, row_words(a, x.b, h, i + r), x.first);
}

// dK and dV of L keys, summed over the heads that share them.
template <class T> void dkv_tile(const AttentionArgs& a, int64_t item, float* scratch) {
  const int64_t R = a.group(), D = a.D, n = a.key_tiles(), bg = item / n;
  float *kt = scratch, *dkt = kt + 2 * D * L, *dvt = dkt + D * L, *p = dvt + D * L, *space = p + 3 * NB * L;
  Scores s = {p, p + NB * L, p + 2 * NB * L, space, space + NB * a.padded(), {}, {}};
  const Keys x = key_tile<T>(a, bg / a.G, bg % a.G, folded(item % n, n) * L, kt);
  clear(dkt, 2 * D * L);
  for (int64_t h = x.g * R; h < (x.g + 1) * R; ++h)
    for (int64_t i = x.start; i < x.stop; i += NB) {
      const int64_t count = least(NB, x.stop - i);
      if (!meets(a, x.b, h, i, count, x.first, x.count)) continue;
      scores_of<T>(a, x, h, i, count, s);
      if (a.softcap != 0.f) times(s.ds, s.slopes, count, x.vectors);
      gemm<false, ADD>(s.q.data, s.q.stride, s.ds, dkt, D, count, x.vectors);
      gemm<false, ADD>(s.dout.data, s.dout.stride, s.p, dvt, D, count, x.vectors);
    }
  for (int lane = 0; lane < x.count; ++lane) {
    transpose_out(dkt, at<T>(a.dk, x.b, x.g, x.first + lane), lane, D, a.scale, space);
    transpose_out(dvt, at<T>(a.dv, x.b, x.g, x.first + lane), lane, D, 1.f, space);
  }
}

TW_INLINE float sum(const float* x, int64_t n) {
  float total = 0.f;
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total;
}

// dS [count, L] of queries from i on into the gradient of the bias; a block is summed before it meets
// what others gave.
TW_INLINE void add_gradients(const AttentionArgs& a, const Keys& x, const float* ds, int64_t h, int64_t i, int64_t count) {
  float columns[L] = {};
  for (int64_t r = 0; r < count; ++r, ds += L) {
    float* const to = a.dbias.at(x.b, h, i + r, x.first);
    if (a.dbias.row && !a.dbias.key) *to += sum(ds, x.count);
    for (int lane = 0; lane < x.count && a.dbias.row && a.dbias.key; ++lane) to[lane * a.dbias.key] += ds[lane];
    for (int lane = 0; lane < x.count && !a.dbias.row; ++lane) columns[lane] += ds[lane];
  }
  float* const to = a.dbias.at(x.b, h, i, x.first);
  if (!a.dbias.row && !a.dbias.key) *to += sum(columns, x.count);
  for (int lane = 0; lane < x.count && !a.dbias.row && a.dbias.key; ++lane) to[lane * a.dbias.key] += columns[lane];
}

// The gradient of a bias, which starts as zeros: dS, summed over what shares it.
template <class T> void dbias_item(const AttentionArgs& a, int64_t item, float* scratch) {
  const int64_t D = a.D, n = a.dbias.key ? a.key_tiles() : 1, heads = a.dbias.head ? a.H : 1;
  const int64_t tile = folded(item % n, n), plane = item / n, b = plane / heads, h = plane % heads;
  float *kt = scratch, *p = kt + 2 * D * L, *space = p + 3 * NB * L;
  Scores s = {p, p + NB * L, p + 2 * NB * L, space, space + NB * a.padded(), {}, {}};
  for (int64_t bh = 0; bh < a.B * a.H; ++bh) {
    if ((a.dbias.batch && bh / a.H != b) || (a.dbias.head && bh % a.H != h)) continue;
    for (int64_t t = a.dbias.key ? tile : 0; t < (a.dbias.key ? tile + 1 : a.key_tiles()); ++t) {
      const Keys x = key_tile<T>(a, bh / a.H, bh % a.H / a.group(), t * L, kt);
      for (int64_t i = x.start; i < x.stop; i += NB) {
        const int64_t count = least(NB, x.stop - i);
        if (!meets(a, x.b, bh % a.H, i, count, x.first, x.count)) continue;
        scores_of<T>(a, x, bh % a.H, i, count, s);
        add_gradients(a, x, s.ds, bh % a.H, i, count);
      }
    }
  }
}

}  // namespace

void attention_dq(const AttentionArgs& a, float* scratch, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(a.dtype, T, for (int64_t i = begin; i < end; ++i) dq_tile<T>(a, i, scratch));
}

void attention_dkv(const AttentionArgs& a, float* scratch, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(a.dtype, T, for (int64_t i = begin; i < end; ++i) dkv_tile<T>(a, i, scratch));
}

void attention_dbias(const AttentionArgs& a, float* scratch, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(a.dtype, T, for (int64_t i = begin; i < end; ++i) dbias_item<T>(a, i, scratch));
}

}  // namespace tilewright::cpu::TW_ISA
