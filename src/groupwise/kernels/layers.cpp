// The parts of a layer between its matrix products, each in one pass through the memory, and their gradients. See layers.py.
#include "rows.h"

namespace {

constexpr int64_t PARTS = 16;     // a weight's gradient is summed in so many parts, whatever the threads: the same bits every time
constexpr int64_t WORTH = 1 << 13;  // elements that are worth a second thread

// dx of y = x i (w + offset), where i is one over the root of x's mean square; adds to dw.
inline void norm_gradient(const float* dy, const float* x, const float* w, float offset, float i, float* dx, float* dw, int64_t D) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t d = 0; d < D; ++d) dot += dy[d] * (w[d] + offset) * x[d];
  const float along = dot * i * i * i / D;
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) {
    dw[d] += dy[d] * x[d] * i;
    dx[d] = dy[d] * (w[d] + offset) * i - x[d] * along;
  }
}

}  // namespace

// x and y [N, D]; w [D].
extern "C" void norm(const float* x, const float* w, float* y, float* inverse, float offset, float epsilon, int64_t N, int64_t D) {
#pragma omp parallel for if (N * D > WORTH)
  for (int64_t n = 0; n < N; ++n) inverse[n] = norm_row(x + n * D, w, offset, epsilon, y + n * D, D);
}

// dw [PARTS, D], zeros at first.
extern "C" void norm_backward(const float* dy, const float* x, const float* w, const float* inverse, float* dx, float* dw, float offset,
                              int64_t N, int64_t D) {
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < PARTS; ++part) {
    for (int64_t n = N * part / PARTS; n < N * (part + 1) / PARTS; ++n) {
      norm_gradient(dy + n * D, x + n * D, w, offset, inverse[n], dx + n * D, dw + part * D, D);
    }
  }
}

// Rotary embedding of x [N, H, D] by cos and sin [N, D], whose halves turn with each other; each head normed first if w is given.
// The tokens of x lie `stride` apart.
extern "C" void rotate(const float* x, const float* w, const float* cos, const float* sin, float* y, float* inverse, float offset,
                       float epsilon, int64_t N, int64_t H, int64_t D, int64_t stride) {
#pragma omp parallel for if (N * H * D > WORTH)
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t h = 0; h < H; ++h) {
      const float *from = x + n * stride + h * D, *c = cos + n * D, *s = sin + n * D;
      inverse[n * H + h] = turn_head(from, w, offset, epsilon, c, s, y + (n * H + h) * D, D);
    }
  }
}

extern "C" void rotate_backward(const float* dy, const float* x, const float* w, const float* cos, const float* sin,
                                const float* inverse, float* dx, float* dw, float offset, int64_t N, int64_t H, int64_t D) {
  const int64_t half = D / 2;
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < PARTS; ++part) {
    for (int64_t n = N * part / PARTS; n < N * (part + 1) / PARTS; ++n) {
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
        if (w) norm_gradient(to, x + h * D, w, offset, inverse[h], to, dw + part * D, D);
      }
    }
  }
}

// Of [N, D], whose rows lie `stride_gate` and `stride_up` apart.
extern "C" void gated(const float* gate, const float* up, float* y, int64_t N, int64_t D, int64_t stride_gate, int64_t stride_up) {
#pragma omp parallel for if (N * D > WORTH)
  for (int64_t n = 0; n < N; ++n) {
    const float *g = gate + n * stride_gate, *u = up + n * stride_up;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) y[n * D + d] = gated_product(g[d], u[d]);
  }
}

// All of [N, D].
extern "C" void gated_backward(const float* dy, const float* gate, const float* up, float* d_gate, float* d_up, int64_t N, int64_t D) {
#pragma omp parallel for if (N * D > WORTH)
  for (int64_t n = 0; n < N; ++n) {
#pragma omp simd
    for (int64_t j = n * D; j < (n + 1) * D; ++j) {
      const float x = gate[j], e = exponential(-std::fabs(x)), g = (x < 0 ? e : 1.0f) / (1 + e);
      d_up[j] = dy[j] * x * g;
      d_gate[j] = dy[j] * up[j] * g * (1 + x * (1 - g));
    }
  }
}
