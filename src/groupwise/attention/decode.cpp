// Attention for one step of generation. Each row's newest query meets its prompt's keys, which are read once for a few rows of
// a group, and the row's own; one softmax goes over both. Compiled for one HEAD_SIZE and one kind of Element; a query meets
// LANES keys of a prompt at once, and prompts are padded to a multiple. See kernel.py.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t D = HEAD_SIZE;
constexpr int64_t TILE = 4;    // queries that meet a prompt's keys together
constexpr int64_t CHUNK = 16;  // rows of a group that one thread takes
constexpr int64_t AHEAD = 12;  // tokens whose keys are fetched early; read once, they leave the caches to the weights

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
#else
using Element = float;
inline float widen(Element x) { return x; }
inline Element narrow(float x) { return x; }
#endif

// Of x <= 0, to about 2e-7 relative: e^x = 2^n e^r with |r| <= ln(2) / 2, and a polynomial for e^r (Cephes).
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  float r = x - n * 0.693359375f;
  r += n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

// scores[i][l] of TILE queries and the n keys of a prompt, which lie as [D, room].
void meet_prompt(const float (*queries)[D], const Element* keys, int64_t n, int64_t room, float* const* scores) {
  for (int64_t l = 0; l < n; l += LANES) {
    float sums[TILE][LANES] = {};
    for (int64_t d = 0; d < D; ++d) {
      const Element* key = keys + d * room + l;
      for (int i = 0; i < TILE; ++i) {
#pragma omp simd
        for (int j = 0; j < LANES; ++j) sums[i][j] += queries[i][d] * widen(key[j]);
      }
    }
    for (int i = 0; i < TILE; ++i) std::memcpy(scores[i] + l, sums[i], sizeof(sums[i]));
  }
}

// The scores of a query and its row's m keys, which lie as [m, D].
void meet_own(const float* query, const Element* keys, int64_t m, float* scores) {
  for (int64_t t = 0; t < m; ++t) {
    float sum = 0;
    for (int64_t d = 0; d < D; d += 16) __builtin_prefetch(keys + (t + AHEAD) * D + d, 0, 0);
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) sum += query[d] * widen(keys[t * D + d]);
    scores[t] = sum;
  }
}

// Scores to exponentials; returns one over their sum.
float soften(float* scores, int64_t n) {
  float top = scores[0], sum = 0;
#pragma omp simd reduction(max : top)
  for (int64_t t = 0; t < n; ++t) top = scores[t] > top ? scores[t] : top;
#pragma omp simd reduction(+ : sum)
  for (int64_t t = 0; t < n; ++t) sum += scores[t] = exponential(scores[t] - top);
  return 1 / sum;
}

}  // namespace

// Shapes: query and out [R, H, D]; new_keys and new_values [R, K, D]; keys and values [rows, K, T, D], into which the new ones are
// written at written[r] - 1; prompt_keys [P, K, D, L]; prompt_values [P, K, L, D]; lengths [P]. Rows order[starts[p]] up to
// order[starts[p + 1]] have prompt p.
extern "C" void decode(const Element* query, const Element* new_keys, const Element* new_values, Element* keys, Element* values,
                       const Element* prompt_keys, const Element* prompt_values, const int64_t* written, const int64_t* lengths,
                       const int64_t* order, const int64_t* starts, Element* out, float scale, int64_t P, int64_t H, int64_t K,
                       int64_t T, int64_t L, int64_t most_rows) {
  const int64_t share = H / K, chunks = (most_rows + CHUNK - 1) / CHUNK, width = L + T + LANES;
#pragma omp parallel
  {
    std::vector<float> scratch(TILE * width);
#pragma omp for schedule(dynamic) collapse(3)
    for (int64_t p = 0; p < P; ++p) {
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const int64_t first = starts[p] + chunk * CHUNK, n = lengths[p];
          const int64_t end = first + CHUNK < starts[p + 1] ? first + CHUNK : starts[p + 1];
          for (int64_t i = first; i < end; ++i) {
            const int64_t from = (order[i] * K + k) * D, to = ((order[i] * K + k) * T + written[order[i]] - 1) * D;
            std::memcpy(keys + to, new_keys + from, D * sizeof(Element));
            std::memcpy(values + to, new_values + from, D * sizeof(Element));
          }
          for (int64_t tile = first * share; tile < end * share; tile += TILE) {
            float queries[TILE][D] = {}, sums[TILE][D] = {}, *scores[TILE];
            int64_t rows[TILE], heads[TILE];
            const int64_t count = end * share - tile < TILE ? end * share - tile : TILE;
            for (int i = 0; i < TILE; ++i) {
              const int64_t which = i < count ? tile + i : tile;  // a tile that is not full repeats its first query
              rows[i] = order[which / share];
              heads[i] = k * share + which % share;
              scores[i] = scratch.data() + i * width;
              for (int64_t d = 0; d < D; ++d) queries[i][d] = scale * widen(query[(rows[i] * H + heads[i]) * D + d]);
            }
            meet_prompt(queries, prompt_keys + (p * K + k) * D * L, n, L, scores);
            float over_sum[TILE];
            for (int i = 0; i < count; ++i) {
              const int64_t m = written[rows[i]];
              meet_own(queries[i], keys + (rows[i] * K + k) * T * D, m, scores[i] + n);
              over_sum[i] = soften(scores[i], n + m);
            }
            for (int64_t l = 0; l < n; ++l) {
              const Element* value = prompt_values + ((p * K + k) * L + l) * D;
              for (int i = 0; i < TILE; ++i) {
                const float weight = scores[i][l];
#pragma omp simd
                for (int64_t d = 0; d < D; ++d) sums[i][d] += weight * widen(value[d]);
              }
            }
            for (int i = 0; i < count; ++i) {
              const Element* value = values + (rows[i] * K + k) * T * D;
              for (int64_t t = 0; t < written[rows[i]]; ++t, value += D) {
                const float weight = scores[i][n + t];
                for (int64_t d = 0; d < D; d += 16) __builtin_prefetch(value + AHEAD * D + d, 0, 0);
#pragma omp simd
                for (int64_t d = 0; d < D; ++d) sums[i][d] += weight * widen(value[d]);
              }
              Element* to = out + (rows[i] * H + heads[i]) * D;
              for (int64_t d = 0; d < D; ++d) to[d] = narrow(sums[i][d] * over_sum[i]);
            }
          }
        }
      }
    }
  }
}
