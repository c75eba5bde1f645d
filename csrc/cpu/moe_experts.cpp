// A thread has columns of every expert, so that threads have alike however the tokens are spread, and what it computes
// does not depend on them.
#include "moe_experts.h"

#include "moe_gate.h"
#include "moe_products.h"
#include "rms_norm_row.h"

namespace tilewright::cpu::TW_ISA {
namespace {

constexpr int MOST_RANK = 512;  // of adapters

// body(expert, first row, rows, its scratch, first column, columns) for MOE_ROWS rows and up to COLUMNS columns at a
// time of every expert, in blocks [begin, end) of N columns, after before(first row, rows, its scratch), which may
// fill MOE_ROWS K floats.
template <int64_t COLUMNS, class Before, class Body>
TW_INLINE void over_blocks(const Experts& m, int64_t N, int64_t K, float* scratch, int64_t begin, int64_t end,
                           Before before, Body body) {
  for (int64_t e = 0; e < m.E; ++e)
    for (int64_t first = m.offsets[e]; first < m.offsets[e + 1]; first += MOE_GROUP * MOE_ROWS) {
      const int64_t past = first + MOE_GROUP * MOE_ROWS, stop = past < m.offsets[e + 1] ? past : m.offsets[e + 1];
      const auto each = [&](auto f) {
        for (int64_t r = first; r < stop; r += MOE_ROWS)
          f(r, stop - r < MOE_ROWS ? stop - r : int64_t(MOE_ROWS), scratch + (r - first) * K);
      };
      each(before);
      const int64_t last = end * MOE_COLUMNS < N ? end * MOE_COLUMNS : N;
      for (int64_t n = begin * MOE_COLUMNS; n < last; n += COLUMNS) {
        const int64_t columns = last - n < COLUMNS ? last - n : COLUMNS;
        each([&](int64_t r, int64_t rows, float* own) { body(e, r, rows, own, n, columns); });
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

// out [rows, columns] of row(i) of K numbers, turned where they are many, with columns of w.
template <class T, class Row>
TW_INLINE void along(Row row, const float* turned, int64_t rows, int64_t K, const T* w, int64_t stride, int64_t columns,
                     float (*out)[MOE_COLUMNS]) {
  if (!direct<T>(rows)) {
    float sum[MOE_COLUMNS][MOE_ROWS];
    products_along(turned, rows, K, w, stride, columns, sum);
    return turn_back(sum, rows, columns, out);
  }
  const T* each[MOE_ROWS];
  for (int64_t i = 0; i < rows; ++i) each[i] = row(i);
  dot_block(each, rows, w, stride, columns, K, out);
}

template <class T>
TW_INLINE void across(const float* turned, int64_t rows, int64_t K, const T* w, int64_t stride, int64_t columns,
                      float (*out)[MOE_COLUMNS]) {
  float sum[MOE_COLUMNS][MOE_ROWS];
  products_across(turned, rows, K, w, stride, columns, sum);
  turn_back(sum, rows, columns, out);
}

// out plus what an adapter adds to rows r.. of expert e and columns n.. of N.
template <class T, bool ACROSS>
void add_low_rank(const LowRank& l, int64_t N, int64_t e, int64_t r, int64_t rows, int64_t n, int64_t columns,
                  float (*out)[MOE_COLUMNS]) {
  float more[MOE_ROWS][MOE_COLUMNS];
  const T *u = static_cast<const T*>(l.u) + r * l.R, *b = static_cast<const T*>(l.b) + e * N * l.R;
  if constexpr (ACROSS) {
    float turned[MOE_ROWS * MOST_RANK];
    turn([&](int64_t i) { return u + i * l.R; }, rows, l.R, turned);
    across(turned, rows, l.R, b + n, N, columns, more);
  } else {
    const T* each[MOE_ROWS];
    for (int64_t i = 0; i < rows; ++i) each[i] = u + i * l.R;
    dot_block(each, rows, b + n * l.R, l.R, columns, l.R, more);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[i][j] += more[i][j];
}

template <class Act, class T>
void up_as(const Experts& m, float* scratch, int64_t begin, int64_t end) {
  float gates[MOE_ROWS][MOE_COLUMNS], ups[MOE_ROWS][MOE_COLUMNS];
  const auto from = [&](int64_t r) {
    return [&m, r](int64_t i) { return row_of<T>(m.x, m.order[r + i] / m.k); };
  };
  const auto before = [&](int64_t r, int64_t rows, float* x) {
    if (!direct<T>(rows)) turn(from(r), rows, m.D, x);
  };
  over_blocks<MOE_COLUMNS>(m, m.I, m.D, scratch, begin, end, before, [&](int64_t e, int64_t r, int64_t rows,
                                                                         const float* x, int64_t n, int64_t columns) {
    along(from(r), x, rows, m.D, row_in<T>(m.w13, e, n), m.w13.stride_n, columns, gates);
    along(from(r), x, rows, m.D, row_in<T>(m.w13, e, m.I + n), m.w13.stride_n, columns, ups);
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
void down_as(const Experts& m, float* scratch, int64_t begin, int64_t end) {
  float sum[MOE_ROWS][MOE_COLUMNS];
  const auto from = [&](int64_t r) {
    return [&m, r](int64_t i) { return static_cast<const T*>(m.a) + (r + i) * m.I; };
  };
  const auto before = [&](int64_t r, int64_t rows, float* a) {
    if (!direct<T>(rows)) turn(from(r), rows, m.I, a);
  };
  over_blocks<MOE_COLUMNS>(m, m.D, m.I, scratch, begin, end, before, [&](int64_t e, int64_t r, int64_t rows,
                                                                         const float* a, int64_t n, int64_t columns) {
    along(from(r), a, rows, m.I, row_in<T>(m.w2, e, n), m.w2.stride_n, columns, sum);
    if (m.lora_down.u) add_low_rank<T, false>(m.lora_down, m.D, e, r, rows, n, columns, sum);
    for (int64_t i = 0; i < rows; ++i)
      rounded(sum[i], at<T>(m.bias2, e * m.D + n), columns, static_cast<T*>(m.y) + (r + i) * m.D + n);
  });
}

template <class Act, class T>
void dh_as(const Experts& m, float* scratch, int64_t begin, int64_t end) {
  float g[MOE_ROWS][MOE_COLUMNS] = {}, sum[MOE_ACROSS][MOE_ROWS];
  const int64_t blocks = (m.I + MOE_COLUMNS - 1) / MOE_COLUMNS;
  const auto before = [&](int64_t r, int64_t rows, float* dout) {
    turn([&](int64_t i) { return row_of<T>(m.dout, m.order[r + i] / m.k); }, rows, m.D, dout);
  };
  over_blocks<MOE_ACROSS>(m, m.I, m.D, scratch, begin, end, before, [&](int64_t e, int64_t r, int64_t rows,
                                                                        const float* dout, int64_t first,
                                                                        int64_t all) {
    products_across(dout, rows, m.D, row_in<T>(m.w2, e, 0) + first, m.w2.stride_n, all, sum);
    for (int64_t n = first; n < first + all; n += MOE_COLUMNS) {
      const int64_t columns = first + all - n < MOE_COLUMNS ? first + all - n : MOE_COLUMNS;
      turn_back(sum + (n - first), rows, columns, g);
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
          for (int64_t j = 0; j < m.D; ++j) part += dout[j * MOE_ROWS + i] * to_float(*at<T>(m.bias2, e * m.D + j));
        m.parts[slot * blocks + n / MOE_COLUMNS] = part;
        __builtin_memcpy(static_cast<T*>(m.a) + (r + i) * m.I + n, a, size_t(columns) * sizeof(T));
        __builtin_memcpy(static_cast<T*>(m.dh) + row, dgate, size_t(columns) * sizeof(T));
        __builtin_memcpy(static_cast<T*>(m.dh) + row + m.I, dup, size_t(columns) * sizeof(T));
      }
    }
  });
}

template <class T>
void dx_as(const Experts& m, float* scratch, int64_t begin, int64_t end) {
  float out[MOE_ROWS][MOE_COLUMNS], sum[MOE_ACROSS][MOE_ROWS];
  const int64_t K = 2 * m.I;
  const auto before = [&](int64_t r, int64_t rows, float* dh) {
    turn([&](int64_t i) { return static_cast<const T*>(m.dh) + (r + i) * K; }, rows, K, dh);
  };
  over_blocks<MOE_ACROSS>(m, m.D, K, scratch, begin, end, before, [&](int64_t e, int64_t r, int64_t rows,
                                                                      const float* dh, int64_t first, int64_t all) {
    products_across(dh, rows, K, row_in<T>(m.w13, e, 0) + first, m.w13.stride_n, all, sum);
    for (int64_t n = first; n < first + all; n += MOE_COLUMNS) {
      const int64_t columns = first + all - n < MOE_COLUMNS ? first + all - n : MOE_COLUMNS;
      turn_back(sum + (n - first), rows, columns, out);
      if (m.lora_dx.u) add_low_rank<T, true>(m.lora_dx, m.D, e, r, rows, n, columns, out);
      for (int64_t i = 0; i < rows; ++i)
        rounded<T>(out[i], nullptr, columns, static_cast<T*>(m.dx) + (r + i) * m.D + n);
    }
  });
}

template <class T>
void dw_as(const Gradient& m, float* scratch, const void** pointers, int64_t begin, int64_t end) {
  float sum[MOE_COLUMNS][MOE_ROWS] = {}, right[DEPTH * MOE_ROWS];
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
        for (int64_t k0 = 0; k0 < K; k0 += DEPTH) {
          const int64_t some = K - k0 < DEPTH ? K - k0 : DEPTH;
          for (int64_t k = 0; k < some; ++k)
            widened(static_cast<const T*>(pointers[k0 + k]) + n, columns, right + k * MOE_ROWS);
          sum_tile(scratch + k0 * MOE_COLUMNS, 1, MOE_COLUMNS, rows, some, right, lanes_of(columns), sum, k0 > 0);
        }
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
  for (int64_t e = 0; e < m.E; ++e) {
    const int64_t stop = m.offsets[e + 1] < end ? m.offsets[e + 1] : end;
    for (int64_t r = m.offsets[e] > begin ? m.offsets[e] : begin; r < stop; r += MOE_ROWS) {
      const int64_t rows = stop - r < MOE_ROWS ? stop - r : MOE_ROWS;
      const auto in = [&](int64_t i) { return row_of<T>(m.in, m.tokens ? m.order[r + i] / m.k : r + i); };
      const T* each[MOE_ROWS];
      for (int64_t i = 0; i < rows; ++i) each[i] = in(i);
      if (m.across) turn(in, rows, m.K, scratch);
      const T* w = static_cast<const T*>(m.w) + e * m.N * m.K;
      for (int64_t n = 0; n < m.N; n += MOE_COLUMNS) {
        const int64_t columns = m.N - n < MOE_COLUMNS ? m.N - n : MOE_COLUMNS;
        if (m.across)
          across(scratch, rows, m.K, w + n, m.N, columns, sum);
        else
          dot_block(each, rows, w + n * m.K, m.K, columns, m.K, sum);  // whatever rows a thread has together
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

void moe_experts_up(const Experts& m, float* scratch, int64_t begin, int64_t end) {
  with_act(m.act, [&](auto act) { TW_FOR_DTYPE(m.dtype, T, up_as<decltype(act), T>(m, scratch, begin, end)) });
}

void moe_experts_down(const Experts& m, float* scratch, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(m.dtype, T, down_as<T>(m, scratch, begin, end))
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
