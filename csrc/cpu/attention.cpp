// Attention's forward for many queries, one translation unit per instruction set: blocked, after Dao
// 2023, arXiv:2307.08691, algorithm 1.  Arithmetic and statistics are float32.  Few queries are
// attention_decode.cpp's.
#include "attention_tile.h"

namespace tilewright::cpu::TW_ISA {
namespace {

// One online-softmax step over scores [count, L]: the scores become probabilities, m and l
// the running maximum and sum, alpha what the output so far is scaled by.
TW_INLINE void softmax_step(float* scores, int64_t count, int vectors, float* m, float* l, float* alpha) {
  for (int c = 0; c < vectors; ++c) {
    float* s = scores + c * W;
    const Vec old = load(m + c * W);
    Vec top = old, other = old;
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
      top = max(top, load(s + j * L));
      other = max(other, load(s + (j + 1) * L));
    }
    if (j < count) top = max(top, load(s + j * L));
    top = max(top, other);
    const Vec a = exp(old - top);
    Vec sum = set1(0.f);
    for (j = 0; j < count; ++j) {
      const Vec p = exp(load(s + j * L) - top);
      store(s + j * L, p);
      sum = sum + p;
    }
    store(m + c * W, top);
    store(l + c * W, fma(load(l + c * W), a, sum));
    store(alpha + c * W, a);
  }
}

template <class T> void prefill_tile(const AttentionArgs& a, int64_t item, float* scratch) {
  const Tile x = row_tile(a, item);
  const int64_t R = a.group(), D = a.D;
  float *qt = scratch, *ot = qt + D * L, *scores = ot + D * L, *m = scores + NB * L, *l = m + L,
        *alpha = l + L, *k_space = alpha + L, *v_space = k_space + NB * a.padded();
  RowWords words;
  if (!a.dropout.none()) draw_words(a, x, words);
  if (x.rows < L) clear(qt, D * L);
  clear(ot, D * L);
  for (int lane = 0; lane < L; ++lane) {
    m[lane] = first_score(a, x.g * R + (x.first + lane) % R);
    l[lane] = first_sum(a);
  }
  for (int lane = 0; lane < x.rows; ++lane) {
    const int64_t row = x.first + lane;
    transpose_in(at<T>(a.q, x.b, x.g * R + row % R, row / R), qt, lane, D);
  }
  for (int64_t j = x.from; j < x.to; j += NB) {
    const int64_t count = least(NB, x.to - j);
    if (a.blocks.data && !sees_any(a, x, j, count)) continue;
    const Rows k = stage(at<T>(a.k, x.b, x.g, j), a.k.row, count, D, k_space);
    gemm<true, SET>(k.data, k.stride, qt, scores, count, D, x.vectors, {score_factor(a)});
    if (a.softcap != 0.f) cap(scores, nullptr, count, x.vectors, a.softcap);
    if (a.bias.data) add_bias(a, x, scores, j, count);
    mask_rows(scores, j, count, x);
    if (a.blocks.data) keep_blocks(a, x, scores, j, count);
    softmax_step(scores, count, x.vectors, m, l, alpha);
    if (!a.dropout.none()) drop(scores, a.dropout, words, j, count);
    const Rows v = stage(at<T>(a.v, x.b, x.g, j), a.v.row, count, D, v_space);
    gemm<false, RESCALE>(v.data, v.stride, scores, ot, D, count, x.vectors, {1.f, alpha});
  }
  for (int lane = 0; lane < x.rows; ++lane) {
    const int64_t row = x.first + lane, i = row / R;
    const int64_t h = x.g * R + row % R;
    transpose_out(ot, at<T>(a.out, x.b, h, i), lane, D, blind(a, x.b, i, l[lane]) ? 0.f : 1.f / l[lane], k_space);
    a.lse[(x.b * a.H + h) * a.S + i] = lse_of(m[lane], l[lane]);
  }
}

}  // namespace

void attention_prefill(const AttentionArgs& a, float* scratch, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(a.dtype, T, for (int64_t i = begin; i < end; ++i) prefill_tile<T>(a, i, scratch));
}

}  // namespace tilewright::cpu::TW_ISA
