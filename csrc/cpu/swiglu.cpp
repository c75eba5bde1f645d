#include "swiglu.h"

#include "glu_rows.h"

namespace tilewright::cpu::TW_ISA {
namespace {

struct Silu {  // g s(g), s the logistic function
  // one division: an inf denominator gives nan at g = -inf, as torch's does
  static TW_INLINE Vec value(Vec g) { return g / (set1(1.f) + exp(set1(0.f) - g)); }
  static TW_INLINE Vec value(Vec g, Vec& slope) {
    const Vec s = sigmoid(g);
    slope = s * fma(g, set1(1.f) - s, set1(1.f));
    return g * s;
  }
};

}  // namespace

void swiglu_fwd(const GluFwd& args, int64_t begin, int64_t end) { glu_fwd_as<Silu>(args, begin, end); }
void swiglu_bwd(const GluBwd& args, int64_t begin, int64_t end) { glu_bwd_as<Silu>(args, begin, end); }

}  // namespace tilewright::cpu::TW_ISA
