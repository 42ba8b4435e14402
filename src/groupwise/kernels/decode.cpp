// One layer's attention in one step of generation. See decode.py.
#include "decode.h"

// Shapes: query and out [R, H, D]; new_keys and new_values [R, K, D], which are written at written[r] - 1; the rest as in Cache.
extern "C" void decode(const Element* query, const Element* new_keys, const Element* new_values, Element* out, Element* of_rows,
                       const Element* prompt_keys, const Element* prompt_values, const int64_t* written, const int64_t* lengths,
                       const int64_t* prompts, const int64_t* order, const int64_t* starts, float scale, int64_t H, int64_t layer,
                       int64_t rows, int64_t prompts_room, int64_t P, int64_t K, int64_t T, int64_t L,
                       int64_t most_rows) {
  const Cache cache{of_rows, prompt_keys, prompt_values, written, lengths, prompts, order,    starts,
                    layer,   rows,        prompts_room,  P,       K,       T,       L,        most_rows};
  const int64_t share = H / K;
#pragma omp parallel
  {
    Room room(cache);
    attend_newest(cache, share, scale, room, out, [=](int64_t row, int64_t k, Element* key, Element* value, float*) {
      std::memcpy(key, new_keys + (row * K + k) * D, D * sizeof(Element));
      std::memcpy(value, new_values + (row * K + k) * D, D * sizeof(Element));
      return query + (row * H + k * share) * D;
    });
  }
}
