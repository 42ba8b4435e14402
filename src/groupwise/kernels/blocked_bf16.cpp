// Matmul with a bfloat16 weight in the blocked layout, accumulated in float32. See blocked_bf16.py.
#include "blocked_bf16.h"

using bf16::Element;

// Rounds W [N, K] to bfloat16 and copies it into the blocked layout.
extern "C" void to_blocked_bf16(const float* weight, Element* blocked, int64_t N, int64_t K) {
#pragma omp parallel if (N * K > 1 << 16)
  {
    std::vector<Element> rounded(K);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < (N + BLOCK - 1) / BLOCK; ++b) {
      Element* block = blocked + b * BLOCK * K;
      for (int64_t n = 0; n < BLOCK; ++n) {
        if (b * BLOCK + n < N) {
          bf16::round(weight + (b * BLOCK + n) * K, rounded.data(), K);
        } else {
          std::fill(rounded.begin(), rounded.end(), Element(0));
        }
        for (int64_t k = 0; k < K; k += 2) std::memcpy(block + k * BLOCK + 2 * n, &rounded[k], 2 * sizeof(Element));
      }
    }
  }
}

// y = x . W^T + bias, for x [R, K] in bfloat16, y [R, N] and bias [N] or null in float32, and W [N, K] in the blocked layout.
extern "C" void blocked_matmul_bf16(const Element* x, const Element* weight, const float* bias, float* y, int64_t R, int64_t K,
                                    int64_t N) {
#pragma omp parallel if (R * K * N > 1 << 16)
  for_each_tile(x, R, K, weight, N, [=](int64_t first, int64_t rows, int64_t column, int64_t columns, const float* tile) {
    for (int64_t m = 0; m < rows; ++m) {
      float* to = y + (first + m) * N + column;
#pragma omp simd
      for (int64_t n = 0; n < columns; ++n) to[n] = tile[m * BLOCK + n] + (bias ? bias[column + n] : 0.0f);
    }
  });
}
