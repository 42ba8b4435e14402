// Attention for one step of generation. Each row's newest query meets its prompt's keys, which are read once for some rows of a
// group, and the row's own; one softmax goes over both. Compiled for one HEAD_SIZE and one kind of Element.
#pragma once
#include <algorithm>
#include <vector>

#include "exponential.h"
#include "multiply.h"

namespace {  // for other sizes of heads the same names mean other things

constexpr int64_t D = HEAD_SIZE;
constexpr int64_t PART = D % 16 == 0 ? 16 : D % 8 == 0 ? 8 : D % 4 == 0 ? 4 : D % 2 == 0 ? 2 : 1;  // of D, in one vector
constexpr int64_t CHUNK = 16;  // rows of a group that one thread takes
constexpr int64_t AHEAD = 12;  // tokens whose keys are fetched early; read once, they leave the caches to the weights

using Wide = typename Vector<PART>::Type;

#ifdef BFLOAT16
using Element = uint16_t;
inline float widen(Element x) {
  uint32_t bits = uint32_t(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline Element narrow(float x) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return Element((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
typedef Element Narrow __attribute__((vector_size(PART * sizeof(Element)), aligned(sizeof(Element)), may_alias));
typedef uint32_t Bits __attribute__((vector_size(PART * sizeof(uint32_t))));
inline Wide load(const Element* from) {
  return reinterpret_cast<Wide>(__builtin_convertvector(*reinterpret_cast<const Narrow*>(from), Bits) << 16);
}
#else
using Element = float;
inline float widen(Element x) { return x; }
inline Element narrow(float x) { return x; }
inline Wide load(const Element* from) { return *reinterpret_cast<const Wide*>(from); }
#endif

// The n numbers as floats: where they lie, or copied to `room` if they are none.
inline const float* as_floats(const Element* from, [[maybe_unused]] std::vector<float>& room, [[maybe_unused]] int64_t n) {
#ifdef BFLOAT16
  if (int64_t(room.size()) < n) room.resize(n);
  for (int64_t i = 0; i < n; ++i) room[i] = widen(from[i]);
  return room.data();
#else
  return from;
#endif
}

// A query: the newest token of a row, at one head.
struct Query {
  const Element* query;
  const Element *keys, *values;  // of the row, [count, D]
  int64_t count;
  Element* out;
};

// While token t of `from` is read: what is read AHEAD tokens later, which is `then` after the last.
inline void fetch(const Element* from, int64_t t, int64_t count, const Element* then) {
  const Element* token = t + AHEAD < count ? from + (t + AHEAD) * D : then + (t + AHEAD - count) * D;
  for (int64_t d = 0; d < D; d += 64 / sizeof(Element)) __builtin_prefetch(token + d, 0, 0);
}

// The scores of a query and its row's keys.
inline void meet_own(const float* query, const Query& own, float* scores, const Element* then) {
  Wide queries[D / PART];
  for (int64_t v = 0; v < D / PART; ++v) queries[v] = *reinterpret_cast<const Wide*>(query + v * PART);
  for (int64_t t = 0; t < own.count; ++t) {
    fetch(own.keys, t, own.count, then);
    Wide sums = load(own.keys + t * D) * queries[0];
    for (int64_t v = 1; v < D / PART; ++v) sums += load(own.keys + t * D + v * PART) * queries[v];
    scores[t] = sum_of<PART>(sums);
  }
}

inline void gather_own(const float* weights, const Query& own, float* sums, const Element* then) {
  Wide gathered[D / PART];
  for (int64_t v = 0; v < D / PART; ++v) gathered[v] = *reinterpret_cast<const Wide*>(sums + v * PART);
  for (int64_t t = 0; t < own.count; ++t) {
    fetch(own.values, t, own.count, then);
    for (int64_t v = 0; v < D / PART; ++v) gathered[v] += weights[t] * load(own.values + t * D + v * PART);
  }
  for (int64_t v = 0; v < D / PART; ++v) *reinterpret_cast<Wide*>(sums + v * PART) = gathered[v];
}

// Up to LANES queries of one prompt, whose n keys and values are given, one in each lane: the scores with the prompt lie as
// [n, LANES], so that their softmax needs no sum across lanes; those with the rows' own keys as [LANES, room].
template <int64_t LANES>
inline void answer(const Query* all, int64_t count, const float* keys, const float* values, int64_t n, float scale, float* scores,
                   int64_t room) {
  float queries[LANES][D] = {}, columns[D][LANES] = {}, top[LANES], sums[LANES] = {}, outputs[LANES][D] = {};
  for (int64_t lane = 0; lane < count; ++lane) {
    for (int64_t d = 0; d < D; ++d) columns[d][lane] = queries[lane][d] = scale * widen(all[lane].query[d]);
  }
  std::memset(scores, 0, n * LANES * sizeof(float));
  multiply<LANES>(keys, D, 1, &columns[0][0], LANES, scores, LANES, n, D);
  for (float& x : top) x = -INFINITY;
  for (int64_t l = 0; l < n; ++l) {
#pragma omp simd
    for (int64_t lane = 0; lane < LANES; ++lane) top[lane] = scores[l * LANES + lane] > top[lane] ? scores[l * LANES + lane] : top[lane];
  }
  float* own_scores = scores + n * LANES;
  for (int64_t lane = 0; lane < count; ++lane) {
    float *own = own_scores + lane * room, most = top[lane], sum = 0;
    const int64_t m = all[lane].count;
    meet_own(queries[lane], all[lane], own, lane + 1 < count ? all[lane + 1].keys : all[0].values);
#pragma omp simd reduction(max : most)
    for (int64_t t = 0; t < m; ++t) most = own[t] > most ? own[t] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < m; ++t) sum += own[t] = exponential(own[t] - most);
    top[lane] = most;
    sums[lane] = sum;
  }
  for (int64_t l = 0; l < n; ++l) {
#pragma omp simd
    for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += scores[l * LANES + lane] = exponential(scores[l * LANES + lane] - top[lane]);
  }
  for (int64_t d = 0; d < D; d += PART) multiply<PART>(scores, 1, LANES, values + d, D, &outputs[0][d], D, LANES, n);
  for (int64_t lane = 0; lane < count; ++lane) {
    gather_own(own_scores + lane * room, all[lane], outputs[lane], all[lane + 1 < count ? lane + 1 : lane].values);
    for (int64_t d = 0; d < D; ++d) all[lane].out[d] = narrow(outputs[lane][d] / sums[lane]);
  }
}

// The rows being written and their prompts, in one of the layers.
struct Cache {
  Element* of_rows;                                             // [layers, keys and values, rows, K, T, D]
  const Element *prompt_keys, *prompt_values;                   // [layers, prompts, K, L, D]
  const int64_t *written, *lengths, *prompts, *order, *starts;  // tokens of each row, of each prompt; each row's prompt;
  int64_t layer, rows, prompts_room, P, K, T, L, most_rows;  // rows order[starts[p]] to order[starts[p + 1]] have prompt p

  // A row's keys (what = 0) or values (1).
  Element* of_row(int64_t what, int64_t row, int64_t k) const { return of_rows + (((layer * 2 + what) * rows + row) * K + k) * T * D; }
  int64_t of_prompt(int64_t p, int64_t k) const { return ((layer * prompts_room + p) * K + k) * L * D; }
};

// What a thread needs besides.
struct Room {
  std::vector<float> scores, keys, values, turned;
  std::vector<Query> queries;

  explicit Room(const Cache& cache, int64_t turned_heads = 0) : scores((cache.L + cache.T) * 16), turned(CHUNK * turned_heads * D) {}
};

// What each row's newest token gathers, to out [R, H, D]; `share` of H heads have keys and values in common. Called by all threads of
// a parallel region, which share the work. place(row, k, key, value, turned) writes the newest key and value of head k where they
// are kept, and tells where the row's queries of that head lie, [share, D]: in `turned` if nowhere else.
template <typename Place>
inline void attend_newest(const Cache& cache, int64_t share, float scale, Room& room, Element* out, Place place) {
  const int64_t K = cache.K, chunks = (cache.most_rows + CHUNK - 1) / CHUNK;
#pragma omp for schedule(dynamic) collapse(3)
  for (int64_t p = 0; p < cache.P; ++p) {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t first = cache.starts[p] + chunk * CHUNK, end = std::min(first + CHUNK, cache.starts[p + 1]);
        const int64_t of_prompt = cache.of_prompt(p, k), n = cache.lengths[p];
        if (first >= end) continue;
        room.queries.clear();
        for (int64_t i = first; i < end; ++i) {
          const int64_t row = cache.order[i], m = cache.written[row];
          Element *keys = cache.of_row(0, row, k), *values = cache.of_row(1, row, k);
          float* turned = room.turned.data() + (i - first) * share * D;
          const Element* queries = place(row, k, keys + (m - 1) * D, values + (m - 1) * D, turned);
          for (int64_t s = 0; s < share; ++s) {
            room.queries.push_back({queries + s * D, keys, values, m, out + ((row * K + k) * share + s) * D});
          }
        }
        const float* of_keys = as_floats(cache.prompt_keys + of_prompt, room.keys, n * D);
        const float* of_values = as_floats(cache.prompt_values + of_prompt, room.values, n * D);
        for (int64_t i = 0, left = room.queries.size(); left > 0; i += 16, left -= 16) {
          const auto use = left > 8 ? answer<16> : answer<8>;
          use(room.queries.data() + i, std::min<int64_t>(left, 16), of_keys, of_values, n, scale, room.scores.data(), cache.T);
        }
      }
    }
  }
}

}  // namespace
