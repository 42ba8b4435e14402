#pragma once
#include "exponential.h"

// tanh(x), to a relative error of about 2e-7, in a form that vectorises: near 0 a polynomial (coefficients of Cephes' tanhf),
// elsewhere from e^(-2 |x|). NaN gives NaN.
inline float hyperbolic_tangent(float x) {
  const float magnitude = std::fabs(x), square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = p * square * x + x, e = exponential(-2 * magnitude), far = std::copysign((1 - e) / (1 + e), x);
  return magnitude < 0.625f ? near : far;
}

// The soft cap c of n scores, in place: c tanh(score / c).
inline void cap_scores(float* scores, int64_t n, float c) {
  const float inverse = 1 / c;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) scores[i] = c * hyperbolic_tangent(scores[i] * inverse);
}
