#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// Of x <= 0 (or above by no more than rounding), to about 2e-7 relative: e^x = 2^n e^r with |r| <= ln(2) / 2, and a polynomial for
// e^r (Cephes). Below -87 as of -87, about 1e-38; of NaN, NaN.
inline float exponential(float x) {
  const float n = std::nearbyint((x > -87.0f ? x : -87.0f) * 1.44269504f);  // a number, even if x is none
  float r = (x < -87.0f ? -87.0f : x) - n * 0.693359375f;
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
