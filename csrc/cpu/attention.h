// Scaled dot-product attention on raw pointers.  B batch, H query heads, G kv heads, R = H / G,
// S queries, T keys, D head dim.  The query heads of one kv head are flattened with the queries:
// row m = i * R + r is query i of head g * R + r, so a K or V row is read once for all R.
#pragma once
#include "isa.h"

namespace tilewright::cpu {

constexpr int ATTENTION_LANES = 48;  // rows (or keys) that a tile of the blocked kernels holds
constexpr int ATTENTION_BLOCK = 48;  // keys (or rows) it meets at a time
constexpr int ATTENTION_CHUNK = 128;  // keys a decode item reads

// A [B, heads, length, D] tensor: strides in elements, the last is 1.
struct AttentionView {
  void* data;
  int64_t batch, head, row;
};

// What is added to the score of a batch, head, query and key: strides in elements, 0 where they share.
struct AttentionBias {
  float* data;  // null: nothing
  int64_t batch, head, row, key;

  float* at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return data + b * batch + h * head + i * row + j * key;
  }
};

// A block-sparse mask: whether queries and keys of a batch and head see each other, by blocks of `size` of
// each; strides as a bias's.
struct AttentionBlocks {
  const bool* data;  // null: all
  int64_t batch, head, row, size;

  // Of query i: by block of keys.
  const bool* of(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i / size * row; }
};

// Dropout draws a word for each query and key of each head: it stays where that is `least` or more.
struct AttentionDropout {
  uint32_t seed[2] = {0, 0};  // low, high
  uint32_t least = 0;         // 0: no dropout, or of all
  float kept = 1.f;           // what those that stay are times; 1: no dropout
  bool none() const { return kept == 1.f; }
};

// What the backward finds out about each row and its two halves share, each [B, H, S]:
// P = e^(s - top) * norm, and dS = P ((dP - mean) - drift).
struct AttentionRows {
  float *top, *norm, *mean, *drift;
};

// What k and v of the decode kernels hold: DType's, or numbers of one byte.
enum class Cache : int { F32 = int(DType::F32), BF16 = int(DType::BF16), F16 = int(DType::F16), I8, E4M3 };

struct AttentionArgs {
  AttentionView q, k, v, out;
  float* lse;                      // forward only: [B, H, S]
  AttentionView dout, dq, dk, dv;  // backward only
  const float* dlse;               // backward only: [B, H, S] or null
  AttentionRows rows;              // backward only: dq writes it, so it runs before dkv
  float* partial;  // decode with more than one chunk: [B, G, chunks, S * R, D + 2]
  Cache cache;     // decode only
  const float *k_scale, *v_scale;  // decode only: [G] or null, what k and v are times
  const int64_t* pages;            // decode only: [B, page_row] or null; key j of batch b is key
  int64_t page_row, page_size;     // j % page_size of k and v[pages[b, j / page_size]]
  const float* sinks;  // [H] or null: scores of a key more, whose value is 0
  const int32_t *begin, *end;  // [B, S] or null: query i sees keys begin[i] .. end[i] - 1,
  int64_t left, right;         // or where null i + T - S - left .. i + T - S + right
  int64_t earliest;            // the first key that any query sees
  AttentionBlocks blocks;      // not decode's, nor the next three
  AttentionBias bias;
  AttentionBias dbias;         // backward only
  AttentionDropout dropout;
  int64_t B, H, G, S, T, D;
  float softcap;        // 0: none
  float scale;
  DType dtype;

  int64_t group() const { return H / G; }
  int64_t padded() const { return (D + 15) / 16 * 16; }
  int64_t row_tiles() const { return (S * group() + ATTENTION_LANES - 1) / ATTENTION_LANES; }
  int64_t key_tiles() const { return (T + ATTENTION_LANES - 1) / ATTENTION_LANES; }
  // The keys that query i of batch b sees: from `from` to before `to`.
  int64_t from(int64_t b, int64_t i) const {
    const int64_t j = begin ? begin[b * S + i] : i + T - S - left;
    return j > 0 ? j : 0;
  }
  int64_t to(int64_t b, int64_t i) const {
    const int64_t j = end ? end[b * S + i] : i + T - S + right + 1;
    return j < 0 ? 0 : j < T ? j : T;
  }
  int64_t chunks() const {
    const int64_t keys = T - earliest;
    return keys > 0 ? (keys + ATTENTION_CHUNK - 1) / ATTENTION_CHUNK : 1;
  }
  // Whether query i sees no key, nor a sink: then its output and gradients are 0, and not 0 / 0.
  bool blind(int64_t b, int64_t i) const { return sinks == nullptr && to(b, i) <= from(b, i); }
  // A tile of keys each, or all keys where they share; of a head of a batch, or of all that share.
  int64_t dbias_items() const {
    return (dbias.batch ? B : 1) * (dbias.head ? H : 1) * (dbias.key ? key_tiles() : 1);
  }
  float key_scale(int64_t g) const { return k_scale ? k_scale[g] : 1.f; }
  float value_scale(int64_t g) const { return v_scale ? v_scale[g] : 1.f; }
  // floats of scratch each thread needs
  int64_t blocked_scratch() const {
    return 4 * (ATTENTION_LANES + ATTENTION_BLOCK) * (padded() + ATTENTION_LANES);
  }
  int64_t decode_scratch() const { return 4 * (padded() + ATTENTION_CHUNK); }
};

// Items: prefill and dq [B * G * row_tiles], dkv [B * G * key_tiles], decode [B * G * chunks],
// combine [B * G * S * R], dbias [dbias_items()].
TW_DECLARE(void, attention_prefill, const AttentionArgs& a, float* scratch, int64_t begin, int64_t end)
TW_DECLARE(void, attention_decode, const AttentionArgs& a, float* scratch, int64_t begin, int64_t end)
TW_DECLARE(void, attention_combine, const AttentionArgs& a, int64_t begin, int64_t end)
TW_DECLARE(void, attention_dq, const AttentionArgs& a, float* scratch, int64_t begin, int64_t end)
TW_DECLARE(void, attention_dkv, const AttentionArgs& a, float* scratch, int64_t begin, int64_t end)
TW_DECLARE(void, attention_dbias, const AttentionArgs& a, float* scratch, int64_t begin, int64_t end)

}  // namespace tilewright::cpu
