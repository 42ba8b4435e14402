// Samples one token per row by inverting the cumulative distribution of the softmax of its logits. See sample.py.
#include <limits>
#include <vector>

#include "exponential.h"

namespace {

constexpr int64_t CHUNK = 512;  // tokens per partial sum; the token is then searched for within a single chunk

// The unnormalised probability e^(logit - max).
inline float weight(float logit, float max) {
  const float x = logit - max;
  return x > -87.0f ? exponential(x) : 0.0f;  // 0 for masked tokens (logit -inf), which exponential() would clamp at e^-87
}

}  // namespace

// logits [R, V]; uniforms [R] in [0, 1); tokens and logprobs [R]. The token is V, and the log-probability is not written, if a
// logit is NaN or +inf or if all are -inf.
extern "C" void sample(const float* logits, const double* uniforms, int64_t* tokens, float* logprobs, int64_t R, int64_t V) {
  const int64_t chunks = (V + CHUNK - 1) / CHUNK;
#pragma omp parallel if (R * V > 1 << 12)
  {
    std::vector<double> cumulative(chunks);
#pragma omp for
    for (int64_t r = 0; r < R; ++r) {
      const float* row = logits + r * V;
      float max = row[0];
      int invalid = 0;
#pragma omp simd reduction(max : max) reduction(| : invalid)
      for (int64_t v = 0; v < V; ++v) {
        max = row[v] > max ? row[v] : max;
        invalid |= !(row[v] <= std::numeric_limits<float>::max());
      }
      tokens[r] = V;
      if (invalid || max == -std::numeric_limits<float>::infinity()) continue;

      double total = 0;
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t end = c + 1 < chunks ? (c + 1) * CHUNK : V;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t v = c * CHUNK; v < end; ++v) sum += weight(row[v], max);
        cumulative[c] = total += sum;
      }
      // In (0, total], so that the sampled token has a positive probability.
      const double target = (1 - uniforms[r]) * total;
      int64_t c = 0;
      while (c + 1 < chunks && cumulative[c] < target) ++c;
      double rest = target - (c ? cumulative[c - 1] : 0);
      // If rounding leaves `rest` above 0 at the end of the chunk, the last token with a positive probability is taken.
      int64_t token = c * CHUNK, last = token;
      for (const int64_t end = c + 1 < chunks ? token + CHUNK : V; token < end; ++token) {
        const float w = weight(row[token], max);
        rest -= w;
        if (w > 0) last = token;
        if (w > 0 && rest <= 0) break;
      }
      tokens[r] = last;
      logprobs[r] = float(row[last] - max - std::log(total));
    }
  }
}
