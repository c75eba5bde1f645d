// y[m, n] = sum_k x[m, k] w[n, k] + bias[n] over 4- and 8-bit weights, and its input gradient.
//   M rows of x, N output features, K input features, G groups of K / G columns.
//   w[n, k] = scale[n, g] * (code[n, k] - centre) + offset[n, g], or scale[n, g] * codebook[code[n, k]]
// Codes are centred so that sums of code * x do not cancel against the offset's; but not 8-bit ones beside
// minima, of which few bits may be used (GGUF's Q5_1 and Q5_K): offset + centre * scale would lose bits.
#pragma once
#include "isa.h"

namespace tilewright::cpu {

struct QuantWeight {
  const uint8_t* codes;  // [N, K / 2] or [N, K], row-major; 4 bits: even k in the low nibble
  const void *scales, *zeros, *minima;  // [N, G] of type scale_dtype; the last two may be null
  const float* codebook;                // [16], of 4 bits, or null
  DType scale_dtype;
  int bits;
  int64_t N, K, G;

  int centre() const { return minima != nullptr && bits == 8 ? 0 : 1 << (bits - 1); }
};

// Activations as the kernels read them, float32 (see quant_prepare).
struct QuantActivations {
  const float* x;        // [M, K], rows x_stride apart
  int64_t x_stride, M;
  const float* lanes;    // GEMV: [M, chunks, 128 or 64] in the order codes unpack; or null
  const float* sums;     // GEMV: [M, G] sums of x over each group
  const int8_t* codes;   // GEMM int8: [M, K padded]
  const float* scales;   // GEMM int8: [M, K padded / 32], scale of each block of 32
  const int32_t* isums;  // GEMM int8: [M, K padded / 32], sum of each block's codes
  const uint8_t* fixed;  // GEMV in integers: M rows of quant_fixed_bytes
  const void* half;      // in bfloat16: x [M, K], with GEMV's sums, or dy [M, N]
};

constexpr int64_t NESTED_BLOCK = 256;  // scales that share one

// scales[j] = code[codes[j]] * blocks[j / NESTED_BLOCK] + offset of blocks [begin, end), j < count.
TW_DECLARE(void, quant_plain_scales, const uint8_t* codes, int64_t count, const float* code,
           const float* blocks, float offset, float* scales, int64_t begin, int64_t end)

constexpr int GEMV_ROWS = 8;           // up to here weights are unpacked in registers, once
constexpr int HALF_ROWS = 16;          // of dy: up to here the weight streams, and float32 is as quick
constexpr int64_t GEMV_GROUPS = 2048;  // scales of a row held on the stack
constexpr int64_t PAD = 128;           // K is padded to this in prepared activations

inline __attribute__((always_inline)) int64_t padded(int64_t k) { return (k + PAD - 1) / PAD * PAD; }

// Whether the in-register path serves this weight at the level in use (then prepare `lanes`), and
// whether int8 activations multiply as integers (else they are rounded, then take the float path).
TW_DECLARE(bool, quant_has_gemv, const QuantWeight& w)
TW_DECLARE(bool, quant_has_int8, const QuantWeight& w)

// The in-register path in integers.  A row of x becomes fixed-point numbers of `slices` bytes that
// share a scale in each block of 32: one byte is activations="int8"; three hold float32, with 23 bits
// and a sign for the block's largest, what it has for that one; two hold 16-bit floats, with 15 bits.
// quant_prepare_fixed returns false where a block is not finite or too small for that: take the
// float path.
TW_DECLARE(int64_t, quant_fixed_bytes, const QuantWeight& w, int slices)
TW_DECLARE(bool, quant_prepare_fixed, const QuantWeight& w, const void* x, DType dtype, int slices,
           uint8_t* fixed, float* sums)
TW_DECLARE(void, quant_gemv_fixed, const QuantWeight& w, const QuantActivations& a, int slices,
           const void* bias, void* y, int64_t y_stride, DType dtype, int64_t begin, int64_t end)

// The same of 16-bit floats without VNNI: numbers of two bytes, multiplied in pairs.  a.fixed holds rows of
// quant_words_bytes; quant_prepare_words is false where quant_prepare_fixed would be.
TW_DECLARE(bool, quant_has_words, const QuantWeight& w, DType dtype)
TW_DECLARE(int64_t, quant_words_bytes, const QuantWeight& w)
TW_DECLARE(bool, quant_prepare_words, const QuantWeight& w, const void* x, DType dtype, uint8_t* words, float* sums)
TW_DECLARE(void, quant_gemv_words, const QuantWeight& w, const QuantActivations& a, const void* bias, void* y,
           int64_t y_stride, DType dtype, int64_t begin, int64_t end)

// One row of x to float32, its lane order and group sums (lanes, sums may be null).
TW_DECLARE(void, quant_prepare_float, const QuantWeight& w, const void* x, DType dtype, float* out,
           float* lanes, float* sums)
// One row to int8 blocks; `fake` writes scale * code back as float32 instead of the codes.
TW_DECLARE(void, quant_prepare_int8, const QuantWeight& w, const void* x, DType dtype,
           int8_t* codes, float* scales, int32_t* isums, float* fake)

// Output features [begin, end) of y [M, N], rows y_stride apart.
TW_DECLARE(void, quant_gemv, const QuantWeight& w, const QuantActivations& a, const void* bias,
           void* y, int64_t y_stride, DType dtype, int64_t begin, int64_t end)
// Blocks [begin, end) of quant_block() columns of y; `scratch` holds quant_scratch(M) floats.
TW_DECLARE(int64_t, quant_block)
TW_DECLARE(int64_t, quant_scratch, int64_t M)
TW_DECLARE(void, quant_gemm, const QuantWeight& w, const QuantActivations& a, const void* bias,
           void* y, int64_t y_stride, DType dtype, float* scratch, int64_t begin, int64_t end)
TW_DECLARE(void, quant_gemm_int8, const QuantWeight& w, const QuantActivations& a, const void* bias,
           void* y, int64_t y_stride, DType dtype, float* scratch, int64_t begin, int64_t end)
// dx [M, K] = dy [M, N] w, the same blocks over K; a.x is dy.
TW_DECLARE(void, quant_dgrad, const QuantWeight& w, const QuantActivations& a, void* dx,
           int64_t dx_stride, DType dtype, float* scratch, int64_t begin, int64_t end)


// The same of bfloat16, where the CPU multiplies it: a.half is x, or dy of an even N.  quant_prepare_bf16 sums
// groups of a row of n numbers, and returns false where they are not finite, or too large or small for
// this: take the float path.
TW_DECLARE(bool, quant_has_bf16, const QuantWeight& w)
TW_DECLARE(bool, quant_prepare_bf16, const void* x, int64_t n, int64_t group, float* sums)
TW_DECLARE(void, quant_gemm_bf16, const QuantWeight& w, const QuantActivations& a, const void* bias,
           void* y, int64_t y_stride, DType dtype, float* scratch, int64_t begin, int64_t end)
TW_DECLARE(void, quant_dgrad_bf16, const QuantWeight& w, const QuantActivations& a, void* dx,
           int64_t dx_stride, DType dtype, float* scratch, int64_t begin, int64_t end)

}  // namespace tilewright::cpu
