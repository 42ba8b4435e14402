#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// e^x for x <= 0 (rounding may leave x slightly above 0), to a relative error of about 2e-7, in a form that vectorises: e^x = 2^n
// e^r with |r| <= ln(2) / 2, and a polynomial for e^r (coefficients of Cephes' expf). x is clamped at -87, so the result is never
// below about 1e-38. NaN gives NaN.
inline float exponential(float x) {
  const float n = std::nearbyint((x > -87.0f ? x : -87.0f) * 1.44269504f);  // finite even for NaN, so that int32_t(n) is defined
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
