// The activations of the gated linear units, as glu_rows.h takes them.
#pragma once
#include "glu_rows.h"

namespace tilewright::cpu::TW_ISA {

struct Silu {  // g s(g), s the logistic function
  // one division: an inf denominator gives nan at g = -inf, as torch's does
  static TW_INLINE Vec value(Vec g) { return g / (set1(1.f) + exp(set1(0.f) - g)); }
  static TW_INLINE Vec value(Vec g, Vec& slope) {
    const Vec s = sigmoid(g);
    slope = s * fma(g, set1(1.f) - s, set1(1.f));
    return g * s;
  }
};

// Hendrycks & Gimpel 2016, arXiv:1606.08415: g/2 (1 + tanh z) = g s(2z), s the logistic function,
// z = sqrt(2/pi) (g + 0.044715 g^3)
struct GeluTanh {
  static constexpr float A = 1.5957691216057308f, B = A * 0.044715f;  // 2 sqrt(2/pi)

  static TW_INLINE Vec value(Vec g) {
    return g / (set1(1.f) + exp(set1(0.f) - g * fma(g * g, set1(B), set1(A))));
  }
  static TW_INLINE Vec value(Vec g, Vec& slope) {
    // s(1 - s) is 0 well inside +-64, and g^2 there finite: no 0 * inf for a large finite g
    const Vec near = min(set1(64.f), max(set1(-64.f), g)), square = near * near;
    const Vec e = exp(set1(0.f) - near * fma(square, set1(B), set1(A)));
    const Vec s = set1(1.f) / (set1(1.f) + e);
    // 1 - s without its cancellation, and 0 rather than inf * 0 where s is 0
    const Vec other = min(set1(3e38f), e) * s;
    slope = fma(g * s * other, fma(square, set1(3 * B), set1(A)), s);
    return g * s;
  }
};

// g Phi(g), Phi(-x) = erfc(x / sqrt 2) / 2 = exp(-x^2 / 2) t P(t) for x >= 0, with
// t = 1 / (1 + 0.35 x / sqrt 2) and P fitted for relative error 7e-9 over x <= 14 (exp is 0 beyond)
struct GeluErf {
  static TW_INLINE Vec value(Vec g) {
    Vec density;
    return g * cdf(g, density);
  }
  static TW_INLINE Vec value(Vec g, Vec& slope) {
    Vec density;
    const Vec phi = cdf(g, density);
    slope = fma(g, density, phi);
    return g * phi;
  }

 private:
  static TW_INLINE Vec cdf(Vec g, Vec& density) {
    const Vec zero = set1(0.f), one = set1(1.f), x = max(zero - g, g);
    const Vec t = one / fma(x, set1(0.24748737341529164f), one);
    const Vec e = exp(set1(-0.5f) * (g * g));
    Vec p = set1(1.919890589e-02f);
    p = fma(p, t, set1(-7.945557608e-02f));
    p = fma(p, t, set1(9.071091593e-02f));
    p = fma(p, t, set1(-1.382699483e-02f));
    p = fma(p, t, set1(4.348810494e-02f));
    p = fma(p, t, set1(7.303249385e-02f));
    p = fma(p, t, set1(7.558912134e-02f));
    p = fma(p, t, set1(9.395206773e-02f));
    p = fma(p, t, set1(9.856906982e-02f));
    p = fma(p, t, set1(9.874189496e-02f));
    const Vec tail = e * (t * p);  // Phi(-|g|)
    density = e * set1(0.39894228040143268f);
    return select_positive(g, one - tail, tail);
  }
};

}  // namespace tilewright::cpu::TW_ISA
