// RMSNorm, RoPE and SwiGLU and their gradients, each in one pass over memory. See layers.py.
#include "rows.h"

namespace {

// A weight's gradient is summed in this many partial sums, whatever the number of threads, so that it is the same to the bit
// every time.
constexpr int64_t PARTIAL_SUMS = 16;
constexpr int64_t MIN_PARALLEL = 1 << 13;  // elements above which several threads are faster than one

// The gradient dx of y = x * i * (w + offset), where i = inverse_rms(x); adds the gradient of w to dw.
inline void rms_norm_gradient(const float* dy, const float* x, const float* w, float offset, float i, float* dx, float* dw, int64_t D) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t d = 0; d < D; ++d) dot += dy[d] * (w[d] + offset) * x[d];
  const float projection = dot * i * i * i / D;
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) {
    dw[d] += dy[d] * x[d] * i;
    dx[d] = dy[d] * (w[d] + offset) * i - x[d] * projection;
  }
}

}  // namespace

// x and y [N, D]; w [D]; inverse_rms [N] is kept for the backward pass.
extern "C" void rms_norm(const float* x, const float* w, float* y, float* inverse_rms, float offset, float epsilon, int64_t N,
                         int64_t D) {
#pragma omp parallel for if (N * D > MIN_PARALLEL)
  for (int64_t n = 0; n < N; ++n) inverse_rms[n] = rms_norm_row(x + n * D, w, offset, epsilon, y + n * D, D);
}

// dw [PARTIAL_SUMS, D] must be zero on entry.
extern "C" void rms_norm_backward(const float* dy, const float* x, const float* w, const float* inverse_rms, float* dx, float* dw,
                                  float offset, int64_t N, int64_t D) {
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < PARTIAL_SUMS; ++part) {
    for (int64_t n = N * part / PARTIAL_SUMS; n < N * (part + 1) / PARTIAL_SUMS; ++n) {
      rms_norm_gradient(dy + n * D, x + n * D, w, offset, inverse_rms[n], dx + n * D, dw + part * D, D);
    }
  }
}

// Rotary embedding of x by cos and sin [N, D], to y [N, H, D]; each head is RMSNormed first if w is not null. Token n of x
// begins at x + n * stride. inverse_rms [N, H] is kept for the backward pass.
extern "C" void rope(const float* x, const float* w, const float* cos, const float* sin, float* y, float* inverse_rms, float offset,
                     float epsilon, int64_t N, int64_t H, int64_t D, int64_t stride) {
#pragma omp parallel for if (N * H * D > MIN_PARALLEL)
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t h = 0; h < H; ++h) {
      const float *from = x + n * stride + h * D, *c = cos + n * D, *s = sin + n * D;
      inverse_rms[n * H + h] = rope_head(from, w, offset, epsilon, c, s, y + (n * H + h) * D, D);
    }
  }
}

// x must be contiguous here, and may be null if w is. dw [PARTIAL_SUMS, D] must be zero on entry.
extern "C" void rope_backward(const float* dy, const float* x, const float* w, const float* cos, const float* sin,
                              const float* inverse_rms, float* dx, float* dw, float offset, int64_t N, int64_t H, int64_t D) {
  const int64_t half = D / 2;
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < PARTIAL_SUMS; ++part) {
    for (int64_t n = N * part / PARTIAL_SUMS; n < N * (part + 1) / PARTIAL_SUMS; ++n) {
      const float *c = cos + n * D, *s = sin + n * D;
      for (int64_t h = n * H; h < (n + 1) * H; ++h) {
        const float* from = dy + h * D;
        float* to = dx + h * D;
#pragma omp simd
        for (int64_t d = 0; d < half; ++d) {
          const float a = from[d], b = from[d + half];
          to[d] = a * c[d] + b * s[d + half];
          to[d + half] = b * c[d + half] - a * s[d];
        }
        if (w) rms_norm_gradient(to, x + h * D, w, offset, inverse_rms[h], to, dw + part * D, D);
      }
    }
  }
}

// y = silu(gate) * up, all [N, D]. Row n of gate begins at gate + n * gate_stride, of up at up + n * up_stride.
extern "C" void swiglu(const float* gate, const float* up, float* y, int64_t N, int64_t D, int64_t gate_stride, int64_t up_stride) {
#pragma omp parallel for if (N * D > MIN_PARALLEL)
  for (int64_t n = 0; n < N; ++n) {
    const float *g = gate + n * gate_stride, *u = up + n * up_stride;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) y[n * D + d] = swiglu(g[d], u[d]);
  }
}

// All tensors are contiguous [N, D].
extern "C" void swiglu_backward(const float* dy, const float* gate, const float* up, float* d_gate, float* d_up, int64_t N, int64_t D) {
#pragma omp parallel for if (N * D > MIN_PARALLEL)
  for (int64_t n = 0; n < N; ++n) {
#pragma omp simd
    for (int64_t j = n * D; j < (n + 1) * D; ++j) {
      const float x = gate[j], e = exponential(-std::fabs(x)), sigmoid = (x < 0 ? e : 1.0f) / (1 + e);
      d_up[j] = dy[j] * x * sigmoid;
      d_gate[j] = dy[j] * up[j] * sigmoid * (1 + x * (1 - sigmoid));
    }
  }
}
