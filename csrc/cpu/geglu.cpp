#include "geglu.h"

#include "glu_acts.h"

namespace tilewright::cpu::TW_ISA {

void geglu_erf_fwd(const GluFwd& args, int64_t begin, int64_t end) {
  glu_fwd_as<GeluErf>(args, begin, end);
}
void geglu_erf_bwd(const GluBwd& args, int64_t begin, int64_t end) {
  glu_bwd_as<GeluErf>(args, begin, end);
}
void geglu_tanh_fwd(const GluFwd& args, int64_t begin, int64_t end) {
  glu_fwd_as<GeluTanh>(args, begin, end);
}
void geglu_tanh_bwd(const GluBwd& args, int64_t begin, int64_t end) {
  glu_bwd_as<GeluTanh>(args, begin, end);
}

}  // namespace tilewright::cpu::TW_ISA
