// Attention in a decode step. The newest query of each row (one sequence being generated) attends to the keys of its prompt and
// to the row's own keys, under one softmax. Rows of one prompt are taken together, so that the prompt's keys and values are read
// once for several rows. Compiled for one HEAD_SIZE and one Element type.
//
// R rows, P prompts, H query heads, K key-value heads, D elements of a head.
#pragma once
#include <algorithm>
#include <vector>

#include "exponential.h"
#include "multiply.h"

namespace {  // internal linkage, because libraries compiled for other head sizes are loaded into the same process

constexpr int64_t D = HEAD_SIZE;
constexpr int64_t SIMD_WIDTH = D % 16 == 0 ? 16 : D % 8 == 0 ? 8 : D % 4 == 0 ? 4 : D % 2 == 0 ? 2 : 1;  // elements per vector
constexpr int64_t CHUNK = 16;  // rows of one prompt that a thread takes together
// Tokens by which a row's keys and values are prefetched ahead. They are read once and prefetched with low temporal locality, so
// that they do not evict the model's weights from the cache.
constexpr int64_t AHEAD = 12;

using FloatVector = typename Vector<SIMD_WIDTH>::Type;

#ifdef BFLOAT16
using Element = uint16_t;
inline float to_float(Element x) {
  uint32_t bits = uint32_t(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline Element from_float(float x) {  // round to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return Element((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
typedef Element ElementVector __attribute__((vector_size(SIMD_WIDTH * sizeof(Element)), aligned(sizeof(Element)), may_alias));
typedef uint32_t BitsVector __attribute__((vector_size(SIMD_WIDTH * sizeof(uint32_t))));
inline FloatVector load(const Element* from) {
  return reinterpret_cast<FloatVector>(__builtin_convertvector(*reinterpret_cast<const ElementVector*>(from), BitsVector) << 16);
}
#else
using Element = float;
inline float to_float(Element x) { return x; }
inline Element from_float(float x) { return x; }
inline FloatVector load(const Element* from) { return *reinterpret_cast<const FloatVector*>(from); }
#endif

// n elements as floats: in place if they are floats already, else converted into `buffer`.
inline const float* as_floats(const Element* from, [[maybe_unused]] std::vector<float>& buffer, [[maybe_unused]] int64_t n) {
#ifdef BFLOAT16
  if (int64_t(buffer.size()) < n) buffer.resize(n);
  for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(from[i]);
  return buffer.data();
#else
  return from;
#endif
}

// One head of the query of a row's newest token, with the row's own keys and values of the key-value head that it uses.
struct Query {
  const Element* query;
  const Element *keys, *values;  // [count, D]
  int64_t count;
  Element* out;
};

// While token t of `from` is read, prefetch the one AHEAD tokens later; past the end of `from`, continue with `next`.
inline void prefetch(const Element* from, int64_t t, int64_t count, const Element* next) {
  const Element* token = t + AHEAD < count ? from + (t + AHEAD) * D : next + (t + AHEAD - count) * D;
  for (int64_t d = 0; d < D; d += 64 / sizeof(Element)) __builtin_prefetch(token + d, 0, 0);
}

// scores[t] = the row's own key t . query.
inline void row_scores(const float* query, const Query& row, float* scores, const Element* next) {
  FloatVector queries[D / SIMD_WIDTH];
  for (int64_t v = 0; v < D / SIMD_WIDTH; ++v) queries[v] = *reinterpret_cast<const FloatVector*>(query + v * SIMD_WIDTH);
  for (int64_t t = 0; t < row.count; ++t) {
    prefetch(row.keys, t, row.count, next);
    FloatVector sums = load(row.keys + t * D) * queries[0];
    for (int64_t v = 1; v < D / SIMD_WIDTH; ++v) sums += load(row.keys + t * D + v * SIMD_WIDTH) * queries[v];
    scores[t] = horizontal_sum<SIMD_WIDTH>(sums);
  }
}

// output += sum over t of weights[t] * the row's own value t.
inline void add_row_values(const float* weights, const Query& row, float* output, const Element* next) {
  FloatVector attended[D / SIMD_WIDTH];
  for (int64_t v = 0; v < D / SIMD_WIDTH; ++v) attended[v] = *reinterpret_cast<const FloatVector*>(output + v * SIMD_WIDTH);
  for (int64_t t = 0; t < row.count; ++t) {
    prefetch(row.values, t, row.count, next);
    for (int64_t v = 0; v < D / SIMD_WIDTH; ++v) attended[v] += weights[t] * load(row.values + t * D + v * SIMD_WIDTH);
  }
  for (int64_t v = 0; v < D / SIMD_WIDTH; ++v) *reinterpret_cast<FloatVector*>(output + v * SIMD_WIDTH) = attended[v];
}

// Attention of `count` <= LANES queries, one per vector lane, that share one prompt, whose n keys and values are [n, D]. Scores
// with the prompt's keys are stored as [n, LANES], so that the softmax needs no reduction across lanes; after them
// come the scores with each row's own keys, as [LANES, T].
template <int64_t LANES>
inline void attend_lanes(const Query* queries, int64_t count, const float* keys, const float* values, int64_t n, float scale,
                         float* scores, int64_t T) {
  float scaled[LANES][D] = {}, transposed[D][LANES] = {}, max[LANES], sums[LANES] = {}, outputs[LANES][D] = {};
  for (int64_t lane = 0; lane < count; ++lane) {
    for (int64_t d = 0; d < D; ++d) transposed[d][lane] = scaled[lane][d] = scale * to_float(queries[lane].query[d]);
  }
  std::memset(scores, 0, n * LANES * sizeof(float));
  multiply<LANES>(keys, D, 1, &transposed[0][0], LANES, scores, LANES, n, D);
  for (float& x : max) x = -INFINITY;
  for (int64_t l = 0; l < n; ++l) {
#pragma omp simd
    for (int64_t lane = 0; lane < LANES; ++lane) max[lane] = scores[l * LANES + lane] > max[lane] ? scores[l * LANES + lane] : max[lane];
  }
  float* all_row_scores = scores + n * LANES;
  for (int64_t lane = 0; lane < count; ++lane) {
    float *own = all_row_scores + lane * T, row_max = max[lane], sum = 0;
    const int64_t m = queries[lane].count;
    row_scores(scaled[lane], queries[lane], own, lane + 1 < count ? queries[lane + 1].keys : queries[0].values);
#pragma omp simd reduction(max : row_max)
    for (int64_t t = 0; t < m; ++t) row_max = own[t] > row_max ? own[t] : row_max;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < m; ++t) sum += own[t] = exponential(own[t] - row_max);
    max[lane] = row_max;
    sums[lane] = sum;
  }
  for (int64_t l = 0; l < n; ++l) {
#pragma omp simd
    for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += scores[l * LANES + lane] = exponential(scores[l * LANES + lane] - max[lane]);
  }
  for (int64_t d = 0; d < D; d += SIMD_WIDTH) multiply<SIMD_WIDTH>(scores, 1, LANES, values + d, D, &outputs[0][d], D, LANES, n);
  for (int64_t lane = 0; lane < count; ++lane) {
    add_row_values(all_row_scores + lane * T, queries[lane], outputs[lane], queries[lane + 1 < count ? lane + 1 : lane].values);
    for (int64_t d = 0; d < D; ++d) queries[lane].out[d] = from_float(outputs[lane][d] / sums[lane]);
  }
}

// The KV cache of the rows and of their prompts, and one layer of it. T and L are capacities in tokens, of a row and of a prompt.
struct Cache {
  Element* row_cache;                          // [layers, 2 (keys, values), row_capacity, K, T, D]
  const Element *prompt_keys, *prompt_values;  // [layers, prompt_capacity, K, L, D]
  const int64_t *written, *prompt_lengths;     // [R], tokens of each row, the newest included; [P], tokens of each prompt
  const int64_t *prompts, *order, *starts;     // [R], prompt of each row; the rows of prompt p: order[starts[p]:starts[p + 1]]
  int64_t layer, row_capacity, prompt_capacity, P, K, T, L;
  int64_t max_rows;                            // the most rows of any prompt

  // The keys (part = 0) or values (part = 1) of a row, [T, D].
  Element* of_row(int64_t part, int64_t row, int64_t k) const {
    return row_cache + (((layer * 2 + part) * row_capacity + row) * K + k) * T * D;
  }
  // Where the keys or values of a prompt, [L, D], begin in prompt_keys or prompt_values.
  int64_t prompt_offset(int64_t p, int64_t k) const { return ((layer * prompt_capacity + p) * K + k) * L * D; }
};

// Buffers of one thread. rotated_heads: queries per row for which `rotated` has space.
struct Scratch {
  std::vector<float> scores, keys, values, rotated;
  std::vector<Query> queries;

  explicit Scratch(const Cache& cache, int64_t rotated_heads = 0)
      : scores((cache.L + cache.T) * 16), rotated(CHUNK * rotated_heads * D) {}
};

// Writes the attention output of each row's newest token to out [R, H, D]; heads_per_kv = H / K query heads share a key-value
// head. Must be called by all threads of a parallel region, which share the work. append(row, k, key, value, rotated) writes the
// row's newest key and value of head k to `key` and `value` in the KV cache and returns the row's queries that use this head,
// [heads_per_kv, D]; it may store them in the buffer `rotated`.
template <typename Append>
inline void attend_newest(const Cache& cache, int64_t heads_per_kv, float scale, Scratch& scratch, Element* out, Append append) {
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
          Element *keys = cache.of_row(0, row, k), *values = cache.of_row(1, row, k);
          float* rotated = scratch.rotated.data() + (i - first) * heads_per_kv * D;
          const Element* queries = append(row, k, keys + (m - 1) * D, values + (m - 1) * D, rotated);
          for (int64_t h = 0; h < heads_per_kv; ++h) {
            scratch.queries.push_back({queries + h * D, keys, values, m, out + ((row * K + k) * heads_per_kv + h) * D});
          }
        }
        const float* prompt_keys = as_floats(cache.prompt_keys + offset, scratch.keys, n * D);
        const float* prompt_values = as_floats(cache.prompt_values + offset, scratch.values, n * D);
        for (int64_t i = 0, left = scratch.queries.size(); left > 0; i += 16, left -= 16) {
          const auto attend = left > 8 ? attend_lanes<16> : attend_lanes<8>;
          attend(scratch.queries.data() + i, std::min<int64_t>(left, 16), prompt_keys, prompt_values, n, scale,
                 scratch.scores.data(), cache.T);
        }
      }
    }
  }
}

}  // namespace
