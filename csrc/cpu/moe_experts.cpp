// Two products: rows with the weight's rows, where both lie along what is summed (up, down), and sums of the weight's
// rows, where what is summed lies across (dh, dx, and dw, whose weight is the tokens).  A thread has columns of every
// expert, so that threads have alike however the tokens are spread, and what it computes does not depend on them.
#include "moe_experts.h"

#include "moe_gate.h"
#include "rms_norm_row.h"

namespace tilewright::cpu::TW_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int DOT_ROWS = 6, SUM_ROWS = 12;  // of accumulators, by DOT_COLUMNS and NV: 24 of 32 registers
#else
constexpr int DOT_ROWS = 2, SUM_ROWS = 4;  // 8 of 16
#endif
constexpr int DOT_COLUMNS = 4, NV = 2;
constexpr int MOST_RANK = 512;

// STEP numbers of a row, and a sum of their products.
template <class T> struct Lanes {
  static constexpr int STEP = W;
  Vec v;
  static TW_INLINE Lanes of(const T* p) { return {load(p)}; }
  static TW_INLINE Lanes some(const T* p, int n) { return {load_tail(p, n)}; }
  static TW_INLINE Vec dot(Lanes a, Lanes b, Vec sum) { return fma(a.v, b.v, sum); }
};
#if defined(__AVX512BF16__)
template <> struct Lanes<bf16> {  // pairs
  static constexpr int STEP = 2 * W;
  __m512i v;
  static TW_INLINE Lanes of(const bf16* p) { return {_mm512_loadu_si512(p)}; }
  static TW_INLINE Lanes some(const bf16* p, int n) { return {_mm512_maskz_loadu_epi16((1u << n) - 1, p)}; }
  static TW_INLINE Vec dot(Lanes a, Lanes b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
};
#endif

// out[m][n] = <a_m, b_n> over K columns.
template <int M, int N, class T>
void dots(const T* const* a, const T* b, int64_t stride, int64_t K, float (*out)[MOE_COLUMNS]) {
  using L = Lanes<T>;
  Vec sum[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sum[m][n] = set1(0.f);
  const auto step = [&](auto get) {
    L w[N];
    for (int n = 0; n < N; ++n) w[n] = get(b + n * stride);
    for (int m = 0; m < M; ++m) {
      const L x = get(a[m]);
      for (int n = 0; n < N; ++n) sum[m][n] = L::dot(x, w[n], sum[m][n]);
    }
  };
  int64_t k = 0;
  for (; k + L::STEP <= K; k += L::STEP) step([&](const T* p) { return L::of(p + k); });
  if (k < K) step([&](const T* p) { return L::some(p + k, int(K - k)); });
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) out[m][n] = reduce_add(sum[m][n]);
}

// The same of any number of rows and columns up to MOE_ROWS and MOE_COLUMNS: the weight's few rows stay in L1.
template <class T>
void dot_block(const T* const* a, int64_t rows, const T* b, int64_t stride, int64_t columns, int64_t K,
               float (*out)[MOE_COLUMNS]) {
  int64_t n = 0;
  for (; n < columns; n += n + DOT_COLUMNS <= columns ? DOT_COLUMNS : 1) {
    const bool whole = n + DOT_COLUMNS <= columns;
    const T* w = b + n * stride;
    const auto at = reinterpret_cast<float (*)[MOE_COLUMNS]>(&out[0][n]);
    for (int64_t m = 0; m < rows;) {
      if (rows - m >= DOT_ROWS) {
        whole ? dots<DOT_ROWS, DOT_COLUMNS>(a + m, w, stride, K, at + m) : dots<DOT_ROWS, 1>(a + m, w, stride, K, at + m);
        m += DOT_ROWS;
      } else {
        whole ? dots<1, DOT_COLUMNS>(a + m, w, stride, K, at + m) : dots<1, 1>(a + m, w, stride, K, at + m);
        ++m;
      }
    }
  }
}

// out[m][NV * W] = sum over k of left[m * row + k * step] times row k of `right`, from its column on; of the last
// vector's columns `count`.
template <int M, class T, class Right>
TW_INLINE void sums(const float* left, int64_t row, int64_t step, int64_t K, Right right, int vectors, int count,
                    float* out, int64_t out_stride) {
  Vec sum[M][NV];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v) sum[m][v] = set1(0.f);
  const auto run = [&](auto get) {
    for (int64_t k = 0; k < K; ++k) {
      const T* p = right(k);
      Vec x[NV];
      for (int v = 0; v < NV; ++v) x[v] = get(p, v);
      for (int m = 0; m < M; ++m) {
        const Vec l = set1(left[m * row + k * step]);
        for (int v = 0; v < NV; ++v) sum[m][v] = fma(l, x[v], sum[m][v]);
      }
    }
  };
  if (vectors == NV && count == W) {
    run([](const T* p, int v) { return load(p + v * W); });
  } else {
    run([&](const T* p, int v) {
      if (v + 1 < vectors || (v + 1 == vectors && count == W)) return load(p + v * W);
      return v + 1 == vectors ? load_tail(p + v * W, count) : set1(0.f);
    });
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v) store(out + m * out_stride + v * W, sum[m][v]);
}

// Of `rows` rows of left and the right's columns [0, columns): to out [rows][out_stride], whole vectors of it.
template <class T, class Right>
void sum_block(const float* left, int64_t row, int64_t step, int64_t rows, int64_t K, Right right, int64_t columns,
               float* out, int64_t out_stride) {
  for (int64_t n = 0; n < columns; n += NV * W) {
    const int64_t rest = columns - n;
    const int vectors = rest >= NV * W ? NV : int((rest + W - 1) / W);
    const int count = rest >= NV * W ? W : int(rest - (vectors - 1) * W);
    const auto from = [&](int64_t k) { return right(k) + n; };
    for (int64_t m = 0; m < rows;) {
      const float* l = left + m * row;
      float* to = out + m * out_stride + n;
      if (rows - m >= SUM_ROWS)
        sums<SUM_ROWS, T>(l, row, step, K, from, vectors, count, to, out_stride), m += SUM_ROWS;
      else if (rows - m >= 2)
        sums<2, T>(l, row, step, K, from, vectors, count, to, out_stride), m += 2;
      else
        sums<1, T>(l, row, step, K, from, vectors, count, to, out_stride), ++m;
    }
  }
}

// body(expert, first row, rows, block's first column, columns) for MOE_ROWS rows at a time of every expert, in blocks
// [begin, end) of N columns.
template <class Body>
TW_INLINE void over_blocks(const Experts& m, int64_t N, int64_t begin, int64_t end, Body body) {
  for (int64_t e = 0; e < m.E; ++e)
    for (int64_t block = begin; block < end; ++block) {
      const int64_t n = block * MOE_COLUMNS, columns = N - n < MOE_COLUMNS ? N - n : MOE_COLUMNS;
      for (int64_t r = m.offsets[e]; r < m.offsets[e + 1]; r += MOE_ROWS) {
        const int64_t left = m.offsets[e + 1] - r;
        body(e, r, left < MOE_ROWS ? left : MOE_ROWS, n, columns);
      }
    }
}

// from[j] + bias[j] in T, `n` numbers.
template <class T>
TW_INLINE void rounded(const float* from, const T* bias, int64_t n, T* to) {
  int64_t j = 0;
  for (; j + W <= n; j += W) store(to + j, bias ? load(from + j) + load(bias + j) : load(from + j));
  for (; j < n; ++j) to[j] = from_float<T>(bias ? from[j] + to_float(bias[j]) : from[j]);
}

template <class T>
TW_INLINE const T* row_in(const Matrices& w, int64_t e, int64_t n) {
  return static_cast<const T*>(w.p) + e * w.stride_e + n * w.stride_n;
}

template <class T>
TW_INLINE const T* at(const void* p, int64_t i) { return p ? static_cast<const T*>(p) + i : nullptr; }

template <class T>
TW_INLINE void widened(const T* from, int64_t n, float* to) {
  int64_t j = 0;
  for (; j + W <= n; j += W) store(to + j, load(from + j));
  for (; j < n; ++j) to[j] = to_float(from[j]);
}

// out plus what an adapter adds to rows r.. of expert e and columns n.. of N.
template <class T, bool ACROSS>
void add_low_rank(const LowRank& l, int64_t N, int64_t e, int64_t r, int64_t rows, int64_t n, int64_t columns,
                  float (*out)[MOE_COLUMNS]) {
  float more[MOE_ROWS][MOE_COLUMNS];
  const T *u = static_cast<const T*>(l.u) + r * l.R, *b = static_cast<const T*>(l.b) + e * N * l.R;
  if constexpr (ACROSS) {
    float wide[MOE_ROWS * MOST_RANK];
    widened(u, rows * l.R, wide);
    sum_block<T>(wide, l.R, 1, rows, l.R, [&](int64_t k) { return b + k * N + n; }, columns, more[0], MOE_COLUMNS);
  } else {
    const T* each[MOE_ROWS];
    for (int64_t i = 0; i < rows; ++i) each[i] = u + i * l.R;
    dot_block(each, rows, b + n * l.R, l.R, columns, l.R, more);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[i][j] += more[i][j];
}

template <class Act, class T>
void up_as(const Experts& m, int64_t begin, int64_t end) {
  float gates[MOE_ROWS][MOE_COLUMNS], ups[MOE_ROWS][MOE_COLUMNS];
  const T* x[MOE_ROWS];
  over_blocks(m, m.I, begin, end, [&](int64_t e, int64_t r, int64_t rows, int64_t n, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) x[i] = row_of<T>(m.x, m.order[r + i] / m.k);
    dot_block(x, rows, row_in<T>(m.w13, e, n), m.w13.stride_n, columns, m.D, gates);
    dot_block(x, rows, row_in<T>(m.w13, e, m.I + n), m.w13.stride_n, columns, m.D, ups);
    if (m.lora_up.u) {
      add_low_rank<T, false>(m.lora_up, 2 * m.I, e, r, rows, n, columns, gates);
      add_low_rank<T, false>(m.lora_up, 2 * m.I, e, r, rows, m.I + n, columns, ups);
    }
    const Limit limit(m.limit);
    for (int64_t i = 0; i < rows; ++i) {
      T gate[MOE_COLUMNS] = {}, up[MOE_COLUMNS] = {}, a[MOE_COLUMNS];
      rounded(gates[i], at<T>(m.bias13, e * 2 * m.I + n), columns, gate);
      rounded(ups[i], at<T>(m.bias13, (e * 2 + 1) * m.I + n), columns, up);
      for (int64_t j = 0; j < MOE_COLUMNS; j += W) {
        store(a + j, Act::value(limit.gate(load(gate + j))) * limit.up(load(up + j)));
      }
      __builtin_memcpy(static_cast<T*>(m.a) + (r + i) * m.I + n, a, size_t(columns) * sizeof(T));
      if (!m.h) continue;
      T* h = static_cast<T*>(m.h) + (r + i) * 2 * m.I + n;
      __builtin_memcpy(h, gate, size_t(columns) * sizeof(T));
      __builtin_memcpy(h + m.I, up, size_t(columns) * sizeof(T));
    }
  });
}

template <class T>
void down_as(const Experts& m, int64_t begin, int64_t end) {
  float sum[MOE_ROWS][MOE_COLUMNS];
  const T* a[MOE_ROWS];
  over_blocks(m, m.D, begin, end, [&](int64_t e, int64_t r, int64_t rows, int64_t n, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) a[i] = static_cast<const T*>(m.a) + (r + i) * m.I;
    dot_block(a, rows, row_in<T>(m.w2, e, n), m.w2.stride_n, columns, m.I, sum);
    if (m.lora_down.u) add_low_rank<T, false>(m.lora_down, m.D, e, r, rows, n, columns, sum);
    for (int64_t i = 0; i < rows; ++i)
      rounded(sum[i], at<T>(m.bias2, e * m.D + n), columns, static_cast<T*>(m.y) + (r + i) * m.D + n);
  });
}

template <class Act, class T>
void dh_as(const Experts& m, float* dout, int64_t begin, int64_t end) {
  float g[MOE_ROWS][MOE_COLUMNS] = {};
  const int64_t blocks = (m.I + MOE_COLUMNS - 1) / MOE_COLUMNS;
  over_blocks(m, m.I, begin, end, [&](int64_t e, int64_t r, int64_t rows, int64_t n, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) widened(row_of<T>(m.dout, m.order[r + i] / m.k), m.D, dout + i * m.D);
    const T* w = row_in<T>(m.w2, e, 0) + n;
    sum_block<T>(dout, m.D, 1, rows, m.D, [&](int64_t k) { return w + k * m.w2.stride_n; }, columns, g[0],
                 MOE_COLUMNS);
    if (m.lora_dh.u) add_low_rank<T, true>(m.lora_dh, m.I, e, r, rows, n, columns, g);
    const Limit limit(m.limit);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t slot = m.order[r + i], row = (r + i) * 2 * m.I + n;
      T gate[MOE_COLUMNS] = {}, up[MOE_COLUMNS] = {}, a[MOE_COLUMNS], dgate[MOE_COLUMNS], dup[MOE_COLUMNS];
      __builtin_memcpy(gate, static_cast<const T*>(m.h) + row, size_t(columns) * sizeof(T));
      __builtin_memcpy(up, static_cast<const T*>(m.h) + row + m.I, size_t(columns) * sizeof(T));
      const Vec weight = set1(m.weights[slot]);
      for (int64_t j = 0; j < MOE_COLUMNS; j += W) {
        const Vec given = load(gate + j), with = load(up + j), factor = limit.up(with);
        Vec slope;
        const Vec value = Act::value(limit.gate(given), slope), d = weight * load(g[i] + j);
        store(a + j, value * factor);
        store(dgate + j, limit.of_gate(d * factor * slope, given));
        store(dup + j, limit.of_up(d * value, with));
      }
      float part = 0.f;
      for (int64_t j = 0; j < columns; ++j) part += g[i][j] * to_float(a[j]);
      if (m.bias2 && n == 0)
        for (int64_t j = 0; j < m.D; ++j) part += dout[i * m.D + j] * to_float(*at<T>(m.bias2, e * m.D + j));
      m.parts[slot * blocks + n / MOE_COLUMNS] = part;
      __builtin_memcpy(static_cast<T*>(m.a) + (r + i) * m.I + n, a, size_t(columns) * sizeof(T));
      __builtin_memcpy(static_cast<T*>(m.dh) + row, dgate, size_t(columns) * sizeof(T));
      __builtin_memcpy(static_cast<T*>(m.dh) + row + m.I, dup, size_t(columns) * sizeof(T));
    }
  });
}

template <class T>
void dx_as(const Experts& m, float* dh, int64_t begin, int64_t end) {
  float sum[MOE_ROWS][MOE_COLUMNS] = {};
  over_blocks(m, m.D, begin, end, [&](int64_t e, int64_t r, int64_t rows, int64_t n, int64_t columns) {
    const int64_t K = 2 * m.I;
    for (int64_t i = 0; i < rows; ++i) widened(static_cast<const T*>(m.dh) + (r + i) * K, K, dh + i * K);
    const T* w = row_in<T>(m.w13, e, 0) + n;
    sum_block<T>(dh, K, 1, rows, K, [&](int64_t k) { return w + k * m.w13.stride_n; }, columns, sum[0],
                 MOE_COLUMNS);
    if (m.lora_dx.u) add_low_rank<T, true>(m.lora_dx, m.D, e, r, rows, n, columns, sum);
    for (int64_t i = 0; i < rows; ++i)
      rounded<T>(sum[i], nullptr, columns, static_cast<T*>(m.dx) + (r + i) * m.D + n);
  });
}

template <class T>
void dw_as(const Gradient& m, float* scratch, const void** pointers, int64_t begin, int64_t end) {
  float sum[MOE_COLUMNS][MOE_COLUMNS] = {};
  const int64_t M = m.M, N = m.N;
  T *dw = static_cast<T*>(m.dw), *dbias = static_cast<T*>(m.dbias);
  for (int64_t e = 0; e < m.E; ++e)
    for (int64_t block = begin; block < end; ++block) {
      const int64_t m0 = block * MOE_COLUMNS, rows = M - m0 < MOE_COLUMNS ? M - m0 : MOE_COLUMNS;
      const int64_t first = m.offsets[e], K = m.offsets[e + 1] - first;
      T* to = dw ? dw + e * M * N + (m.turned ? m0 : m0 * N) : nullptr;
      if (K == 0) {
        for (int64_t i = 0; dw && i < (m.turned ? N : rows); ++i)
          __builtin_memset(to + i * (m.turned ? M : N), 0, size_t(m.turned ? rows : N) * sizeof(T));
        if (dbias) __builtin_memset(dbias + e * M + m0, 0, size_t(rows) * sizeof(T));
        continue;
      }
      for (int64_t k = 0; k < K; ++k) {
        const int64_t row = first + k, slot = m.order[row];
        const float factor = m.weights ? m.weights[slot] : 1.f;
        const T* l = row_of<T>(m.left, m.left_tokens ? slot / m.k : row) + m0;
        for (int64_t i = 0; i < rows; ++i) scratch[k * MOE_COLUMNS + i] = to_float(l[i]) * factor;
        pointers[k] = row_of<T>(m.right, m.right_tokens ? slot / m.k : row);
      }
      if (dbias)
        for (int64_t i = 0; i < rows; ++i) {
          float total = 0.f;
          for (int64_t k = 0; k < K; ++k) total += scratch[k * MOE_COLUMNS + i];
          dbias[e * M + m0 + i] = from_float<T>(total);
        }
      if (!dw) continue;
      for (int64_t n = 0; n < N; n += MOE_COLUMNS) {
        const int64_t columns = N - n < MOE_COLUMNS ? N - n : MOE_COLUMNS;
        sum_block<T>(scratch, 1, MOE_COLUMNS, rows, K,
                     [&](int64_t k) { return static_cast<const T*>(pointers[k]) + n; }, columns, sum[0],
                     MOE_COLUMNS);
        if (m.turned) {
          for (int64_t j = 0; j < columns; ++j)
            for (int64_t i = 0; i < rows; ++i) to[(n + j) * M + i] = from_float<T>(sum[i][j]);
        } else {
          for (int64_t i = 0; i < rows; ++i) rounded<T>(sum[i], nullptr, columns, to + i * N + n);
        }
      }
    }
}

template <class T>
void thin_as(const Thin& m, float* scratch, int64_t begin, int64_t end) {
  float sum[MOE_ROWS][MOE_COLUMNS] = {};
  const T* in[MOE_ROWS];
  for (int64_t e = 0; e < m.E; ++e) {
    const int64_t stop = m.offsets[e + 1] < end ? m.offsets[e + 1] : end;
    for (int64_t r = m.offsets[e] > begin ? m.offsets[e] : begin; r < stop; r += MOE_ROWS) {
      const int64_t rows = stop - r < MOE_ROWS ? stop - r : MOE_ROWS;
      for (int64_t i = 0; i < rows; ++i) {
        in[i] = row_of<T>(m.in, m.tokens ? m.order[r + i] / m.k : r + i);
        if (m.across) widened(in[i], m.K, scratch + i * m.K);
      }
      const T* w = static_cast<const T*>(m.w) + e * m.N * m.K;
      for (int64_t n = 0; n < m.N; n += MOE_COLUMNS) {
        const int64_t columns = m.N - n < MOE_COLUMNS ? m.N - n : MOE_COLUMNS;
        if (m.across)
          sum_block<T>(scratch, m.K, 1, rows, m.K, [&](int64_t k) { return w + k * m.N + n; }, columns, sum[0],
                       MOE_COLUMNS);
        else
          dot_block(in, rows, w + n * m.K, m.K, columns, m.K, sum);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < columns; ++j) sum[i][j] *= m.scale;
          rounded<T>(sum[i], nullptr, columns, static_cast<T*>(m.out) + (r + i) * m.N + n);
        }
      }
    }
  }
}

template <class T, class To>
void add_as(const LowRank& l, bool across, int64_t N, int64_t e, int64_t r, int64_t rows, int64_t n, int64_t stop,
            To* out, int64_t out_stride) {
  float sum[MOE_ROWS][MOE_COLUMNS];
  for (int64_t done = 0; done < rows; done += MOE_ROWS)
    for (int64_t c = n; c < stop; c += MOE_COLUMNS) {
      const int64_t some = rows - done < MOE_ROWS ? rows - done : MOE_ROWS;
      const int64_t columns = stop - c < MOE_COLUMNS ? stop - c : MOE_COLUMNS;
      To* to = out + done * out_stride + c - n;
      for (int64_t i = 0; i < some; ++i) widened(to + i * out_stride, columns, sum[i]);
      if (across) add_low_rank<T, true>(l, N, e, r + done, some, c, columns, sum);
      else add_low_rank<T, false>(l, N, e, r + done, some, c, columns, sum);
      for (int64_t i = 0; i < some; ++i) rounded<To>(sum[i], nullptr, columns, to + i * out_stride);
    }
}

}  // namespace

void moe_experts_up(const Experts& m, int64_t begin, int64_t end) {
  with_act(m.act, [&](auto act) { TW_FOR_DTYPE(m.dtype, T, up_as<decltype(act), T>(m, begin, end)) });
}

void moe_experts_down(const Experts& m, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(m.dtype, T, down_as<T>(m, begin, end))
}

void moe_experts_dh(const Experts& m, float* scratch, int64_t begin, int64_t end) {
  with_act(m.act, [&](auto act) { TW_FOR_DTYPE(m.dtype, T, dh_as<decltype(act), T>(m, scratch, begin, end)) });
}

void moe_experts_dx(const Experts& m, float* scratch, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(m.dtype, T, dx_as<T>(m, scratch, begin, end))
}

void moe_experts_dw(const Gradient& m, float* scratch, const void** pointers, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(m.dtype, T, dw_as<T>(m, scratch, pointers, begin, end))
}

void moe_experts_thin(const Thin& m, float* scratch, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(m.dtype, T, thin_as<T>(m, scratch, begin, end))
}

void moe_experts_add(const LowRank& l, DType dtype, bool across, bool wide, int64_t N, int64_t e, int64_t r,
                     int64_t rows, int64_t n, int64_t stop, void* out, int64_t out_stride) {
  TW_FOR_DTYPE(dtype, T, {
    if (wide) add_as<T>(l, across, N, e, r, rows, n, stop, static_cast<float*>(out), out_stride);
    else add_as<T>(l, across, N, e, r, rows, n, stop, static_cast<T*>(out), out_stride);
  })
}

}  // namespace tilewright::cpu::TW_ISA
