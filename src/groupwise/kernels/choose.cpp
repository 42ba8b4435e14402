// One token of a vocabulary for each row, drawn by inverting the cumulative sum of its softmax. See choose.py.
#include <limits>
#include <vector>

#include "exponential.h"

namespace {

constexpr int64_t BLOCK = 512;  // tokens whose weights are summed before one is looked for among them

inline float weight(float score, float top) {
  const float x = score - top;
  return x > -87.0f ? exponential(x) : 0.0f;  // nothing, where a limit has put minus infinity
}

}  // namespace

// scores [R, V]; uniforms [R] in [0, 1); tokens and logprobs [R]. The token is V where a score is infinite or not a number.
extern "C" void choose(const float* scores, const double* uniforms, int64_t* tokens, float* logprobs, int64_t R, int64_t V) {
  const int64_t blocks = (V + BLOCK - 1) / BLOCK;
#pragma omp parallel if (R * V > 1 << 12)
  {
    std::vector<double> ends(blocks);
#pragma omp for
    for (int64_t r = 0; r < R; ++r) {
      const float* row = scores + r * V;
      float top = row[0];
      int strange = 0;
#pragma omp simd reduction(max : top) reduction(| : strange)
      for (int64_t v = 0; v < V; ++v) {
        top = row[v] > top ? row[v] : top;
        strange |= !(row[v] <= std::numeric_limits<float>::max());
      }
      tokens[r] = V;
      if (strange || top == -std::numeric_limits<float>::infinity()) continue;

      double total = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t end = b + 1 < blocks ? (b + 1) * BLOCK : V;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t v = b * BLOCK; v < end; ++v) sum += weight(row[v], top);
        ends[b] = total += sum;
      }
      // In (0, total], so that the token's weight is above zero, whatever rounds.
      const double point = (1 - uniforms[r]) * total;
      int64_t b = 0;
      while (b + 1 < blocks && ends[b] < point) ++b;
      double rest = point - (b ? ends[b - 1] : 0);
      int64_t token = b * BLOCK, last = token;
      for (const int64_t end = b + 1 < blocks ? token + BLOCK : V; token < end; ++token) {
        const float w = weight(row[token], top);
        rest -= w;
        if (w > 0) last = token;
        if (w > 0 && rest <= 0) break;
      }
      tokens[r] = last;
      logprobs[r] = float(row[last] - top - std::log(total));
    }
  }
}
