// Attention of one layer in one decode step. See decode_attention.py.
#include "decode_attention.h"

// query and out [R, H, D]; new_keys and new_values [R, K, D], which are written to the KV cache at position written[r] - 1 of row
// r; the other arguments as in Cache.
extern "C" void decode_attention(const Element* query, const Element* new_keys, const Element* new_values, Element* out,
                                 Element* row_cache, const Element* prompt_keys, const Element* prompt_values, const int64_t* written,
                                 const int64_t* prompt_lengths, const int64_t* prompts, const int64_t* order, const int64_t* starts,
                                 float scale, int64_t H, int64_t layer, int64_t row_capacity, int64_t prompt_capacity, int64_t P,
                                 int64_t K, int64_t T, int64_t L, int64_t max_rows) {
  const Cache cache{row_cache, prompt_keys,  prompt_values,   written, prompt_lengths, prompts, order, starts,
                    layer,     row_capacity, prompt_capacity, P,       K,              T,       L,     max_rows};
  const int64_t heads_per_kv = H / K;
#pragma omp parallel
  {
    Scratch scratch(cache);
    attend_newest(cache, heads_per_kv, scale, scratch, out, [=](int64_t row, int64_t k, Element* key, Element* value, float*) {
      std::memcpy(key, new_keys + (row * K + k) * D, D * sizeof(Element));
      std::memcpy(value, new_values + (row * K + k) * D, D * sizeof(Element));
      return query + (row * H + k * heads_per_kv) * D;
    });
  }
}
