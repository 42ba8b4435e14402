// Matmul with a weight in the blocked layout. See blocked.py.
#include "blocked.h"

// y = x . W^T + bias, for x [R, K], y [R, N], bias [N] or null, and W [N, K] in the blocked layout.
extern "C" void blocked_matmul(const float* x, const float* weight, const float* bias, float* y, int64_t R, int64_t K, int64_t N) {
#pragma omp parallel if (R * K * N > 1 << 16)
  for_each_tile(x, R, K, weight, N, [=](int64_t first, int64_t rows, int64_t column, int64_t columns, const float* tile) {
    for (int64_t m = 0; m < rows; ++m) {
      float* to = y + (first + m) * N + column;
#pragma omp simd
      for (int64_t n = 0; n < columns; ++n) to[n] = tile[m * BLOCK + n] + (bias ? bias[column + n] : 0.0f);
    }
  });
}
