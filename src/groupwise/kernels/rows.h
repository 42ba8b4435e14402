// RMSNorm, RoPE and SwiGLU of one token or one head, each in one pass.
#pragma once
#include "exponential.h"

// 1 / sqrt(mean(x^2) + epsilon).
inline float inverse_rms(const float* x, float epsilon, int64_t D) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += x[d] * x[d];
  return 1 / std::sqrt(sum / D + epsilon);
}

// RMSNorm: y = x * inverse_rms(x) * (w + offset). Returns inverse_rms(x), which the backward pass needs.
inline float rms_norm_row(const float* x, const float* w, float offset, float epsilon, float* y, int64_t D) {
  const float i = inverse_rms(x, epsilon, D);
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) y[d] = x[d] * i * (w[d] + offset);
  return i;
}

// Rotary embedding of one head: element d is rotated together with element d + D / 2. If w is not null the head is RMSNormed
// first (QK-norm). Returns inverse_rms(x) of that norm, or 1 without it.
inline float rope_head(const float* x, const float* w, float offset, float epsilon, const float* cos, const float* sin, float* y,
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
  const float i = inverse_rms(x, epsilon, D);
#pragma omp simd
  for (int64_t d = 0; d < half; ++d) {
    const float a = x[d] * i * (w[d] + offset), b = x[d + half] * i * (w[d + half] + offset);
    y[d] = a * cos[d] - b * sin[d];
    y[d + half] = b * cos[d + half] + a * sin[d + half];
  }
  return i;
}

// silu(gate) * up, where silu(x) = x / (1 + e^-x), computed from e^-|x|, because `exponential` takes only x <= 0.
inline float swiglu(float gate, float up) {
  const float e = exponential(-std::fabs(gate));
  return gate * (gate < 0 ? e : 1.0f) / (1 + e) * up;
}
