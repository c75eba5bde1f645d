// tilewright::attention_decode_fwd on the CPU, and the split over keys that attention's few queries take.
#include <cstring>
#include <tuple>

#include "attention.h"
#include "direct.h"

namespace tilewright {

void decode(AttentionArgs& a) {
  const int64_t rows = a.S * a.group(), items = a.B * a.G * a.chunks();
  c10::DataPtr partial;
  if (a.chunks() > 1) {
    partial = c10::GetCPUAllocator()->allocate(size_t(items * rows * (a.D + 2)) * sizeof(float));
    a.partial = static_cast<float*>(partial.get());
  }
  // a read of K and V weighs as much as about 4 rows' arithmetic
  run(TW_PICK(attention_decode), a, items,
      2 * std::min<int64_t>(a.T, cpu::ATTENTION_CHUNK) * a.D * (rows + 4), a.decode_scratch());
  if (a.chunks() == 1) return;
  const auto combine = TW_PICK(attention_combine);
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 16) / (a.chunks() * (a.D + 2)));
  at::parallel_for(0, a.B * a.G * rows, grain, [&](int64_t begin, int64_t end) { combine(a, begin, end); });
}

namespace {

cpu::Cache cache_of(const Tensor& t) {
  if (t.scalar_type() == at::kChar) return cpu::Cache::I8;
  if (t.scalar_type() == at::kFloat8_e4m3fn) return cpu::Cache::E4M3;
  return cpu::Cache(int(dtype_of(t, "attention_decode", "k_cache")));
}

const float* scales_of(const Tensor& t, int64_t G) {
  TORCH_CHECK_VALUE(!t.defined() || (t.dim() == 1 && t.size(0) == G), "attention_decode: scales of another size than ",
                    G, " heads");
  return t.defined() ? t.const_data_ptr<float>() : nullptr;
}

void check_length(int64_t held, int64_t added, int64_t capacity) {
  TORCH_CHECK_VALUE(held >= 0 && held <= capacity - added, "attention_decode: cache_seqlens has ", held, ", not 0 to ",
                    capacity - added);
}

// Raises unless the pages that hold keys begin .. end - 1 are some of `count`.
void check_pages(const int64_t* pages, int64_t page_size, int64_t begin, int64_t end, int64_t count) {
  for (int64_t j = begin; j < end; j += page_size - j % page_size) {
    const int64_t page = pages[j / page_size];
    TORCH_CHECK_VALUE(page >= 0 && page < count, "attention_decode: block_table has page ", page, " of ", count);
  }
}

std::tuple<Tensor, Tensor> attention_decode_fwd(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                                const Tensor& lengths_, const std::optional<Tensor>& table_,
                                                const std::optional<Tensor>& k_scale_,
                                                const std::optional<Tensor>& v_scale_,
                                                const std::optional<Tensor>& sinks_, int64_t added, int64_t left,
                                                double softcap, double scale) {
  const Tensor q = dense_rows(q_), k = dense_rows(k_), v = dense_rows(v_);
  // wide: what is cut to 32 bits may look right
  const Tensor lengths = lengths_.to(at::kLong).contiguous(), table = dense(table_, at::kLong);
  const Tensor k_scale = dense(k_scale_), v_scale = dense(v_scale_), sinks = dense(sinks_);
  AttentionArgs a{};
  a.q = view(q), a.k = view(k), a.v = view(v);
  a.B = q.size(0), a.H = q.size(1), a.G = k.size(1), a.S = q.size(2), a.D = q.size(3);
  TORCH_CHECK_VALUE(k.sizes() == v.sizes() && k.size(3) == a.D && a.G > 0 && a.H % a.G == 0 &&
                        k.scalar_type() == v.scalar_type(),
                    "attention_decode: q ", q.sizes(), ", k_cache ", k.sizes(), ", v_cache ", v.sizes(), " do not fit");
  TORCH_CHECK_VALUE(lengths.dim() == 1 && lengths.size(0) == a.B && (table.defined() || k.size(0) == a.B) &&
                        (!table.defined() || (table.dim() == 2 && table.size(0) == a.B)) &&
                        (!sinks.defined() || (sinks.dim() == 1 && sinks.size(0) == a.H)),
                    "attention_decode: cache_seqlens ", lengths.sizes(), ", block_table or sinks do not fit q ",
                    q.sizes());
  a.dtype = dtype_of(q, "attention_decode", "q"), a.cache = cache_of(k);
  a.k_scale = scales_of(k_scale, a.G), a.v_scale = scales_of(v_scale, a.G);
  a.sinks = sinks.defined() ? sinks.const_data_ptr<float>() : nullptr;
  a.softcap = float(softcap), a.scale = float(scale);
  int64_t capacity = k.size(2);
  if (table.defined()) {
    a.pages = table.const_data_ptr<int64_t>();
    a.page_row = table.size(1), a.page_size = k.size(2);
    capacity *= a.page_row;
  }
  // [B, S]: where the keys of each query begin and end
  const int64_t* const held = lengths.const_data_ptr<int64_t>();
  const auto bounds = c10::GetCPUAllocator()->allocate(size_t(2 * a.B * a.S + 1) * sizeof(int32_t));
  int32_t* const begin = static_cast<int32_t*>(bounds.get());
  int32_t* const end = begin + a.B * a.S;
  for (int64_t b = 0; b < a.B; ++b) {
    check_length(held[b], added, capacity);
    const int64_t length = held[b] + added;
    a.T = std::max(a.T, length);
    for (int64_t i = 0; i < a.S; ++i) {
      const int64_t last = std::max<int64_t>(length - a.S + i + 1, 0);
      end[b * a.S + i] = int32_t(last);
      begin[b * a.S + i] = int32_t(left < 0 ? 0 : std::max<int64_t>(last - 1 - std::min(left, a.T), 0));
    }
    // pages before a window may be another's by now
    if (a.pages && a.S) check_pages(a.pages + b * a.page_row, a.page_size, begin[b * a.S], length, k.size(0));
  }
  a.begin = begin, a.end = end, a.earliest = earliest(a);
  const Tensor out = empty_like_heads(q);
  const Tensor lse = at::detail::empty_cpu({a.B, a.H, a.S}, at::kFloat);
  a.out = view(out), a.lse = lse.mutable_data_ptr<float>();
  if (out.numel()) decode(a);
  return {out, lse};
}

// New keys or values [B, G, S, D] as a cache holds them, dense.
Tensor stored(const Tensor& x, const Tensor& cache, const Tensor& scale) {
  if (x.scalar_type() == cache.scalar_type() && !scale.defined()) return x.contiguous();
  Tensor wide = x.to(at::kFloat);
  if (scale.defined()) wide = wide / scale.view({-1, 1, 1});
  if (cache.scalar_type() == at::kChar) wide = wide.round().clamp(-128, 127);
  if (cache.scalar_type() == at::kFloat8_e4m3fn) wide = wide.clamp(-448, 448);
  return wide.to(cache.scalar_type()).contiguous();
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions, bool interleaved) {
  using Rope = Tensor(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, bool);
  static const auto op = operator_of("rope_fwd", static_cast<Rope*>(nullptr));
  return op.call(x, cos, sin, positions, interleaved);
}

Tensor attention_append_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                         const Tensor& v_cache, const Tensor& lengths_, const std::optional<Tensor>& table_,
                         const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool interleaved,
                         const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  // wide: what is cut to 32 bits may look right
  const Tensor lengths = lengths_.to(at::kLong).contiguous(), table = dense(table_, at::kLong);
  const int64_t B = q.size(0), S = q.size(2), G = k_cache.size(1), D = q.size(3), page = k_cache.size(2);
  TORCH_CHECK_VALUE(k.dim() == 4 && k.sizes() == v.sizes() && k.size(0) == B && k.size(1) == G && k.size(2) == S &&
                        k.size(3) == D && k_cache.sizes() == v_cache.sizes() && k_cache.size(3) == D &&
                        lengths.dim() == 1 && lengths.size(0) == B && (table.defined() || k_cache.size(0) == B) &&
                        (!table.defined() || (table.dim() == 2 && table.size(0) == B)),
                    "attention_decode: k ", k.sizes(), ", v ", v.sizes(), " do not fit k_cache ", k_cache.sizes());
  const int64_t capacity = table.defined() ? page * table.size(1) : page;
  const int64_t* const held = lengths.const_data_ptr<int64_t>();
  const int64_t* const pages = table.defined() ? table.const_data_ptr<int64_t>() : nullptr;
  for (int64_t b = 0; b < B; ++b) {
    check_length(held[b], S, capacity);
    if (pages) check_pages(pages + b * table.size(1), page, held[b], held[b] + S, k_cache.size(0));
  }
  Tensor turned = at::empty({0}, q.options()), new_k = k;
  if (cos && sin) {
    const Tensor positions = lengths.unsqueeze(1) + at::arange(S, at::kLong);
    turned = rope(q, *cos, *sin, positions, interleaved);
    // as the operator says it lies, whatever q does
    if (B && S && turned.stride(1) > turned.stride(2)) turned = turned.transpose(1, 2).contiguous().transpose(1, 2);
    new_k = rope(k, *cos, *sin, positions, interleaved);
  }
  const std::tuple<Tensor, Tensor> news[] = {{stored(new_k, k_cache, dense(k_scale)), k_cache},
                                             {stored(v, v_cache, dense(v_scale)), v_cache}};
  for (const auto& [x, cache] : news) {
    const size_t size = x.element_size();
    const char* const from = static_cast<const char*>(x.data_ptr());
    char* const to = static_cast<char*>(cache.data_ptr());
    for (int64_t b = 0; b < B; ++b)
      for (int64_t g = 0; g < G; ++g)
        for (int64_t i = 0; i < S; ++i) {
          const int64_t j = held[b] + i, at = pages ? pages[b * table.size(1) + j / page] : b;
          const char* const row = from + ((b * G + g) * S + i) * D * size;
          char* const place = to + (at * cache.stride(0) + g * cache.stride(1) + j % page * cache.stride(2)) * size;
          if (cache.stride(3) == 1) {
            std::memcpy(place, row, D * size);
            continue;
          }
          for (int64_t d = 0; d < D; ++d) std::memcpy(place + d * cache.stride(3) * size, row + d * size, size);
        }
  }
  return turned;
}

}  // namespace

TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("attention_decode_fwd", &attention_decode_fwd);
  m.impl("attention_append_", &attention_append_);
}

}  // namespace tilewright
