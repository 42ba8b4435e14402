// What is done to one row of numbers, in one pass: norms, rotations, gates.
#pragma once
#include "exponential.h"

// One over the root of a row's mean square.
inline float inverse_root(const float* x, float epsilon, int64_t D) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += x[d] * x[d];
  return 1 / std::sqrt(sum / D + epsilon);
}

// y = x i (w + offset), where i is one over the root of x's mean square. Returns i.
inline float norm_row(const float* x, const float* w, float offset, float epsilon, float* y, int64_t D) {
  const float i = inverse_root(x, epsilon, D);
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) y[d] = x[d] * i * (w[d] + offset);
  return i;
}

// Rotary embedding of one head, whose halves turn with each other; normed first if w is given. Returns the norm's i, or 1.
inline float turn_head(const float* x, const float* w, float offset, float epsilon, const float* cos, const float* sin, float* y,
                       int64_t D) {
  const int64_t half = D / 2;
  if (!w) {
#pragma omp simd
    for (int64_t d = 0; d < half; ++d) {
      const float a = x[d], b = x[d + half];
      y[d] = a * cos[d] - b * sin[d];
      y[d + half] = b * cos[d + half] + a * sin[d + half];
    }
    return 1;
  }
  const float i = inverse_root(x, epsilon, D);
#pragma omp simd
  for (int64_t d = 0; d < half; ++d) {
    const float a = x[d] * i * (w[d] + offset), b = x[d + half] * i * (w[d + half] + offset);
    y[d] = a * cos[d] - b * sin[d];
    y[d + half] = b * cos[d + half] + a * sin[d + half];
  }
  return i;
}

// silu(gate) up, where silu(x) = x / (1 + e^-x).
inline float gated_product(float gate, float up) {
  const float e = exponential(-std::fabs(gate));
  return gate * (gate < 0 ? e : 1.0f) / (1 + e) * up;
}
