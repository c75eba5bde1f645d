// Which instruction-set level runs.  Compiled for the baseline only.
#include "isa.h"

#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace tilewright::cpu {
namespace {

const char* const NAMES[LEVELS] = {"scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};

#if defined(__x86_64__)
bool bit(unsigned word, int index) { return (word >> index) & 1u; }

int detect() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return SCALAR;
  const bool fma = bit(c, 12), osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
  if (!(fma && osxsave && avx && f16c)) return SCALAR;
  unsigned xcr_low, xcr_high;
  __asm__ volatile("xgetbv" : "=a"(xcr_low), "=d"(xcr_high) : "c"(0));
  if ((xcr_low & 0x06) != 0x06) return SCALAR;  // the system saves ymm
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !bit(b, 5)) return SCALAR;
  const bool f = bit(b, 16), dq = bit(b, 17), bw = bit(b, 30), vl = bit(b, 31);
  const bool vnni = bit(c, 11);
  if (!(f && dq && bw && vl) || (xcr_low & 0xe6) != 0xe6) return AVX2;  // and saves zmm
  if (!vnni) return AVX512;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return AVX512_VNNI;
  return bit(a, 5) ? AVX512_BF16 : AVX512_VNNI;
}
#else
int detect() { return SCALAR; }
#endif

int& current() {
  static int value = detect();
  return value;
}

}  // namespace

const char* level_name(int level) { return NAMES[level]; }
int level_detected() {
  static const int value = detect();
  return value;
}
int level() { return current(); }
bool set_level(const char* name) {
  for (int i = 0; i <= level_detected(); ++i)
    if (std::strcmp(name, NAMES[i]) == 0) {
      current() = i;
      return true;
    }
  return false;
}

}  // namespace tilewright::cpu
