// tilewright::quant_moe_experts_fwd and quant_moe_experts_bwd on the CPU: quant_linear's kernels, given an expert's
// rows and its part of the weight at a time.  A thread has some columns of every expert, as moe_experts' have.
#include "../cpu/quant_moe_experts.h"

#include <cstring>
#include <optional>

#include "moe_lora.h"
#include "quant_weight.h"

namespace tilewright {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr const char* OP = "quant_moe_experts";
constexpr int64_t ROWS = 256;          // of an expert at once: as many as share what decoding its weight costs
constexpr int64_t COLUMNS = 256;       // of a product that a thread takes: as many as share what its rows cost
constexpr int64_t ACROSS = 256;        // of a gradient, whose columns lie along the codes
constexpr int64_t SERIAL = 1 << 14;    // weights below which a fork costs more than it saves

struct Segment {
  int64_t expert, first, rows;
};

int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

const char* past(const void* p, int64_t bytes) { return p ? static_cast<const char*>(p) + bytes : nullptr; }

int64_t bytes_of(cpu::DType dtype) { return dtype == cpu::DType::F32 ? 4 : 2; }

// Expert e's part of a weight whose rows are E experts'.
cpu::QuantWeight part_of(const cpu::QuantWeight& whole, int64_t e, int64_t E) {
  cpu::QuantWeight w = whole;
  w.N = whole.N / E;
  const int64_t scales = e * w.N * w.G * bytes_of(w.scale_dtype);
  w.codes += e * w.N * (w.K * w.bits / 8);
  w.scales = past(w.scales, scales), w.zeros = past(w.zeros, scales), w.minima = past(w.minima, scales);
  return w;
}

// Rows of numbers, row r of them where at(r) says.
struct Source {
  cpu::Rows rows;
  const int64_t* order;  // row r is rows' order[r] / k; null: its own r
  int64_t k;
  cpu::DType dtype;

  const void* at(int64_t r) const {
    const int64_t i = order ? order[r] / k : r;
    const int64_t offset = rows.inner == 1 ? i * rows.outer_stride
                                           : i / rows.inner * rows.outer_stride + i % rows.inner * rows.inner_stride;
    return past(rows.p, offset * bytes_of(dtype));
  }
};

constexpr int64_t ONCE = 32 << 20;  // bytes of rows up to which they are prepared for all threads at once

enum class Way { FIXED, WORDS, HALF, GEMV, GEMM };

// Rows as one of quant_linear's kernels takes them.
struct Ready {
  Way way;
  cpu::QuantActivations a;
};

// Memory of rows as kernels take them, and of the sums of their groups.
struct Room {
  Tensor held;
  int64_t groups, row_bytes;

  Room(int64_t rows, int64_t groups, int64_t row_bytes) : groups(groups), row_bytes((row_bytes + 63) / 64 * 64) {
    held = at::empty({rows * (groups * 4 + this->row_bytes)}, at::kByte);
  }
  // The rows from row r on, of as many as there are in all; their sums come behind the last.
  char* at(int64_t r) const { return static_cast<char*>(held.mutable_data_ptr()) + r * row_bytes; }
  float* sums(int64_t r, int64_t rows) const { return reinterpret_cast<float*>(at(rows)) + r * groups; }
};

int64_t forward_bytes(const cpu::QuantWeight& w) {  // of a row, however it is prepared
  const int64_t fixed = std::max(TW_PICK(quant_fixed_bytes)(w, 3), TW_PICK(quant_words_bytes)(w));
  return std::max(fixed, (w.K + cpu::padded(w.K)) * 4);
}

// A segment's rows for its part of the weight: by which kernel, as quant_linear chooses.
Ready prepared(const cpu::QuantWeight& w, const Source& x, const Segment& s, char* room, float* sums) {
  Ready ready{Way::GEMM, {}};
  cpu::QuantActivations& a = ready.a;
  a.M = s.rows, a.x_stride = w.K, a.sums = sums;
  const bool gemv = s.rows <= cpu::GEMV_ROWS && TW_PICK(quant_has_gemv)(w), vnni = TW_PICK(quant_has_int8)(w);
  // fixed-point numbers: as good as float32 once enough rounding errors average out
  if (gemv && (vnni || TW_PICK(quant_has_words)(w, x.dtype)) && w.K >= 256 && w.N >= 32) {
    const int slices = x.dtype == cpu::DType::F32 ? 3 : 2;
    const int64_t bytes = vnni ? TW_PICK(quant_fixed_bytes)(w, slices) : TW_PICK(quant_words_bytes)(w);
    uint8_t* fixed = reinterpret_cast<uint8_t*>(room);
    bool fits = true;
    for (int64_t m = 0; m < s.rows && fits; ++m) {
      const void* row = x.at(s.first + m);
      fits = vnni ? TW_PICK(quant_prepare_fixed)(w, row, x.dtype, slices, fixed + m * bytes, sums + m * w.G)
                  : TW_PICK(quant_prepare_words)(w, row, x.dtype, fixed + m * bytes, sums + m * w.G);
    }
    a.fixed = fixed;
    ready.way = vnni ? Way::FIXED : Way::WORDS;
    if (fits) return ready;
  }
  if (!gemv && x.dtype == cpu::DType::BF16 && TW_PICK(quant_has_bf16)(w)) {
    const bool offsets = w.zeros || w.minima;
    bool fits = true;
    for (int64_t m = 0; m < s.rows && fits; ++m) {
      char* to = room + m * w.K * 2;
      std::memcpy(to, x.at(s.first + m), size_t(w.K) * 2);
      fits = TW_PICK(quant_prepare_bf16)(to, w.K, w.K / w.G, offsets ? sums + m * w.G : nullptr);
    }
    a.half = room;
    ready.way = Way::HALF;
    if (!offsets) a.sums = nullptr;
    if (fits) return ready;
  }
  const int64_t pad = cpu::padded(w.K);
  float *rows = reinterpret_cast<float*>(room), *lanes = gemv ? rows + s.rows * w.K : nullptr;
  for (int64_t m = 0; m < s.rows; ++m)
    TW_PICK(quant_prepare_float)(w, x.at(s.first + m), x.dtype, rows + m * w.K, gemv ? lanes + m * pad : nullptr,
                                 gemv ? sums + m * w.G : nullptr);
  a.x = rows, a.lanes = lanes, a.sums = sums;
  ready.way = gemv ? Way::GEMV : Way::GEMM;
  return ready;
}

// y [rows, N], columns [n, stop) of it, of rows of x with their part of the weight.
void multiply(const cpu::QuantWeight& w, const Ready& x, cpu::DType dtype, const void* bias, void* y, int64_t n,
              int64_t stop, float* work) {
  const int64_t block = TW_PICK(quant_block)(), first = n / block, last = blocks_of(stop, block);
  switch (x.way) {
    case Way::FIXED:
      return TW_PICK(quant_gemv_fixed)(w, x.a, dtype == cpu::DType::F32 ? 3 : 2, bias, y, w.N, dtype, n, stop);
    case Way::WORDS: return TW_PICK(quant_gemv_words)(w, x.a, bias, y, w.N, dtype, n, stop);
    case Way::HALF: return TW_PICK(quant_gemm_bf16)(w, x.a, bias, y, w.N, dtype, work, first, last);
    case Way::GEMV: return TW_PICK(quant_gemv)(w, x.a, bias, y, w.N, dtype, n, stop);
    case Way::GEMM: return TW_PICK(quant_gemm)(w, x.a, bias, y, w.N, dtype, work, first, last);
  }
}

// The same of rows of dy, of which their product with the weight's rows is asked.
Ready prepared_back(const cpu::QuantWeight& w, const Source& dy, const Segment& s, char* room) {
  Ready ready{Way::HALF, {}};
  ready.a.M = s.rows, ready.a.x_stride = w.N;
  if (dy.dtype == cpu::DType::BF16 && s.rows > cpu::HALF_ROWS && w.N % 2 == 0 && TW_PICK(quant_has_bf16)(w)) {
    bool fits = true;
    for (int64_t m = 0; m < s.rows && fits; ++m) {
      char* to = room + m * w.N * 2;
      std::memcpy(to, dy.at(s.first + m), size_t(w.N) * 2);
      fits = TW_PICK(quant_prepare_bf16)(to, w.N, w.N, nullptr);
    }
    ready.a.half = room;
    if (fits) return ready;
  }
  cpu::QuantWeight across = w;  // of which only how many numbers a row has is asked
  across.K = w.N;
  float* rows = reinterpret_cast<float*>(room);
  for (int64_t m = 0; m < s.rows; ++m)
    TW_PICK(quant_prepare_float)(across, dy.at(s.first + m), dy.dtype, rows + m * w.N, nullptr, nullptr);
  ready.a.x = rows, ready.way = Way::GEMM;
  return ready;
}

// A weight as the operators take one.
struct Weight {
  const Tensor &qweight, &scales;
  const OptTensor &zeros, &minima, &codebook;
  at::TensorList nested;
  int64_t bits;

  // Of E experts; nested scales are worked out for those that have rows alone.
  HeldWeight hold(const char* name, const Tensor& offsets, int64_t E) const {
    TORCH_CHECK_VALUE(bits == 4 || bits == 8, OP, ": ", name, " of ", bits, " bits, not 4 or 8");
    std::vector<char> unused;
    if (!nested.empty()) {
      const int64_t *at = offsets.const_data_ptr<int64_t>(), each = scales.numel() / E, B = cpu::NESTED_BLOCK;
      unused.assign(size_t(blocks_of(scales.numel(), B)), 1);
      for (int64_t e = 0; e < E; ++e)
        for (int64_t b = e * each / B; at[e] < at[e + 1] && b * B < (e + 1) * each; ++b) unused[b] = 0;
    }
    return hold_weight(OP, int(bits), qweight, scales, zeros, minima, codebook, nested, unused);
  }
};

// What both passes are given.
struct Given {
  cpu::QuantGate m{};
  int64_t E, P;
  Tensor order, rows, offsets, weights, bias13, bias2;  // contiguous
  Tensor order2;                                        // of w2's columns, int64; undefined: their own
  HeldWeight w13, w2;
  MoeLora lora;
  std::vector<Segment> segments;
  int64_t here, most = 0;  // rows of any expert, and of a segment

  Given(const Tensor& x, const char* name, const Tensor& weights, const Tensor& order, const Tensor& rows,
        const Tensor& offsets, const Weight& w13, const Weight& w2, const OptTensor& order2, const OptTensor& bias13,
        const OptTensor& bias2, const MoeLora& lora, c10::string_view activation, double limit)
      : lora(lora) {
    m.dtype = dtype_of(x, OP, name);
    m.act = moe_activation(OP, activation);
    m.limit = float(limit);
    P = order.numel();
    m.k = rows.dim() ? rows.size(-1) : 0;
    E = offsets.numel() - 1;
    TORCH_CHECK_VALUE(x.dim() > 0 && E > 0 && rows.dim() == x.dim() && rows.sizes() == weights.sizes() &&
                          rows.numel() == P && rows.sizes().slice(0, x.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
                      OP, ": rows ", rows.sizes(), ", weights ", weights.sizes(), ", order ", order.sizes(),
                      " and offsets ", offsets.sizes(), " do not fit ", name, " ", x.sizes());
    this->order = moe_order(OP, order);
    this->offsets = moe_offsets(OP, offsets, P);
    const int64_t* edges = this->offsets.const_data_ptr<int64_t>();
    here = edges[E];
    this->rows = moe_indices(OP, "rows", rows, -1, here);
    this->w13 = w13.hold("w13", this->offsets, E);
    this->w2 = w2.hold("w2", this->offsets, E);
    const cpu::QuantWeight &up = this->w13.view, &down = this->w2.view;
    m.D = up.K, m.I = down.K;
    TORCH_CHECK_VALUE(x.size(-1) == m.D && up.N == E * 2 * m.I && down.N == E * m.D, OP, ": ", name, " ", x.sizes(),
                      ", w13 [", up.N, ", ", up.K, "] and w2 [", down.N, ", ", down.K, "] do not fit ", E, " experts");
    lora.check(OP, x, E, m.D, m.I);
    this->bias13 = bias("bias13", bias13, x, 2 * m.I);
    this->bias2 = bias("bias2", bias2, x, m.D);
    if (order2) {
      this->order2 = order2->to(at::kLong);
      TORCH_CHECK_VALUE(order2->numel() == m.I, OP, ": order2 ", order2->sizes(), " must be [", m.I, "]");
    }
    this->weights = weights.to(at::kFloat).contiguous();
    m.order = this->order.const_data_ptr<int64_t>();
    m.weights = this->weights.const_data_ptr<float>();
    for (int64_t e = 0; m.D > 0 && e < E; ++e)
      for (int64_t r = edges[e]; r < edges[e + 1]; r += ROWS) {
        segments.push_back({e, r, std::min(ROWS, edges[e + 1] - r)});
        most = std::max(most, segments.back().rows);
      }
  }

  Source tokens(const RowView& x) const { return {x.rows, m.order, m.k, m.dtype}; }
  Source sorted(const Tensor& t) const { return {{t.const_data_ptr(), 1, t.size(1), 0}, nullptr, 1, m.dtype}; }

  MoePlaced placed() const { return {m.dtype, E, m.k, P, m.order, offsets.const_data_ptr<int64_t>()}; }

  // y [P, N] = x w^T + bias + what an adapter adds of every expert's rows.
  void product(const cpu::QuantWeight& whole, const Source& x, const Tensor& bias, const cpu::LowRank& low,
               Tensor& y) const {
    const int64_t N = y.size(1), size = y.element_size();
    char* to = static_cast<char*>(y.mutable_data_ptr());
    const void* b = bias.defined() ? bias.const_data_ptr() : nullptr;
    const auto prepare = [&](const cpu::QuantWeight& w, const Segment& s, char* room, float* sums) {
      return prepared(w, x, s, room, sums);
    };
    over(whole, N, COLUMNS, forward_bytes(whole), prepare,
         [&](const cpu::QuantWeight& w, const Ready& rows, const Segment& s, int64_t first, int64_t last, float* work) {
           multiply(w, rows, m.dtype, past(b, s.expert * N * size), to + s.first * N * size, first, last, work);
           if (low.u) add(low, m.dtype, false, false, N, s, first, last, to + (s.first * N + first) * size);
         });
  }

  // dx [P, K] = dy w + what an adapter adds of every expert's rows, dx of whichever dtype it is.
  void product_back(const cpu::QuantWeight& whole, const Source& dy, const cpu::LowRank& low, Tensor& dx) const {
    const int64_t K = whole.K, size = dx.element_size();
    const cpu::DType dtype = dtype_of(dx, OP, "dx");
    char* to = static_cast<char*>(dx.mutable_data_ptr());
    const auto prepare = [&](const cpu::QuantWeight& w, const Segment& s, char* room, float*) {
      return prepared_back(w, dy, s, room);
    };
    over(whole, K, ACROSS, whole.N / E * 4, prepare,
         [&](const cpu::QuantWeight& w, const Ready& rows, const Segment& s, int64_t first, int64_t last, float* work) {
           const auto run = rows.way == Way::HALF ? TW_PICK(quant_dgrad_bf16) : TW_PICK(quant_dgrad);
           const int64_t block = TW_PICK(quant_block)();
           run(w, rows.a, to + s.first * K * size, K, dtype, work, first / block, blocks_of(last, block));
           const bool wide = dtype == cpu::DType::F32;
           if (low.u) add(low, m.dtype, true, wide, K, s, first, last, to + (s.first * K + first) * size);
         });
  }

 private:
  static void add(const cpu::LowRank& low, cpu::DType dtype, bool across, bool wide, int64_t N, const Segment& s,
                  int64_t first, int64_t last, void* to) {
    TW_PICK(moe_experts_add)(low, dtype, across, wide, N, s.expert, s.first, s.rows, first, last, to, N);
  }

  Tensor bias(const char* name, const OptTensor& b, const Tensor& x, int64_t n) const {
    if (!b) return {};
    TORCH_CHECK_VALUE(b->sizes() == at::IntArrayRef({E, n}) && b->scalar_type() == x.scalar_type(), OP, ": ", name, " ",
                      b->scalar_type(), " ", b->sizes(), " must be ", x.scalar_type(), " ", at::IntArrayRef({E, n}));
    return b->contiguous();
  }

  // body(part of the weight, rows, segment, first column, last, a thread's memory), `step` of n columns at a time, of
  // all segments before the next: so threads have alike, however rows are spread.
  template <class Prepare, class F>
  void over(const cpu::QuantWeight& whole, int64_t n, int64_t step, int64_t row_bytes, Prepare prepare, F body) const {
    const int64_t count = int64_t(segments.size()), all = count * blocks_of(n, step);
    const int64_t work = here * (whole.N / E) * whole.K;
    const auto parallel = [&](int64_t items, const auto& run) {
      if (work < SERIAL) run(0, items);
      else at::parallel_for(0, items, 1, run);
    };
    const bool once = here * row_bytes <= ONCE;
    std::optional<Room> room;
    std::vector<Ready> ready(once ? count : 0);
    if (once) {
      room.emplace(here, whole.G, row_bytes);
      parallel(count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Segment& s = segments[i];
          ready[i] = prepare(part_of(whole, s.expert, E), s, room->at(s.first), room->sums(s.first, here));
        }
      });
    }
    parallel(all, [&](int64_t begin, int64_t end) {
      if (begin == end) return;
      const Tensor scratch = at::empty({TW_PICK(quant_scratch)(most)}, at::kFloat);
      std::optional<Room> own;
      if (!once) own.emplace(most, whole.G, row_bytes);
      for (int64_t i = begin; i < end; ++i) {
        const Segment& s = segments[i % count];
        const int64_t first = i / count * step;
        const cpu::QuantWeight w = part_of(whole, s.expert, E);
        const Ready rows = once ? ready[i % count] : prepare(w, s, own->at(0), own->sums(0, most));
        body(w, rows, s, first, std::min(first + step, n), scratch.mutable_data_ptr<float>());
      }
    });
  }
};

// Columns of t [P, n I] in the order that w2 has them, n times.
Tensor in_order(const Tensor& t, const Tensor& order2, int64_t n) {
  return order2.defined() ? t.view({t.size(0), n, -1}).index_select(2, order2).view(t.sizes()) : t;
}

// a [P, I] of h, in m.
Tensor gated(Given& g, const Tensor& h) {
  cpu::QuantGate& m = g.m;
  Tensor a = at::empty({g.P, m.I}, h.options());
  m.h = h.const_data_ptr(), m.a = a.mutable_data_ptr();
  const auto gate = TW_PICK(quant_moe_gate);
  at::parallel_for(0, m.D > 0 ? g.here : 0, row_grain(2 * m.I),
                   [&](int64_t begin, int64_t end) { gate(m, begin, end); });
  return a;
}

std::tuple<Tensor, Tensor> quant_moe_experts_fwd(
    const Tensor& x, const Tensor& weights, const Tensor& order, const Tensor& rows, const Tensor& offsets,
    const Tensor& qweight13, const Tensor& scales13, const OptTensor& zeros13, const OptTensor& minima13,
    const OptTensor& codebook13, at::TensorList nested13, int64_t bits13, const Tensor& qweight2, const Tensor& scales2,
    const OptTensor& zeros2, const OptTensor& minima2, const OptTensor& codebook2, at::TensorList nested2,
    int64_t bits2, const OptTensor& order2, const OptTensor& bias13, const OptTensor& bias2, const OptTensor& a13,
    const OptTensor& b13, const OptTensor& a2, const OptTensor& b2, c10::string_view activation, double limit,
    double scale, bool save) {
  Given g(x, "x", weights, order, rows, offsets,
          {qweight13, scales13, zeros13, minima13, codebook13, nested13, bits13},
          {qweight2, scales2, zeros2, minima2, codebook2, nested2, bits2}, order2, bias13, bias2,
          {a13, b13, a2, b2, scale}, activation, limit);
  Tensor out = at::empty(x.sizes(), x.options()), h = at::empty({g.P, 2 * g.m.I}, x.options());
  Tensor y = at::empty({g.P, g.m.D}, x.options()), u13, u2;
  cpu::LowRank up{}, down{};
  const RowView tokens(x);
  if (g.lora.a13.defined()) {
    u13 = moe_thin(g.placed(), tokens.rows, true, g.lora.a13, false, scale);
    up = moe_low_rank(u13, g.lora.b13);
  }
  g.product(g.w13.view, g.tokens(tokens), g.bias13, up, h);
  const Tensor a = in_order(gated(g, h), g.order2, 1);
  if (g.lora.a2.defined()) {
    u2 = moe_thin(g.placed(), moe_own_rows(a), false, g.lora.a2, false, scale);
    down = moe_low_rank(u2, g.lora.b2);
  }
  g.product(g.w2.view, g.sorted(a), g.bias2, down, y);
  moe_sum(y, g.m.weights, g.rows, out);
  return {std::move(out), save ? std::move(h) : at::empty({0, 2 * g.m.I}, x.options())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quant_moe_experts_bwd(
    const Tensor& dout, const OptTensor& x, const Tensor& h, const Tensor& weights, const Tensor& order,
    const Tensor& rows, const Tensor& offsets, const Tensor& qweight13, const Tensor& scales13,
    const OptTensor& zeros13, const OptTensor& minima13, const OptTensor& codebook13, at::TensorList nested13,
    int64_t bits13, const Tensor& qweight2, const Tensor& scales2, const OptTensor& zeros2, const OptTensor& minima2,
    const OptTensor& codebook2, at::TensorList nested2, int64_t bits2, const OptTensor& order2, const OptTensor& bias2,
    const OptTensor& a13, const OptTensor& b13, const OptTensor& a2, const OptTensor& b2,
    c10::string_view activation, double limit, double scale, std::array<bool, 6> wanted) {
  Given g(dout, "dout", weights, order, rows, offsets,
          {qweight13, scales13, zeros13, minima13, codebook13, nested13, bits13},
          {qweight2, scales2, zeros2, minima2, codebook2, nested2, bits2}, order2, std::nullopt, bias2,
          {a13, b13, a2, b2, scale}, activation, limit);
  cpu::QuantGate& m = g.m;
  TORCH_CHECK_VALUE(h.dim() == 2 && h.size(0) == g.P && h.size(1) == 2 * m.I && h.scalar_type() == dout.scalar_type(),
                    OP, ": h ", h.scalar_type(), " ", h.sizes(), " does not fit dout ", dout.scalar_type(), " ",
                    dout.sizes());
  TORCH_CHECK_VALUE(x ? x->sizes() == dout.sizes() && x->scalar_type() == dout.scalar_type()
                      : !(g.lora.a13.defined() && (wanted[2] || wanted[3])),
                    OP, ": x must be as dout, for adapters of w13");
  const RowView gradient(dout), tokens(x ? *x : dout);
  const Tensor kept = in_order(h.contiguous(), g.order2, 2);
  Tensor of_a = at::empty({g.P, m.I}, dout.options().dtype(at::kFloat)), dh = at::empty(h.sizes(), h.options());
  Tensor dweights = at::zeros(weights.sizes(), of_a.options()), v13, v2, a;
  cpu::LowRank of_g{}, of_x{};
  if (g.lora.b2.defined()) {
    v2 = moe_thin(g.placed(), gradient.rows, true, g.lora.b2, true, scale);
    of_g = moe_low_rank(v2, g.lora.a2);
    a = gated(g, kept);
  }
  g.product_back(g.w2.view, g.tokens(gradient), of_g, of_a);
  m.h = kept.const_data_ptr(), m.g = of_a.const_data_ptr<float>(), m.dout = gradient.rows;
  m.dh = dh.mutable_data_ptr(), m.dweights = dweights.mutable_data_ptr<float>();
  const char* b = g.bias2.defined() ? static_cast<const char*>(g.bias2.const_data_ptr()) : nullptr;
  const auto gate = TW_PICK(quant_moe_gate_bwd);
  at::parallel_for(0, int64_t(g.segments.size()), row_grain(2 * m.I * std::max<int64_t>(1, g.most)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const Segment& s = g.segments[i];
                       gate(m, past(b, s.expert * m.D * h.element_size()), s.first, s.first + s.rows);
                     }
                   });
  if (g.order2.defined()) {
    Tensor back = at::empty(h.sizes(), h.options());
    back.view({g.P, 2, m.I}).index_copy_(2, g.order2, dh.view({g.P, 2, m.I}));
    dh = std::move(back);
  }
  if (g.lora.b13.defined() && (wanted[0] || wanted[2])) {
    v13 = moe_thin(g.placed(), moe_own_rows(dh), false, g.lora.b13, true, scale);
    of_x = moe_low_rank(v13, g.lora.a13);
  }
  Tensor dx = at::empty(wanted[0] ? dout.sizes() : at::IntArrayRef{0}, dout.options());
  if (wanted[0]) {
    Tensor each = at::empty({g.P, m.D}, dout.options()), ones = at::ones({g.P}, of_a.options());
    g.product_back(g.w13.view, g.sorted(dh), of_x, each);
    moe_sum(each, ones.const_data_ptr<float>(), g.rows, dx);
  }
  auto of_lora = g.lora.grads(g.placed(), m.weights, tokens.rows, gradient.rows, a, dh, v13, v2,
                              {wanted[2], wanted[3], wanted[4], wanted[5]});
  return {std::move(dx),         wanted[1] ? dweights.to(weights.scalar_type()) : at::empty({0}, weights.options()),
          std::move(of_lora[0]), std::move(of_lora[1]),
          std::move(of_lora[2]), std::move(of_lora[3])};
}

}  // namespace

TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("quant_moe_experts_fwd", &quant_moe_experts_fwd);
  m.impl("quant_moe_experts_bwd", &quant_moe_experts_bwd);
}

}  // namespace tilewright
