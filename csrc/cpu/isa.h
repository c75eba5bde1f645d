// Instruction-set levels: each kernel file is compiled once per level, into the namespace TW_ISA,
// and the level is picked by cpuid when the extension loads (isa.cpp).
// Nothing under csrc/cpu/ includes a torch or C++ standard-library header with inline functions of
// its own: one compiled for AVX-512 could win at link time and crash an older CPU.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tilewright::cpu {

// A total order: each level has all the features of those before it.  VNNI and BF16 are levels of
// their own, since Ice Lake has the one without the other.
enum Level { SCALAR = 0, AVX2, AVX512, AVX512_VNNI, AVX512_BF16, LEVELS };

const char* level_name(int level);
int level_detected();  // the highest whose every feature bit the CPU and the system report
int level();           // the one in use
bool set_level(const char* name);  // false: no such level, or this CPU lacks it

enum class DType : int { F32 = 0, BF16 = 1, F16 = 2 };

}  // namespace tilewright::cpu

#if defined(__x86_64__)
#define TW_DECLARE(ret, name, ...)                     \
  namespace scalar { ret name(__VA_ARGS__); }          \
  namespace avx2 { ret name(__VA_ARGS__); }            \
  namespace avx512 { ret name(__VA_ARGS__); }          \
  namespace avx512_vnni { ret name(__VA_ARGS__); }     \
  namespace avx512_bf16 { ret name(__VA_ARGS__); }
// TW_PICK(f) is the f of the level in use.
#define TW_PICK(name)                                                                             \
  (::tilewright::cpu::level() == ::tilewright::cpu::AVX512_BF16 ? ::tilewright::cpu::avx512_bf16::name \
   : ::tilewright::cpu::level() == ::tilewright::cpu::AVX512_VNNI ? ::tilewright::cpu::avx512_vnni::name \
   : ::tilewright::cpu::level() == ::tilewright::cpu::AVX512 ? ::tilewright::cpu::avx512::name    \
   : ::tilewright::cpu::level() == ::tilewright::cpu::AVX2 ? ::tilewright::cpu::avx2::name        \
                                                           : ::tilewright::cpu::scalar::name)
#else
#define TW_DECLARE(ret, name, ...) \
  namespace scalar { ret name(__VA_ARGS__); }
#define TW_PICK(name) ::tilewright::cpu::scalar::name
#endif
