// Attention of one layer in one decode step. See decode_attention.py.
#include "decode_attention.h"

// query and out [R, H, D]; new_keys and new_values [R, K, D], which are written to the KV cache at position written[r] - 1 of row
// r, rounded to its type; sinks and window as in Form; the other arguments as in Cache.
extern "C" void decode_attention(const Element* query, const Element* new_keys, const Element* new_values, Element* out,
                                 const float* sinks, CacheElement* row_cache, const CacheElement* prompt_keys,
                                 const CacheElement* prompt_values, const int64_t* written, const int64_t* prompt_lengths,
                                 const int64_t* prompts, const int64_t* order, const int64_t* starts, float scale, float softcap,
                                 int64_t H, int64_t row_capacity, int64_t P, int64_t K, int64_t T, int64_t L, int64_t max_rows,
                                 int64_t window) {
  const Cache cache{row_cache, prompt_keys,  prompt_values, written, prompt_lengths, prompts, order,
                    starts,    row_capacity, P,             K,       T,              L,       max_rows};
  const Form form{scale, softcap, window, sinks};
  const int64_t heads_per_kv = H / K;
#pragma omp parallel
  {
    Scratch scratch(cache);
    attend_newest(cache, heads_per_kv, form, scratch, out,
                  [=](int64_t row, int64_t k, CacheElement* key, CacheElement* value, Element*) {
                    write_head(new_keys + (row * K + k) * D, key);
                    write_head(new_values + (row * K + k) * D, value);
                    return query + (row * H + k * heads_per_kv) * D;
                  });
  }
}
