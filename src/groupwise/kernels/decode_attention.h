// Attention in a decode step. The newest query of each row (one sequence being generated) attends to the keys of its prompt and
// to the row's own keys, under one softmax. Rows of one prompt are taken together, so that the prompt's keys and values are read
// once for several rows. Compiled for one HEAD_SIZE, one ELEMENT type of queries and outputs and one CACHE_ELEMENT type of the KV
// cache: float, BFloat16 or Float16. It computes in float.
//
// R rows, P prompts, H query heads, K key-value heads, D elements of a head.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "elements.h"
#include "multiply.h"
#include "softcap.h"

#ifndef ELEMENT
#define ELEMENT float
#endif
#ifndef CACHE_ELEMENT
#define CACHE_ELEMENT ELEMENT
#endif

namespace {  // internal linkage, because libraries compiled for other head sizes are loaded into the same process

constexpr int64_t D = HEAD_SIZE;
constexpr int64_t SIMD_WIDTH = D % 16 == 0 ? 16 : D % 8 == 0 ? 8 : D % 4 == 0 ? 4 : D % 2 == 0 ? 2 : 1;  // elements per vector
constexpr int64_t CHUNK = 16;  // rows of one prompt that a thread takes together
// Tokens by which a row's keys and values are prefetched ahead. They are read once and prefetched with low temporal locality, so
// that they do not evict the model's weights from the cache.
constexpr int64_t AHEAD = 12;

// Tokens of a prompt whose keys or values are converted to floats at once, so that these stay in the first-level cache.
constexpr int64_t BLOCK_TOKENS = 64;

using FloatVector = typename Vector<SIMD_WIDTH>::Type;
using Element = ELEMENT;
using CacheElement = CACHE_ELEMENT;

// Calls use(first, count, tokens `first` to first + count - 1 as floats [count, D]) for blocks of `from` [n, D]: all at once and
// in place if they are floats already, else converted into `buffer` [BLOCK_TOKENS, D].
template <typename Use>
inline void for_each_block(const CacheElement* from, int64_t n, [[maybe_unused]] float* buffer, Use use) {
  if constexpr (std::is_same_v<CacheElement, float>) {
    use(0, n, from);
  } else {
    for (int64_t first = 0; first < n; first += BLOCK_TOKENS) {
      const int64_t count = std::min(BLOCK_TOKENS, n - first);
      for (int64_t i = 0; i < count * D; i += SIMD_WIDTH) {
        *reinterpret_cast<FloatVector*>(buffer + i) = load<SIMD_WIDTH>(from + first * D + i);
      }
      use(first, count, buffer);
    }
  }
}

// Copies a head, rounded to the type of the cache.
template <typename From>
inline void write_head(const From* from, CacheElement* to) {
  for (int64_t d = 0; d < D; ++d) {
    if constexpr (std::is_same_v<From, CacheElement>) {
      to[d] = from[d];
    } else {
      store(to_float(from[d]), to + d);
    }
  }
}

// What the attention is: the factor of the scores, and what is added to plain attention.
struct Form {
  float scale;
  float softcap;       // c tanh(score / c) of the scaled scores; 0: none
  int64_t window;      // a token sees the last `window` tokens of its sequence, itself included; 0: all
  const float* sinks;  // [H], logits that take part in the softmax and have no value; null: none
};

// One head of the query of a row's newest token, with those of the row's own keys and values of the key-value head that it sees.
struct Query {
  const Element* query;
  const CacheElement *keys, *values;  // [count, D]
  int64_t count;
  int64_t prompt_first;  // the first token of the prompt that it sees
  float sink;            // -infinity: none
  Element* out;
};

// While token t of `from` is read, prefetch the one AHEAD tokens later; past the end of `from`, continue with `next`.
inline void prefetch(const CacheElement* from, int64_t t, int64_t count, const CacheElement* next) {
  const CacheElement* token = t + AHEAD < count ? from + (t + AHEAD) * D : next + (t + AHEAD - count) * D;
  for (int64_t d = 0; d < D; d += 64 / sizeof(CacheElement)) __builtin_prefetch(token + d, 0, 0);
}

// scores[t] = the row's own key t . query.
inline void row_scores(const float* query, const Query& row, float* scores, const CacheElement* next) {
  FloatVector queries[D / SIMD_WIDTH];
  for (int64_t v = 0; v < D / SIMD_WIDTH; ++v) queries[v] = *reinterpret_cast<const FloatVector*>(query + v * SIMD_WIDTH);
  for (int64_t t = 0; t < row.count; ++t) {
    prefetch(row.keys, t, row.count, next);
    FloatVector sums = load<SIMD_WIDTH>(row.keys + t * D) * queries[0];
    for (int64_t v = 1; v < D / SIMD_WIDTH; ++v) sums += load<SIMD_WIDTH>(row.keys + t * D + v * SIMD_WIDTH) * queries[v];
    scores[t] = horizontal_sum<SIMD_WIDTH>(sums);
  }
}

// output += sum over t of weights[t] * the row's own value t.
inline void add_row_values(const float* weights, const Query& row, float* output, const CacheElement* next) {
  FloatVector attended[D / SIMD_WIDTH];
  for (int64_t v = 0; v < D / SIMD_WIDTH; ++v) attended[v] = *reinterpret_cast<const FloatVector*>(output + v * SIMD_WIDTH);
  for (int64_t t = 0; t < row.count; ++t) {
    prefetch(row.values, t, row.count, next);
    for (int64_t v = 0; v < D / SIMD_WIDTH; ++v) attended[v] += weights[t] * load<SIMD_WIDTH>(row.values + t * D + v * SIMD_WIDTH);
  }
  for (int64_t v = 0; v < D / SIMD_WIDTH; ++v) *reinterpret_cast<FloatVector*>(output + v * SIMD_WIDTH) = attended[v];
}

// Attention of `count` <= LANES queries, one per vector lane, that share one prompt, whose keys and values are [n, D], of which
// they see those from prompt_first on. Scores with the prompt's keys are stored as [n, LANES], so that the softmax needs no
// reduction across lanes; after them come the scores with each row's own keys, as [LANES, T].
template <int64_t LANES>
inline void attend_lanes(const Query* queries, int64_t count, const CacheElement* keys, const CacheElement* values, int64_t n,
                         const Form& form, float* scores, int64_t T, float* converted) {
  float scaled[LANES][D] = {}, transposed[D][LANES] = {}, max[LANES], sums[LANES] = {}, outputs[LANES][D] = {};
  int64_t first = n, last = 0;  // the least and the greatest prompt_first
  for (int64_t lane = 0; lane < count; ++lane) {
    for (int64_t d = 0; d < D; ++d) transposed[d][lane] = scaled[lane][d] = form.scale * to_float(queries[lane].query[d]);
    first = std::min(first, queries[lane].prompt_first), last = std::max(last, queries[lane].prompt_first);
  }
  keys += first * D, values += first * D, n -= first;
  std::memset(scores, 0, n * LANES * sizeof(float));
  for_each_block(keys, n, converted, [&](int64_t begin, int64_t tokens, const float* block) {
    multiply<LANES>(block, D, 1, &transposed[0][0], LANES, scores + begin * LANES, LANES, tokens, D);
  });
  if (form.softcap) cap_scores(scores, n * LANES, form.softcap);
  if (first < last) {
    for (int64_t lane = 0; lane < count; ++lane) {
      for (int64_t l = 0; l < queries[lane].prompt_first - first; ++l) scores[l * LANES + lane] = -INFINITY;
    }
  }
  for (int64_t lane = 0; lane < LANES; ++lane) max[lane] = lane < count ? queries[lane].sink : -INFINITY;
  for (int64_t l = 0; l < n; ++l) {
#pragma omp simd
    for (int64_t lane = 0; lane < LANES; ++lane) max[lane] = scores[l * LANES + lane] > max[lane] ? scores[l * LANES + lane] : max[lane];
  }
  float* all_row_scores = scores + n * LANES;
  for (int64_t lane = 0; lane < count; ++lane) {
    float *own = all_row_scores + lane * T, row_max = max[lane], sum = 0;
    const int64_t m = queries[lane].count;
    row_scores(scaled[lane], queries[lane], own, lane + 1 < count ? queries[lane + 1].keys : queries[0].values);
    if (form.softcap) cap_scores(own, m, form.softcap);
#pragma omp simd reduction(max : row_max)
    for (int64_t t = 0; t < m; ++t) row_max = own[t] > row_max ? own[t] : row_max;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < m; ++t) sum += own[t] = exponential(own[t] - row_max);
    max[lane] = row_max;
    sums[lane] = form.sinks ? sum + exponential(queries[lane].sink - row_max) : sum;
  }
  for (int64_t l = 0; l < n; ++l) {
#pragma omp simd
    for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += scores[l * LANES + lane] = exponential(scores[l * LANES + lane] - max[lane]);
  }
  for_each_block(values, n, converted, [&](int64_t begin, int64_t tokens, const float* block) {
    for (int64_t d = 0; d < D; d += SIMD_WIDTH) {
      multiply<SIMD_WIDTH>(scores + begin * LANES, 1, LANES, block + d, D, &outputs[0][d], D, LANES, tokens);
    }
  });
  for (int64_t lane = 0; lane < count; ++lane) {
    add_row_values(all_row_scores + lane * T, queries[lane], outputs[lane], queries[lane + 1 < count ? lane + 1 : lane].values);
    for (int64_t d = 0; d < D; ++d) store(outputs[lane][d] / sums[lane], queries[lane].out + d);
  }
}

// The KV cache of one layer, of the rows and of their prompts. T and L are capacities in tokens, of a row and of a prompt.
struct Cache {
  CacheElement* row_cache;                          // [2 (keys, values), row_capacity, K, T, D]
  const CacheElement *prompt_keys, *prompt_values;  // [prompt_capacity, K, L, D]
  const int64_t *written, *prompt_lengths;          // [R], tokens of each row, the newest included; [P], tokens of each prompt
  const int64_t *prompts, *order, *starts;          // [R], prompt of each row; the rows of prompt p: order[starts[p]:starts[p + 1]]
  int64_t row_capacity, P, K, T, L;
  int64_t max_rows;                                 // the most rows of any prompt

  // The keys (part = 0) or values (part = 1) of a row, [T, D].
  CacheElement* of_row(int64_t part, int64_t row, int64_t k) const { return row_cache + ((part * row_capacity + row) * K + k) * T * D; }
  // Where the keys or values of a prompt, [L, D], begin in prompt_keys or prompt_values.
  int64_t prompt_offset(int64_t p, int64_t k) const { return (p * K + k) * L * D; }
};

// Buffers of one thread. rotated_heads: queries per row for which `rotated` has space.
struct Scratch {
  std::vector<float> scores, converted;
  std::vector<Element> rotated;
  std::vector<Query> queries;

  explicit Scratch(const Cache& cache, int64_t rotated_heads = 0)
      : scores((cache.L + cache.T) * 16),
        converted(std::is_same_v<CacheElement, float> ? 0 : BLOCK_TOKENS * D),
        rotated(CHUNK * rotated_heads * D) {}
};

// Writes the attention output of each row's newest token to out [R, H, D]; heads_per_kv = H / K query heads share a key-value
// head. Must be called by all threads of a parallel region, which share the work. append(row, k, key, value, rotated) writes the
// row's newest key and value of head k to `key` and `value` in the KV cache and returns the row's queries that use this head,
// [heads_per_kv, D]; it may store them in the buffer `rotated`.
template <typename Append>
inline void attend_newest(const Cache& cache, int64_t heads_per_kv, const Form& form, Scratch& scratch, Element* out, Append append) {
  const int64_t K = cache.K, chunks = (cache.max_rows + CHUNK - 1) / CHUNK;
#pragma omp for schedule(dynamic) collapse(3)
  for (int64_t p = 0; p < cache.P; ++p) {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t first = cache.starts[p] + chunk * CHUNK, end = std::min(first + CHUNK, cache.starts[p + 1]);
        const int64_t offset = cache.prompt_offset(p, k), n = cache.prompt_lengths[p];
        if (first >= end) continue;
        scratch.queries.clear();
        for (int64_t i = first; i < end; ++i) {
          const int64_t row = cache.order[i], m = cache.written[row];
          CacheElement *keys = cache.of_row(0, row, k), *values = cache.of_row(1, row, k);
          Element* rotated = scratch.rotated.data() + (i - first) * heads_per_kv * D;
          const Element* queries = append(row, k, keys + (m - 1) * D, values + (m - 1) * D, rotated);
          // The first tokens of the row and of the prompt that the window reaches.
          const int64_t own = form.window ? std::max<int64_t>(m - form.window, 0) : 0;
          const int64_t of_prompt = form.window ? std::min(std::max<int64_t>(n + m - form.window, 0), n) : 0;
          for (int64_t h = 0; h < heads_per_kv; ++h) {
            const int64_t head = k * heads_per_kv + h;
            scratch.queries.push_back({queries + h * D, keys + own * D, values + own * D, m - own, of_prompt,
                                       form.sinks ? form.sinks[head] : -INFINITY, out + (row * K * heads_per_kv + head) * D});
          }
        }
        for (int64_t i = 0, left = scratch.queries.size(); left > 0; i += 16, left -= 16) {
          const auto attend = left > 8 ? attend_lanes<16> : attend_lanes<8>;
          attend(scratch.queries.data() + i, std::min<int64_t>(left, 16), cache.prompt_keys + offset, cache.prompt_values + offset, n,
                 form, scratch.scores.data(), cache.T, scratch.converted.data());
        }
      }
    }
  }
}

}  // namespace
