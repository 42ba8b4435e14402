// Causal convolutions over packed sequences, forward and backward, and steps of one token of recurrent layers. See recurrent.py.
#include <algorithm>

#include "exponential.h"

namespace {

constexpr int64_t MIN_PARALLEL = 1 << 13;  // elements above which several threads are faster than one

// silu(z) = z sigmoid(z), and its derivative.
inline float sigmoid(float z) {
  const float e = exponential(-std::fabs(z));
  return (z < 0 ? e : 1.0f) / (1 + e);
}

}  // namespace

// One token of Mamba2 for R rows: S = e^(dt A) S + dt x B^T, y = S C + D x. state [R, H, P, N] is updated in place; x [R, H, P] and
// B and C [R, G, N] have rows `..._stride` apart; dt and log_decay = dt A [R, H], D [H] or null, y [R, H, P].
extern "C" void mamba2_step(float* state, const float* x, const float* dt, const float* log_decay, const float* B, const float* C,
                            const float* D, float* y, int64_t R, int64_t H, int64_t G, int64_t P, int64_t N, int64_t x_stride,
                            int64_t B_stride, int64_t C_stride) {
#pragma omp parallel for if (R * H * P * N > 8 * MIN_PARALLEL)
  for (int64_t task = 0; task < R * H; ++task) {
    const int64_t r = task / H, h = task % H, g = h / (H / G);
    const float decay = exponential(log_decay[task]), step = dt[task], skip = D ? D[h] : 0;
    const float *b = B + r * B_stride + g * N, *c = C + r * C_stride + g * N, *in = x + r * x_stride + h * P;
    for (int64_t p = 0; p < P; ++p) {
      float *s = state + (task * P + p) * N, sum = 0;
      const float write = step * in[p];
#pragma omp simd reduction(+ : sum)
      for (int64_t n = 0; n < N; ++n) {
        const float updated = s[n] * decay + write * b[n];
        s[n] = updated;
        sum += updated * c[n];
      }
      y[task * P + p] = sum + skip * in[p];
    }
  }
}

// A depthwise causal convolution of N packed tokens: y[n, c] = f(bias[c] + sum_k w[k, c] x[source[n, k], c]), where f is silu or
// nothing, and a source of -1 is zero. x [N, C] has rows x_stride apart; w [K, C], y [N, C], bias [C] or null.
extern "C" void convolve(const float* x, const float* w, const float* bias, const int64_t* source, float* y, int64_t silu, int64_t N,
                         int64_t K, int64_t C, int64_t x_stride) {
#pragma omp parallel for if (N * C > MIN_PARALLEL)
  for (int64_t n = 0; n < N; ++n) {
    float* out = y + n * C;
    for (int64_t c = 0; c < C; ++c) out[c] = bias ? bias[c] : 0;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t from = source[n * K + k];
      if (from < 0) continue;
      const float *in = x + from * x_stride, *weight = w + k * C;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) out[c] += weight[c] * in[c];
    }
    if (!silu) continue;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) out[c] *= sigmoid(out[c]);
  }
}

// Its gradients: dx [N, C] and dw [K, C] and d_bias [C] (or null) are added to.
extern "C" void convolve_backward(const float* dy, const float* x, const float* w, const float* bias, const int64_t* source, float* dx,
                                  float* dw, float* d_bias, int64_t silu, int64_t N, int64_t K, int64_t C, int64_t x_stride) {
  constexpr int64_t CHANNELS = 64;  // of one thread at a time: tokens add to the gradients of earlier ones, channels are independent
#pragma omp parallel for if (N * C > MIN_PARALLEL)
  for (int64_t first = 0; first < C; first += CHANNELS) {
    const int64_t width = std::min(CHANNELS, C - first);
    float z[CHANNELS], dz[CHANNELS];
    for (int64_t n = 0; n < N; ++n) {
      const float* d_out = dy + n * C + first;
      if (silu) {
        for (int64_t c = 0; c < width; ++c) z[c] = bias ? bias[first + c] : 0;
        for (int64_t k = 0; k < K; ++k) {
          const int64_t from = source[n * K + k];
          if (from < 0) continue;
          const float *in = x + from * x_stride + first, *weight = w + k * C + first;
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) z[c] += weight[c] * in[c];
        }
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) {
          const float s = sigmoid(z[c]);
          dz[c] = d_out[c] * s * (1 + z[c] * (1 - s));
        }
      } else {
        for (int64_t c = 0; c < width; ++c) dz[c] = d_out[c];
      }
      if (d_bias) {
        for (int64_t c = 0; c < width; ++c) d_bias[first + c] += dz[c];
      }
      for (int64_t k = 0; k < K; ++k) {
        const int64_t from = source[n * K + k];
        if (from < 0) continue;
        const float *in = x + from * x_stride + first, *weight = w + k * C + first;
        float *d_in = dx + from * C + first, *d_weight = dw + k * C + first;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) {
          d_in[c] += weight[c] * dz[c];
          d_weight[c] += dz[c] * in[c];
        }
      }
    }
  }
}

// One token of a causal convolution for R rows: the inputs in state [R, C, K] move by one, x [R, C] is the newest of them.
// w [C, K], bias [C] or null, y [R, C].
extern "C" void convolve_step(float* state, const float* x, const float* w, const float* bias, float* y, int64_t silu, int64_t R,
                              int64_t C, int64_t K, int64_t x_stride) {
#pragma omp parallel for if (R * C * K > MIN_PARALLEL)
  for (int64_t r = 0; r < R; ++r) {
    const float* in = x + r * x_stride;
    float* out = y + r * C;
    for (int64_t c = 0; c < C; ++c) {
      float *s = state + (r * C + c) * K, sum = bias ? bias[c] : 0;
      for (int64_t k = 0; k + 1 < K; ++k) {
        s[k] = s[k + 1];
        sum += s[k] * w[c * K + k];
      }
      s[K - 1] = in[c];
      out[c] = sum + in[c] * w[c * K + K - 1];
    }
    if (!silu) continue;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) out[c] *= sigmoid(out[c]);
  }
}
