// Stores past the caches, for outputs too large to be found in one later: an ordinary store to a line
// that is not in a cache reads it first, which makes y = f(x) move a half more than it must.
#pragma once
#include "simd.h"

namespace tilewright::cpu::TW_ISA {

// Whether rows that begin at p may be streamed: on a vector's boundary.
TW_INLINE bool streams(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Vec) == 0; }

// Only float32 is streamed: 16-bit outputs wait for arithmetic, not for memory.
template <class T> TW_INLINE void put(T* p, Vec a, bool) { store(p, a); }
template <> TW_INLINE void put(float* p, Vec a, [[maybe_unused]] bool past_caches) {
#if defined(__AVX512F__)
  if (past_caches) return _mm512_stream_ps(p, a.v);
#elif defined(__AVX2__)
  if (past_caches) return _mm256_stream_ps(p, a.v);
#endif
  store(p, a);
}

// Call after the last: streamed lines are not ordered before the word that tells another thread so.
TW_INLINE void end_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace tilewright::cpu::TW_ISA
