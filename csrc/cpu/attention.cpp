// Attention, one translation unit per instruction set.  Arithmetic and statistics are float32.
//
// Blocked kernels (prefill and backward) keep one side of the score matrix in vector lanes and
// broadcast the other: S^T[j, lanes] = sum_d K[j, d] Q^T[d, lanes].  Only the lane side is
// transposed, once a tile; the softmax is vertical, with no reduction across lanes; and K and V are
// read as they lie.  Dao 2023, arXiv:2307.08691, algorithms 1 and 2.
#include "attention.h"

#include "simd.h"

namespace tilewright::cpu::TW_ISA {
namespace {

constexpr int L = ATTENTION_LANES, NB = ATTENTION_BLOCK, CHUNK = ATTENTION_CHUNK;
constexpr float LOWEST = -3.402823466e38f;  // a running maximum that -inf minus it is not nan
constexpr float INF = __builtin_inff();

// Register tile: MR broadcasts x NV vectors of accumulators fill 24 of AVX-512's 32 registers, 12
// of AVX2's 16.
#if defined(__AVX512F__)
constexpr int MR = 8, NV = 3;
#else
constexpr int MR = 4, NV = 3;
#endif

TW_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TW_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T> TW_INLINE T* at(const AttentionView& x, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head + row * x.row;
}

TW_INLINE float exp(float x) {
  float lanes[W];
  store(static_cast<float*>(lanes), exp(set1(x)));
  return lanes[0];
}

// ---- Blocked kernels -------------------------------------------------------------------------

enum Mode { SET, ADD, RESCALE };  // C = A B; C += A B; C = C * alpha[lane] + A B

// A[i, k] is A[i * sa + k] where ALONG_K, else A[k * sa + i]; B and C have rows of L lanes.
template <int M_, int N_, bool ALONG_K, Mode MODE>
TW_INLINE void micro(const float* A, int64_t sa, const float* B, float* C, int64_t K, const float* alpha) {
  Vec acc[M_][N_];
#pragma GCC unroll 8
  for (int i = 0; i < M_; ++i)
#pragma GCC unroll 3
    for (int n = 0; n < N_; ++n) acc[i][n] = set1(0.f);
  for (int64_t k = 0; k < K; ++k) {
    Vec b[N_];
#pragma GCC unroll 3
    for (int n = 0; n < N_; ++n) b[n] = load(B + k * L + n * W);
#pragma GCC unroll 8
    for (int i = 0; i < M_; ++i) {
      const Vec a = set1(ALONG_K ? A[i * sa + k] : A[k * sa + i]);
#pragma GCC unroll 3
      for (int n = 0; n < N_; ++n) acc[i][n] = fma(a, b[n], acc[i][n]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M_; ++i)
#pragma GCC unroll 3
    for (int n = 0; n < N_; ++n) {
      float* c = C + i * L + n * W;
      // adding only now sums in blocks, whose error grows slower than one long chain's
      if (MODE == ADD) acc[i][n] = load(static_cast<const float*>(c)) + acc[i][n];
      if (MODE == RESCALE) acc[i][n] = fma(load(static_cast<const float*>(c)), load(alpha + n * W), acc[i][n]);
      store(c, acc[i][n]);
    }
}

template <int N_, bool ALONG_K, Mode MODE>
void panel(const float* A, int64_t sa, const float* B, float* C, int64_t M, int64_t K, const float* alpha) {
  const int64_t step = ALONG_K ? sa : 1;
  int64_t i = 0;
  for (; i + MR <= M; i += MR) micro<MR, N_, ALONG_K, MODE>(A + i * step, sa, B, C + i * L, K, alpha);
  if (MR > 4 && i + 4 <= M) {
    micro<4, N_, ALONG_K, MODE>(A + i * step, sa, B, C + i * L, K, alpha);
    i += 4;
  }
  if (i + 2 <= M) {
    micro<2, N_, ALONG_K, MODE>(A + i * step, sa, B, C + i * L, K, alpha);
    i += 2;
  }
  if (i < M) micro<1, N_, ALONG_K, MODE>(A + i * step, sa, B, C + i * L, K, alpha);
}

// C [M, lanes] from A [M, K] and B [K, lanes], for the first `vectors` vectors of lanes.
template <bool ALONG_K, Mode MODE>
void gemm(const float* A, int64_t sa, const float* B, float* C, int64_t M, int64_t K, int vectors,
          const float* alpha = nullptr) {
  int n = 0;
  for (; n + NV <= vectors; n += NV) panel<NV, ALONG_K, MODE>(A, sa, B + n * W, C + n * W, M, K, alpha + n * W);
  if (vectors - n == 2) panel<2, ALONG_K, MODE>(A, sa, B + n * W, C + n * W, M, K, alpha + n * W);
  if (vectors - n == 1) panel<1, ALONG_K, MODE>(A, sa, B + n * W, C + n * W, M, K, alpha + n * W);
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
Rows stage(const float* from, int64_t stride, int64_t count, int64_t D, float* space) {
  // far-apart rows are copied: at a stride of whole pages they would share a few cache sets
  return stride <= 2 * D ? Rows{from, stride} : stage<float>(from, stride, count, D, space);
}

// Column `lane` of to [D, L] = from * factor.
template <class T> TW_INLINE void transpose_in(const T* from, float* to, int lane, int64_t D, float factor) {
  for (int64_t d = 0; d < D; ++d) to[d * L + lane] = to_float(from[d]) * factor;
}
template <class T>
TW_INLINE void transpose_out(const float* from, T* to, int lane, int64_t D, float factor, float* space) {
  for (int64_t d = 0; d < D; ++d) space[d] = from[d * L + lane] * factor;
  int64_t d = 0;
  for (; d + W <= D; d += W) store(to + d, load(static_cast<const float*>(space + d)));
  for (; d < D; ++d) to[d] = from_float<T>(space[d]);
}
TW_INLINE void clear(float* p, int64_t n) { __builtin_memset(p, 0, size_t(n) * sizeof(float)); }

// Under a causal mask a contiguous range of tiles costs as much as any other when cheap and dear
// ones alternate: 0, n-1, 1, n-2, ...
TW_INLINE int64_t folded(int64_t t, int64_t n) { return t % 2 ? n - 1 - t / 2 : t / 2; }

// One online-softmax step over scores [count, L]: the scores become probabilities, m and l
// the running maximum and sum, alpha what the output so far is scaled by.
TW_INLINE void softmax_step(float* scores, int64_t count, int vectors, float* m, float* l, float* alpha) {
  for (int c = 0; c < vectors; ++c) {
    float* s = scores + c * W;
    const Vec old = load(static_cast<const float*>(m + c * W));
    Vec top = old, other = old;
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
      top = max(top, load(static_cast<const float*>(s + j * L)));
      other = max(other, load(static_cast<const float*>(s + (j + 1) * L)));
    }
    if (j < count) top = max(top, load(static_cast<const float*>(s + j * L)));
    top = max(top, other);
    const Vec a = exp(old - top);
    Vec sum = load(static_cast<const float*>(l + c * W)) * a;
    for (j = 0; j < count; ++j) {
      const Vec p = exp(load(static_cast<const float*>(s + j * L)) - top);
      store(s + j * L, p);
      sum = sum + p;
    }
    store(m + c * W, top);
    store(l + c * W, sum);
    store(alpha + c * W, a);
  }
}

// The rows of one tile: which kv head, which flattened rows, which keys they see.
struct Tile {
  int64_t b, g, first, offset, keys;
  int rows, vectors;
};

TW_INLINE Tile row_tile(const AttentionArgs& a, int64_t item) {
  const int64_t R = a.group(), n = a.row_tiles(), t = folded(item % n, n), bg = item / n;
  Tile x;
  x.b = bg / a.G;
  x.g = bg % a.G;
  x.first = t * L;
  x.rows = int(least(L, a.S * R - x.first));
  x.vectors = (x.rows + W - 1) / W;
  x.offset = a.T - a.S;
  const int64_t last = (x.first + x.rows - 1) / R;
  x.keys = a.causal ? most(0, least(a.T, last + x.offset + 1)) : a.T;
  return x;
}

// Scores [count, L] of keys from j0 on: -inf where a row may not look.  Rows are in query order, so
// what key j hides from is a prefix of the lanes.
TW_INLINE void mask_prefix(float* scores, int64_t j0, int64_t count, const Tile& x, int64_t R) {
  for (int64_t j = 0; j < count; ++j) {
    const int64_t hidden = least(L, (j0 + j - x.offset) * R - x.first);
    for (int64_t lane = 0; lane < hidden; ++lane) scores[j * L + lane] = -INF;
  }
}

template <class T> void prefill_tile(const AttentionArgs& a, int64_t item, float* scratch) {
  const Tile x = row_tile(a, item);
  const int64_t R = a.group(), D = a.D;
  float *qt = scratch, *ot = qt + D * L, *scores = ot + D * L, *m = scores + NB * L, *l = m + L,
        *alpha = l + L, *k_space = alpha + L, *v_space = k_space + NB * a.padded();
  if (x.rows < L) clear(qt, D * L);
  clear(ot, D * L);
  for (int lane = 0; lane < L; ++lane) m[lane] = LOWEST, l[lane] = 0.f;
  for (int lane = 0; lane < x.rows; ++lane) {
    const int64_t row = x.first + lane;
    transpose_in(at<T>(a.q, x.b, x.g * R + row % R, row / R), qt, lane, D, a.scale);
  }
  for (int64_t j = 0; j < x.keys; j += NB) {
    const int64_t count = least(NB, x.keys - j);
    const Rows k = stage(at<T>(a.k, x.b, x.g, j), a.k.row, count, D, k_space);
    gemm<true, SET>(k.data, k.stride, qt, scores, count, D, x.vectors);
    if (a.causal && j + count - 1 > x.first / R + x.offset) mask_prefix(scores, j, count, x, R);
    softmax_step(scores, count, x.vectors, m, l, alpha);
    const Rows v = stage(at<T>(a.v, x.b, x.g, j), a.v.row, count, D, v_space);
    gemm<false, RESCALE>(v.data, v.stride, scores, ot, D, count, x.vectors, alpha);
  }
  for (int lane = 0; lane < x.rows; ++lane) {
    const int64_t row = x.first + lane, h = x.g * R + row % R, i = row / R;
    const bool blind = l[lane] == 0.f;
    transpose_out(ot, at<T>(a.out, x.b, h, i), lane, D, blind ? 0.f : 1.f / l[lane], k_space);
    a.lse[(x.b * a.H + h) * a.S + i] = blind ? -INF : m[lane] + __builtin_logf(l[lane]);
  }
}

// P = e^(s - lse) into p, and dS = P (dP - delta) into ds, where lse and delta follow the lanes
// (BY_LANE) or the rows of [count, L]; by rows, P is divided by mass too.
template <bool BY_LANE>
TW_INLINE void score_gradient(float* p, float* ds, int64_t count, int vectors, const float* lse, const float* delta,
                              const float* mass = nullptr) {
  for (int64_t j = 0; j < count; ++j)
    for (int c = 0; c < vectors; ++c) {
      const Vec top = BY_LANE ? load(lse + c * W) : set1(lse[j]);
      const Vec mean = BY_LANE ? load(delta + c * W) : set1(delta[j]);
      float *pj = p + j * L + c * W, *dj = ds + j * L + c * W;
      Vec prob = exp(load(static_cast<const float*>(pj)) - top);
      if (!BY_LANE) prob = prob * set1(1.f / mass[j]);
      store(pj, prob);
      store(dj, prob * (load(static_cast<const float*>(dj)) - mean));
    }
}

// sums[lane] += the column sums of x [count, L].
TW_INLINE void add_columns(const float* x, int64_t count, int vectors, float* sums) {
  for (int c = 0; c < vectors; ++c) {
    Vec sum = set1(0.f);
    for (int64_t j = 0; j < count; ++j) sum = sum + load(x + j * L + c * W);
    store(sums + c * W, load(static_cast<const float*>(sums + c * W)) + sum);
  }
}

// A row that sees one key has P = 1 whatever its score: dS is 0, which dP - delta only approaches.
TW_INLINE bool sees_one(const AttentionArgs& a, int64_t i) {
  return (a.causal ? i + a.T - a.S : a.T - 1) == 0;
}

// dQ = scale * sum_j P_j (dP_j - delta) K_j, and what dkv_tile needs to be exact.
// lse is rounded, so P = e^(s - lse) is off by one factor in all of a row: mass = sum_j P_j undoes it.
// delta was summed from an output already rounded; where one probability is near 1, all that is left
// of dP - delta is that rounding.  With e = sum_j P_j (dP_j - delta) / mass, 0 but for it, the exact
// delta is delta + e, and dQ loses e sum_j P_j K_j.
template <class T> void dq_tile(const AttentionArgs& a, int64_t item, float* scratch) {
  const Tile x = row_tile(a, item);
  const int64_t R = a.group(), D = a.D;
  float *qt = scratch, *dot = qt + D * L, *dqt = dot + D * L, *pkt = dqt + D * L, *p = pkt + D * L,
        *ds = p + NB * L, *lse = ds + NB * L, *delta = lse + L, *mass = delta + L, *excess = mass + L,
        *k_space = excess + L, *v_space = k_space + NB * a.padded();
  if (x.rows < L) clear(qt, 2 * D * L);
  clear(dqt, 2 * D * L);
  clear(mass, 2 * L);
  for (int lane = 0; lane < L; ++lane) lse[lane] = INF, delta[lane] = 0.f;
  for (int lane = 0; lane < x.rows; ++lane) {
    const int64_t row = x.first + lane, h = x.g * R + row % R, i = row / R;
    const int64_t flat = (x.b * a.H + h) * a.S + i;
    transpose_in(at<T>(a.q, x.b, h, i), qt, lane, D, a.scale);
    transpose_in(at<T>(a.dout, x.b, h, i), dot, lane, D, 1.f);
    if (a.lse[flat] != -INF) lse[lane] = a.lse[flat];  // else +inf: P = 0
    delta[lane] = a.delta[flat];
  }
  for (int64_t j = 0; j < x.keys; j += NB) {
    const int64_t count = least(NB, x.keys - j);
    const Rows k = stage(at<T>(a.k, x.b, x.g, j), a.k.row, count, D, k_space);
    const Rows v = stage(at<T>(a.v, x.b, x.g, j), a.v.row, count, D, v_space);
    gemm<true, SET>(k.data, k.stride, qt, p, count, D, x.vectors);
    gemm<true, SET>(v.data, v.stride, dot, ds, count, D, x.vectors);
    if (a.causal && j + count - 1 > x.first / R + x.offset) mask_prefix(p, j, count, x, R);
    score_gradient<true>(p, ds, count, x.vectors, lse, delta);
    add_columns(p, count, x.vectors, mass);
    add_columns(ds, count, x.vectors, excess);
    gemm<false, ADD>(k.data, k.stride, ds, dqt, D, count, x.vectors);
    gemm<false, ADD>(k.data, k.stride, p, pkt, D, count, x.vectors);
  }
  for (int lane = 0; lane < x.rows; ++lane) {
    const int64_t row = x.first + lane, h = x.g * R + row % R, i = row / R;
    const float sum = mass[lane] == 0.f ? 1.f : mass[lane], error = excess[lane] / sum;
    for (int64_t d = 0; d < D; ++d) dqt[d * L + lane] -= error * pkt[d * L + lane];
    transpose_out(dqt, at<T>(a.dq, x.b, h, i), lane, D, sees_one(a, i) ? 0.f : a.scale / sum, k_space);
    a.delta[(x.b * a.H + h) * a.S + i] += error;
    a.mass[(x.b * a.H + h) * a.S + i] = sum;
  }
}

// Keys in the lanes, queries broadcast: dK and dV of L keys, summed over the heads that share them.
template <class T> void dkv_tile(const AttentionArgs& a, int64_t item, float* scratch) {
  const int64_t R = a.group(), D = a.D, n = a.key_tiles(), bg = item / n, b = bg / a.G, g = bg % a.G;
  const int64_t first = folded(item % n, n) * L, offset = a.T - a.S;
  const int keys = int(least(L, a.T - first)), vectors = (keys + W - 1) / W;
  float *kt = scratch, *vt = kt + D * L, *dkt = vt + D * L, *dvt = dkt + D * L, *p = dvt + D * L,
        *ds = p + NB * L, *lse = ds + NB * L, *q_space = lse + NB, *do_space = q_space + NB * a.padded();
  if (keys < L) clear(kt, 2 * D * L);
  clear(dkt, 2 * D * L);
  for (int lane = 0; lane < keys; ++lane) {
    transpose_in(at<T>(a.k, b, g, first + lane), kt, lane, D, a.scale);
    transpose_in(at<T>(a.v, b, g, first + lane), vt, lane, D, 1.f);
  }
  const int64_t start = a.causal ? most(0, first - offset) : 0;  // the first query that sees a key
  for (int64_t h = g * R; h < (g + 1) * R; ++h)
    for (int64_t i = start; i < a.S; i += NB) {
      const int64_t count = least(NB, a.S - i), flat = (b * a.H + h) * a.S + i;
      const Rows q = stage(at<T>(a.q, b, h, i), a.q.row, count, D, q_space);
      const Rows dout = stage(at<T>(a.dout, b, h, i), a.dout.row, count, D, do_space);
      gemm<true, SET>(q.data, q.stride, kt, p, count, D, vectors);
      gemm<true, SET>(dout.data, dout.stride, vt, ds, count, D, vectors);
      for (int64_t r = 0; r < count; ++r) lse[r] = a.lse[flat + r] == -INF ? INF : a.lse[flat + r];
      if (a.causal)
        for (int64_t r = 0; r < count; ++r)
          for (int64_t lane = most(0, i + r + offset + 1 - first); lane < keys; ++lane) p[r * L + lane] = -INF;
      score_gradient<false>(p, ds, count, vectors, lse, a.delta + flat, a.mass + flat);
      for (int64_t r = 0; r < count; ++r)
        if (sees_one(a, i + r)) clear(ds + r * L, L);
      gemm<false, ADD>(q.data, q.stride, ds, dkt, D, count, vectors);
      gemm<false, ADD>(dout.data, dout.stride, p, dvt, D, count, vectors);
    }
  for (int lane = 0; lane < keys; ++lane) {
    transpose_out(dkt, at<T>(a.dk, b, g, first + lane), lane, D, a.scale, q_space);
    transpose_out(dvt, at<T>(a.dv, b, g, first + lane), lane, D, 1.f, q_space);
  }
}

template <class T> float dot_row(const T* x, const T* y, int64_t D) {
  Vec sum = set1(0.f);
  int64_t d = 0;
  for (; d + W <= D; d += W) sum = fma(load(x + d), load(y + d), sum);
  float total = reduce_add(sum);
  for (; d < D; ++d) total += to_float(x[d]) * to_float(y[d]);
  return total;
}

// ---- Decode ----------------------------------------------------------------------------------

// The sums of four vectors, to four consecutive floats.
TW_INLINE void reduce4(Vec a, Vec b, Vec c, Vec d, float* to) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 x = _mm512_shuffle_ps(ab, cd, 0x44), y = _mm512_shuffle_ps(ab, cd, 0xee);
  const __m512 s = _mm512_add_ps(x, y);
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
#elif defined(__AVX2__)
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#else
  to[0] = a.v, to[1] = b.v, to[2] = c.v, to[3] = d.v;
#endif
}

// scores[r, j] = q[r] . k[j] for RB rows; q is [RB, Dp], zero beyond D.
template <int RB, class T>
void decode_scores(const float* q, int64_t Dp, const T* k, int64_t stride, int64_t count, int64_t D, float* scores) {
  const int64_t whole = D / W * W;
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const T* kj = k + j * stride;
    Vec acc[RB][4];
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[r][i] = set1(0.f);
    for (int64_t d = 0; d < whole; d += W) {
      Vec x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) x[i] = load(kj + i * stride + d);
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r) {
        const Vec y = load(q + r * Dp + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] = fma(x[i], y, acc[r][i]);
      }
    }
    if (whole < D)
      for (int i = 0; i < 4; ++i) {
        const Vec x = load_n(kj + i * stride + whole, int(D - whole));
#pragma GCC unroll 4
        for (int r = 0; r < RB; ++r) acc[r][i] = fma(x, load(q + r * Dp + whole), acc[r][i]);
      }
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) reduce4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], scores + r * CHUNK + j);
  }
  for (; j < count; ++j)
    for (int r = 0; r < RB; ++r) {
      Vec acc = set1(0.f);
      for (int64_t d = 0; d < whole; d += W) acc = fma(load(k + j * stride + d), load(q + r * Dp + d), acc);
      if (whole < D)
        acc = fma(load_n(k + j * stride + whole, int(D - whole)), load(q + r * Dp + whole), acc);
      scores[r * CHUNK + j] = reduce_add(acc);
    }
}

// out[r, d..] = sum_j p[r, j] v[j, d..] for RB rows and N vectors of columns (the last one partial
// where columns < N * W).
template <int RB, int N, class T>
TW_INLINE void decode_columns(const float* p, const T* v, int64_t stride, int64_t count, float* out, int64_t Dp) {
  Vec acc[RB][N];
#pragma GCC unroll 4
  for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = set1(0.f);
  for (int64_t j = 0; j < count; ++j) {
    Vec x[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) x[n] = load(v + j * stride + n * W);
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) {
      const Vec w = set1(p[r * CHUNK + j]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = fma(w, x[n], acc[r][n]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(out + r * Dp + n * W, acc[r][n]);
}

template <int RB, class T>
void decode_values(const float* p, const T* v, int64_t stride, int64_t count, int64_t D, float* out, int64_t Dp) {
#if defined(__AVX512F__)
  constexpr int N = 4;
#else
  constexpr int N = 2;  // 16 registers
#endif
  int64_t d = 0;
  for (; d + N * W <= D; d += N * W) decode_columns<RB, N>(p, v + d, stride, count, out + d, Dp);
  for (; d + W <= D; d += W) decode_columns<RB, 1>(p, v + d, stride, count, out + d, Dp);
  if (d == D) return;
  Vec acc[RB];
  for (int r = 0; r < RB; ++r) acc[r] = set1(0.f);
  for (int64_t j = 0; j < count; ++j) {
    const Vec x = load_n(v + j * stride + d, int(D - d));
    for (int r = 0; r < RB; ++r) acc[r] = fma(set1(p[r * CHUNK + j]), x, acc[r]);
  }
  for (int r = 0; r < RB; ++r) store(out + r * Dp + d, acc[r]);
}

template <class T> TW_INLINE void store_row(const float* from, T* to, int64_t D, float factor) {
  int64_t d = 0;
  for (; d + W <= D; d += W) store(to + d, load(from + d) * set1(factor));
  for (; d < D; ++d) to[d] = from_float<T>(from[d] * factor);
}

template <int RB, class T>
void decode_rows(const AttentionArgs& a, int64_t b, int64_t g, int64_t c, int64_t row, float* q, float* scores) {
  const int64_t R = a.group(), D = a.D, Dp = a.padded(), j0 = c * CHUNK;
  const int64_t last = a.causal ? (row + RB - 1) / R + a.T - a.S + 1 : a.T;  // keys the last row sees
  const int64_t count = most(0, least(least(last, a.T) - j0, CHUNK));
  const int64_t vectors = (count + W - 1) / W * W;
  for (int r = 0; r < RB; ++r) {
    const T* from = at<T>(a.q, b, g * R + (row + r) % R, (row + r) / R);
    for (int64_t d = 0; d < D; ++d) q[r * Dp + d] = to_float(from[d]) * a.scale;
    for (int64_t d = D; d < Dp; ++d) q[r * Dp + d] = 0.f;
  }
  decode_scores<RB>(q, Dp, at<T>(a.k, b, g, j0), a.k.row, count, D, scores);
  float m[RB], l[RB];
  for (int r = 0; r < RB; ++r) {
    float* s = scores + r * CHUNK;
    const int64_t sees = a.causal ? (row + r) / R + a.T - a.S + 1 - j0 : count;
    for (int64_t j = most(0, least(sees, count)); j < vectors; ++j) s[j] = -INF;
    Vec top = set1(LOWEST), sum = set1(0.f);
    for (int64_t j = 0; j < vectors; j += W) top = max(top, load(static_cast<const float*>(s + j)));
    m[r] = reduce_max(top);
    for (int64_t j = 0; j < vectors; j += W) {
      const Vec p = exp(load(static_cast<const float*>(s + j)) - set1(m[r]));
      store(s + j, p);
      sum = sum + p;
    }
    l[r] = reduce_add(sum);
  }
  decode_values<RB>(scores, at<T>(a.v, b, g, j0), a.v.row, count, D, q, Dp);  // q is done with
  for (int r = 0; r < RB; ++r) {
    const int64_t h = g * R + (row + r) % R, i = (row + r) / R;
    if (a.chunks() > 1) {
      float* part = a.partial + (((b * a.G + g) * a.chunks() + c) * a.S * R + row + r) * (D + 2);
      part[0] = m[r], part[1] = l[r];
      store_row(q + r * Dp, part + 2, D, 1.f);
    } else {
      const bool blind = l[r] == 0.f;
      store_row(q + r * Dp, at<T>(a.out, b, h, i), D, blind ? 0.f : 1.f / l[r]);
      a.lse[(b * a.H + h) * a.S + i] = blind ? -INF : m[r] + __builtin_logf(l[r]);
    }
  }
}

template <class T> void decode_item(const AttentionArgs& a, int64_t item, float* scratch) {
  const int64_t c = item % a.chunks(), bg = item / a.chunks(), b = bg / a.G, g = bg % a.G;
  const int64_t rows = a.S * a.group();
  float *q = scratch, *scores = scratch + rows * a.padded();
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) decode_rows<4, T>(a, b, g, c, row, q, scores);
  if (rows - row == 3) decode_rows<3, T>(a, b, g, c, row, q, scores);
  if (rows - row == 2) decode_rows<2, T>(a, b, g, c, row, q, scores);
  if (rows - row == 1) decode_rows<1, T>(a, b, g, c, row, q, scores);
}

// One row's chunks, in order.
template <class T> void combine_row(const AttentionArgs& a, int64_t item) {
  const int64_t R = a.group(), D = a.D, rows = a.S * R, row = item % rows, bg = item / rows;
  const int64_t b = bg / a.G, h = bg % a.G * R + row % R, i = row / R, n = a.chunks();
  const int64_t step = rows * (D + 2);
  float* first = a.partial + (bg * n * rows + row) * (D + 2);
  float top = LOWEST, sum = 0.f;
  for (int64_t c = 0; c < n; ++c)
    if (first[c * step] > top) top = first[c * step];
  for (int64_t c = 0; c < n; ++c) {
    const float* part = first + c * step;
    const float weight = exp(part[0] - top);
    sum += part[1] * weight;
    if (c == 0) store_row(part + 2, first + 2, D, weight);
    if (c > 0) {
      int64_t d = 2;
      for (; d + W <= D + 2; d += W)
        store(first + d, fma(load(part + d), set1(weight), load(static_cast<const float*>(first + d))));
      for (; d < D + 2; ++d) first[d] += part[d] * weight;
    }
  }
  const bool blind = sum == 0.f;
  store_row(first + 2, at<T>(a.out, b, h, i), D, blind ? 0.f : 1.f / sum);
  a.lse[(b * a.H + h) * a.S + i] = blind ? -INF : top + __builtin_logf(sum);
}

}  // namespace

void attention_prefill(const AttentionArgs& a, float* scratch, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(a.dtype, T, for (int64_t i = begin; i < end; ++i) prefill_tile<T>(a, i, scratch));
}

void attention_decode(const AttentionArgs& a, float* scratch, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(a.dtype, T, for (int64_t i = begin; i < end; ++i) decode_item<T>(a, i, scratch));
}

void attention_combine(const AttentionArgs& a, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(a.dtype, T, for (int64_t i = begin; i < end; ++i) combine_row<T>(a, i));
}

void attention_delta(const AttentionArgs& a, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(a.dtype, T, for (int64_t x = begin; x < end; ++x) {
    const int64_t i = x % a.S, h = x / a.S % a.H, b = x / a.S / a.H;
    a.delta[x] = dot_row(at<T>(a.out, b, h, i), at<T>(a.dout, b, h, i), a.D);
  });
}

void attention_dq(const AttentionArgs& a, float* scratch, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(a.dtype, T, for (int64_t i = begin; i < end; ++i) dq_tile<T>(a, i, scratch));
}

void attention_dkv(const AttentionArgs& a, float* scratch, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(a.dtype, T, for (int64_t i = begin; i < end; ++i) dkv_tile<T>(a, i, scratch));
}

}  // namespace tilewright::cpu::TW_ISA
