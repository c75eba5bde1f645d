// What the blocked attention kernels, forward and backward, are made of.
//
// They keep one side of the score matrix in vector lanes and broadcast the other:
// S^T[j, lanes] = sum_d K[j, d] Q^T[d, lanes].  Only the lane side is transposed, once a tile; the
// softmax is vertical, with no reduction across lanes; and K and V are read as they lie.
#pragma once
#include "attention.h"

#include "simd.h"

namespace tilewright::cpu::TW_ISA {

// beside load(const bf16*) and the like, or it would hide them
TW_INLINE Vec load(float* p) { return load(static_cast<const float*>(p)); }

namespace {

constexpr int L = ATTENTION_LANES, NB = ATTENTION_BLOCK;
constexpr float LOWEST = -3.402823466e38f;  // a running maximum that -inf minus it is not nan
constexpr float INF = __builtin_inff();
constexpr float HIDDEN = -2.3587e38f;  // a bias below it hides its key

// Register tile: MR broadcasts x NV vectors of accumulators fill 24 of AVX-512's 32 registers, 12
// of AVX2's 16.
#if defined(__AVX512F__)
constexpr int MR = 8, NV = 3;
#else
constexpr int MR = 4, NV = 3;
#endif

TW_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TW_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
TW_INLINE float most(float a, float b) { return a > b ? a : b; }

// a * b + c, rounded once.  The scalar level's fma rounds twice, and what a score of 1000 is off by,
// its probability is off by a thousandfold.
TW_INLINE Vec mul_add(Vec a, Vec b, Vec c) {
#if defined(__AVX2__)
  return fma(a, b, c);
#elif defined(__FP_FAST_FMAF)
  return {__builtin_fmaf(a.v, b.v, c.v)};
#else
  return {float(double(a.v) * double(b.v) + double(c.v))};
#endif
}

template <class T> TW_INLINE T* at(const AttentionView& x, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head + row * x.row;
}

// What becomes of C: factor * A B; C + A B; alpha * C + A B; alpha * C + beta * other + A B, where
// alpha and beta are by lane.
enum Mode { SET, ADD, RESCALE, SHIFT };
struct Carry {
  float factor = 1.f;
  const float *alpha = nullptr, *beta = nullptr, *other = nullptr;
};

// A[i, k] is A[i * sa + k] where ALONG_K, else A[k * sa + i]; B and C have rows of L lanes, of which
// those from `lane` on are met.  Each element is one chain over k, so the backward's two halves, which
// swap A and B, compute the same scores to the last bit.
template <int M_, int N_, bool ALONG_K, Mode MODE>
TW_INLINE void micro(const float* A, int64_t sa, const float* B, float* C, int64_t K, int64_t from, int lane,
                     const Carry& carry) {
  Vec acc[M_][N_];
#pragma GCC unroll 8
  for (int i = 0; i < M_; ++i)
#pragma GCC unroll 3
    for (int n = 0; n < N_; ++n) acc[i][n] = set1(0.f);
  for (int64_t k = 0; k < K; ++k) {
    Vec b[N_];
#pragma GCC unroll 3
    for (int n = 0; n < N_; ++n) b[n] = load(B + k * L + lane + n * W);
#pragma GCC unroll 8
    for (int i = 0; i < M_; ++i) {
      const Vec a = set1(ALONG_K ? A[(from + i) * sa + k] : A[k * sa + from + i]);
#pragma GCC unroll 3
      for (int n = 0; n < N_; ++n) acc[i][n] = mul_add(a, b[n], acc[i][n]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M_; ++i)
#pragma GCC unroll 3
    for (int n = 0; n < N_; ++n) {
      const int64_t at = (from + i) * L + lane + n * W;
      // meeting C only now sums in blocks, whose error grows slower than one long chain's
      if (MODE == SET) acc[i][n] = acc[i][n] * set1(carry.factor);
      if (MODE == ADD) acc[i][n] = load(C + at) + acc[i][n];
      if (MODE == SHIFT) acc[i][n] = fma(load(carry.other + at), load(carry.beta + lane + n * W), acc[i][n]);
      if (MODE == RESCALE || MODE == SHIFT)
        acc[i][n] = fma(load(C + at), load(carry.alpha + lane + n * W), acc[i][n]);
      store(C + at, acc[i][n]);
    }
}

template <int N_, bool ALONG_K, Mode MODE>
void panel(const float* A, int64_t sa, const float* B, float* C, int64_t M, int64_t K, int lane, const Carry& carry) {
  int64_t i = 0;
  for (; i + MR <= M; i += MR) micro<MR, N_, ALONG_K, MODE>(A, sa, B, C, K, i, lane, carry);
  if (MR > 4 && i + 4 <= M) {
    micro<4, N_, ALONG_K, MODE>(A, sa, B, C, K, i, lane, carry);
    i += 4;
  }
  if (i + 2 <= M) {
    micro<2, N_, ALONG_K, MODE>(A, sa, B, C, K, i, lane, carry);
    i += 2;
  }
  if (i < M) micro<1, N_, ALONG_K, MODE>(A, sa, B, C, K, i, lane, carry);
}

// C [M, lanes] from A [M, K] and B [K, lanes], for the first `vectors` vectors of lanes.
template <bool ALONG_K, Mode MODE>
void gemm(const float* A, int64_t sa, const float* B, float* C, int64_t M, int64_t K, int vectors,
          const Carry& carry = {}) {
  int n = 0;
  for (; n + NV <= vectors; n += NV) panel<NV, ALONG_K, MODE>(A, sa, B, C, M, K, n * W, carry);
  if (vectors - n == 2) panel<2, ALONG_K, MODE>(A, sa, B, C, M, K, n * W, carry);
  if (vectors - n == 1) panel<1, ALONG_K, MODE>(A, sa, B, C, M, K, n * W, carry);
}

constexpr int64_t SHORT = 16;

// C = A B [M, lanes] over K in parts: what differs by little, as dP from its mean, cannot afford the
// error of one chain, twice a dot product's with W partial sums.
TW_INLINE void gemm_in_parts(const float* A, int64_t sa, const float* B, float* C, int64_t M, int64_t K, int vectors) {
  gemm<true, SET>(A, sa, B, C, M, least(K, SHORT), vectors);
  for (int64_t k = SHORT; k < K; k += SHORT) gemm<true, ADD>(A + k, sa, B + k * L, C, M, least(K - k, SHORT), vectors);
}

struct Rows {
  const float* data;
  int64_t stride;
};

template <class T> TW_INLINE void convert(const T* from, float* to, int64_t D) {
  int64_t d = 0;
  for (; d + W <= D; d += W) store(to + d, load(from + d));
  for (; d < D; ++d) to[d] = to_float(from[d]);
}

// `count` rows as float32: converted into `space`, or where they lie.
template <class T> Rows stage(const T* from, int64_t stride, int64_t count, int64_t D, float* space) {
  for (int64_t j = 0; j < count; ++j) convert(from + j * stride, space + j * D, D);
  return {space, D};
}
inline Rows stage(const float* from, int64_t stride, int64_t count, int64_t D, float* space) {
  // far-apart rows are copied: at a stride of whole pages they would share a few cache sets
  return stride <= 2 * D ? Rows{from, stride} : stage<float>(from, stride, count, D, space);
}

// Column `lane` of to [D, L] = from.
template <class T> TW_INLINE void transpose_in(const T* from, float* to, int lane, int64_t D) {
  for (int64_t d = 0; d < D; ++d) to[d * L + lane] = to_float(from[d]);
}
template <class T>
TW_INLINE void transpose_out(const float* from, T* to, int lane, int64_t D, float factor, float* space) {
  for (int64_t d = 0; d < D; ++d) space[d] = from[d * L + lane] * factor;
  int64_t d = 0;
  for (; d + W <= D; d += W) store(to + d, load(space + d));
  for (; d < D; ++d) to[d] = from_float<T>(space[d]);
}
TW_INLINE void clear(float* p, int64_t n) { __builtin_memset(p, 0, size_t(n) * sizeof(float)); }

// Under a causal mask a contiguous range of tiles costs as much as any other when cheap and dear
// ones alternate: 0, n-1, 1, n-2, ...
TW_INLINE int64_t folded(int64_t t, int64_t n) { return t % 2 ? n - 1 - t / 2 : t / 2; }

// The rows of one tile: which kv head, which flattened rows, and the keys each of them, all and any see.
struct Tile {
  int64_t b, g, first;
  int rows, vectors;
  int32_t lo[L], hi[L];
  int64_t from, open, whole, to;  // some see keys from `from`, all those from `open` to `whole`
};

TW_INLINE Tile row_tile(const AttentionArgs& a, int64_t item) {
  const int64_t R = a.group(), n = a.row_tiles(), t = folded(item % n, n), bg = item / n;
  Tile x;
  x.b = bg / a.G;
  x.g = bg % a.G;
  x.first = t * L;
  x.rows = int(least(L, a.S * R - x.first));
  x.vectors = (x.rows + W - 1) / W;
  x.from = x.whole = a.T, x.open = x.to = 0;
  for (int lane = 0; lane < L; ++lane) {
    const int64_t i = (x.first + least(lane, x.rows - 1)) / R, lo = a.from(x.b, i), hi = a.to(x.b, i);
    x.lo[lane] = int32_t(lo), x.hi[lane] = int32_t(hi);
    if (lo < hi) x.from = least(x.from, lo), x.to = most(x.to, hi);
    x.open = most(x.open, lo), x.whole = least(x.whole, hi);
  }
  return x;
}

// Lanes of one row of scores: -inf but for those from `begin` to before `end`.
TW_INLINE void keep_lanes(float* scores, int64_t begin, int64_t end) {
  for (int64_t lane = 0; lane < least(L, begin); ++lane) scores[lane] = -INF;
  for (int64_t lane = most(0, end); lane < L; ++lane) scores[lane] = -INF;
}

// Scores [count, L] of keys from j0 on: -inf where a row may not look.
TW_INLINE void mask_rows(float* scores, int64_t j0, int64_t count, const Tile& x) {
  if (j0 >= x.open && j0 + count <= x.whole) return;
  for (int32_t j = int32_t(j0); j < j0 + count; ++j, scores += L)
    for (int lane = 0; lane < L; ++lane)
      scores[lane] = (j >= x.lo[lane]) & (j < x.hi[lane]) ? scores[lane] : -INF;
}

// Whether one of keys j0 .. j0 + count - 1 is in a block that `seen` says is.
TW_INLINE bool sees_any(const bool* seen, int64_t size, int64_t j0, int64_t count) {
  for (int64_t block = j0 / size; block * size < j0 + count; ++block)
    if (seen[block]) return true;
  return false;
}

// -inf for those scores, `step` apart, of keys in blocks that `seen` says are none.
TW_INLINE void keep_blocks(float* scores, int64_t step, const bool* seen, int64_t size, int64_t j0, int64_t count) {
  for (int64_t j = 0, end; j < count; j = end) {
    const int64_t block = (j0 + j) / size;
    end = least(count, (block + 1) * size - j0);
    for (int64_t at = j; at < end && !seen[block]; ++at) scores[at * step] = -INF;
  }
}

// The same of a tile's rows and keys from j0 on.
TW_INLINE bool sees_any(const AttentionArgs& a, const Tile& x, int64_t j0, int64_t count) {
  const int64_t R = a.group();
  for (int64_t row = x.first; row < x.first + x.rows; ++row)
    if (sees_any(a.blocks.of(x.b, x.g * R + row % R, row / R), a.blocks.size, j0, count)) return true;
  return false;
}
TW_INLINE void keep_blocks(const AttentionArgs& a, const Tile& x, float* scores, int64_t j0, int64_t count) {
  const int64_t R = a.group();
  for (int lane = 0; lane < x.rows; ++lane) {
    const int64_t row = x.first + lane;
    keep_blocks(scores + lane, L, a.blocks.of(x.b, x.g * R + row % R, row / R), a.blocks.size, j0, count);
  }
}

TW_INLINE float hiding(float bias) { return bias < HIDDEN ? -INF : bias; }

// Scores [count, L] of keys from j0 on and a tile's rows, with their bias.
TW_INLINE void add_bias(const AttentionArgs& a, const Tile& x, float* scores, int64_t j0, int64_t count) {
  const int64_t R = a.group();
  for (int lane = 0; lane < x.rows; ++lane) {
    const int64_t row = x.first + lane;
    const float* const bias = a.bias.at(x.b, x.g * R + row % R, row / R, j0);
    for (int64_t j = 0; j < count; ++j) scores[j * L + lane] += hiding(bias[j * a.bias.key]);
  }
}

// 32 bits of x, well mixed, and y: two rounds of Wellons' lowbias32.
TW_INLINE uint32_t mixed(uint32_t x, uint32_t y) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  return (x ^ y ^ (x >> 15)) * 0x846CA68Bu;
}

// Two words that the draws of a row's keys come from; the row is mixed before the seed comes to it, else
// seeds that are neighbours share their rows.
struct Words {
  uint32_t a, b;
};
TW_INLINE Words row_words(const AttentionArgs& a, int64_t b, int64_t h, int64_t i) {
  const uint64_t row = uint64_t((b * a.H + h) * a.S + i);
  const uint32_t* const seed = a.dropout.seed;
  uint32_t w = mixed(uint32_t(row), uint32_t(row >> 32));
  w = mixed((w ^ (w >> 16)) + seed[0], seed[1]);
  w ^= w >> 16;
  return {w, mixed(w, seed[1])};
}

// What dropout makes a probability times.
TW_INLINE float kept(const AttentionDropout& x, uint32_t key, Words w) {
  return mixed(key * 0x9E3779B9u + w.a, w.b) >= x.least ? x.kept : 0.f;
}

// The words of a tile's rows.
struct RowWords {
  uint32_t a[L], b[L];
};
TW_INLINE void draw_words(const AttentionArgs& a, const Tile& x, RowWords& words) {
  const int64_t R = a.group();
  for (int lane = 0; lane < L; ++lane) {
    const int64_t row = x.first + lane;
    const Words w = row_words(a, x.b, x.g * R + row % R, row / R);
    words.a[lane] = w.a, words.b[lane] = w.b;
  }
}

// [count, L] of keys from j0 on: times what dropout makes of them.
TW_INLINE void drop(float* x, const AttentionDropout& dropout, const RowWords& words, int64_t j0, int64_t count) {
  for (int64_t j = 0; j < count; ++j)
    for (int lane = 0; lane < L; ++lane)
      x[j * L + lane] *= kept(dropout, uint32_t(j0 + j), {words.a[lane], words.b[lane]});
}

// Whether a row gives 0, and not 0 / 0.
TW_INLINE bool blind(const AttentionArgs& a, int64_t b, int64_t i, float sum) {
  return a.blind(b, i) || ((a.bias.data || a.blocks.data) && sum == 0.f);
}

// What a row of head h starts with: the sink, or nothing.
TW_INLINE float first_score(const AttentionArgs& a, int64_t h) {
  return !a.sinks || a.sinks[h] < LOWEST ? LOWEST : a.sinks[h];  // nan stays
}
TW_INLINE float first_sum(const AttentionArgs& a) { return a.sinks ? 1.f : 0.f; }

// The log of a row's denominator.
TW_INLINE float lse_of(float top, float sum) { return top == LOWEST ? -INF : top + __builtin_logf(sum); }

// What the products q . k are multiplied by: the cap takes scores divided by it.
TW_INLINE float score_factor(const AttentionArgs& a) { return a.softcap != 0.f ? a.scale / a.softcap : a.scale; }

// tanh x and its slope, each within a few ulp: below 0.625 Cephes' polynomial, as (1 - e) / (1 + e)
// would cancel; above it 4 e / (1 + e)^2, as 1 - tanh^2 would.
TW_INLINE Vec tanh(Vec x, Vec& slope) {
  const Vec zero = set1(0.f), one = set1(1.f), size = max(zero - x, x), z = x * x;
  Vec p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const Vec small = fma(x, z * p, x), e = exp(set1(-2.f) * size), sum = one + e;
  const Vec large = (one - e) / sum, near = set1(0.625f) - size;
  slope = select_positive(near, one - small * small, set1(4.f) * e / (sum * sum));
  return select_positive(near, small, select_positive(x, large, zero - large));
}

// Scores that come divided by the cap, [count, L]: capped; slopes [count, L] where they are wanted.
TW_INLINE void cap(float* scores, float* slopes, int64_t count, int vectors, float softcap) {
  for (int64_t j = 0; j < count; ++j)
    for (int c = 0; c < vectors; ++c) {
      const int64_t at = j * L + c * W;
      Vec slope;
      store(scores + at, tanh(load(scores + at), slope) * set1(softcap));
      if (slopes) store(slopes + at, slope);
    }
}

// [count, L] times the slopes.
TW_INLINE void times(float* x, const float* slopes, int64_t count, int vectors) {
  for (int64_t j = 0; j < count; ++j)
    for (int c = 0; c < vectors; ++c) {
      const int64_t at = j * L + c * W;
      store(x + at, load(x + at) * load(slopes + at));
    }
}

}  // namespace
}  // namespace tilewright::cpu::TW_ISA
