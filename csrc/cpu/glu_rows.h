// The loops of the gated linear units:  y = f(gate) up.  An activation gives
//   static Vec value(Vec g)                  f(g)
//   static Vec value(Vec g, Vec& slope)      f(g), and f'(g) in slope
#pragma once
#include "glu.h"
#include "simd.h"
#include "stream.h"

namespace tilewright::cpu::TW_ISA {

template <class Act, class T>
void glu_fwd_rows(const GluFwd& a, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / a.cols, col = at % a.cols;
    const int64_t n = a.cols - col < end - at ? a.cols - col : end - at;
    const T* gate = static_cast<const T*>(a.gate) + row * a.stride_gate + col;
    const T* up = static_cast<const T*>(a.up) + row * a.stride_up + col;
    T* y = static_cast<T*>(a.y) + row * a.stride_y + col;
    const bool past = a.past_caches && streams(y);
    int64_t i = 0;
    for (; i + W <= n; i += W) put(y + i, Act::value(load(gate + i)) * load(up + i), past);
    if (const int rest = int(n - i))
      store_n(y + i, Act::value(load_n(gate + i, rest)) * load_n(up + i, rest), rest);
    at += n;
  }
  if (a.past_caches) end_streams();
}

template <class Act, class T>
void glu_bwd_rows(const GluBwd& a, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / a.cols, col = at % a.cols;
    const int64_t n = a.cols - col < end - at ? a.cols - col : end - at;
    const T* dy = static_cast<const T*>(a.dy) + row * a.stride_dy + col;
    const T* gate = static_cast<const T*>(a.gate) + row * a.stride_gate + col;
    const T* up = static_cast<const T*>(a.up) + row * a.stride_up + col;
    T* dgate = static_cast<T*>(a.dgate) + row * a.stride_dgate + col;
    T* dup = static_cast<T*>(a.dup) + row * a.stride_dup + col;
    const bool past = a.past_caches && streams(dgate) && streams(dup);
    int64_t i = 0;
    Vec slope;
    for (; i + W <= n; i += W) {
      const Vec d = load(dy + i), value = Act::value(load(gate + i), slope);
      put(dgate + i, d * load(up + i) * slope, past);
      put(dup + i, d * value, past);
    }
    if (const int rest = int(n - i)) {
      const Vec d = load_n(dy + i, rest), value = Act::value(load_n(gate + i, rest), slope);
      store_n(dgate + i, d * load_n(up + i, rest) * slope, rest);
      store_n(dup + i, d * value, rest);
    }
    at += n;
  }
  if (a.past_caches) end_streams();
}

template <class Act> void glu_fwd_as(const GluFwd& a, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(a.dtype, T, glu_fwd_rows<Act, T>(a, begin, end));
}
template <class Act> void glu_bwd_as(const GluBwd& a, int64_t begin, int64_t end) {
  TW_FOR_DTYPE(a.dtype, T, glu_bwd_rows<Act, T>(a, begin, end));
}

// 1 / (1 + e^-x): 0 at -inf, 1 at inf
TW_INLINE Vec sigmoid(Vec x) { return set1(1.f) / (set1(1.f) + exp(set1(0.f) - x)); }

}  // namespace tilewright::cpu::TW_ISA
