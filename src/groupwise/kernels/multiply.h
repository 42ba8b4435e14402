// Small matrix multiplications on strided float matrices, in place: as fast as a BLAS library's, without its overhead per call.
#pragma once
#include <cstdint>
#include <cstring>

template <int64_t WIDTH>
struct Vector {
  typedef float Type __attribute__((vector_size(WIDTH * sizeof(float)), aligned(sizeof(float)), may_alias));
};

template <int64_t WIDTH>
inline float horizontal_sum(typename Vector<WIDTH>::Type x) {
  if constexpr (WIDTH == 1) {
    return x[0];
  } else {
    typename Vector<WIDTH / 2>::Type halves[2];
    std::memcpy(halves, &x, sizeof(x));
    return horizontal_sum<WIDTH / 2>(halves[0] + halves[1]);
  }
}

// c += a . b, for a [ROWS, n], b [n, VECTORS * WIDTH] and c [ROWS, VECTORS * WIDTH], accumulated in registers. a[m, i] is at
// a[m * row_stride + i * column_stride], so that a may be transposed; the rows of b and c are contiguous.
template <int64_t ROWS, int64_t WIDTH, int64_t VECTORS>
inline void multiply_rows(const float* a, int64_t row_stride, int64_t column_stride, const float* b, int64_t b_stride, float* c,
                          int64_t c_stride, int64_t n) {
  using FloatVector = typename Vector<WIDTH>::Type;
  FloatVector sums[ROWS][VECTORS];
  for (int64_t m = 0; m < ROWS; ++m) {
    for (int64_t v = 0; v < VECTORS; ++v) sums[m][v] = *reinterpret_cast<const FloatVector*>(c + m * c_stride + v * WIDTH);
  }
  for (int64_t i = 0; i < n; ++i) {
    FloatVector row[VECTORS];
    for (int64_t v = 0; v < VECTORS; ++v) row[v] = *reinterpret_cast<const FloatVector*>(b + i * b_stride + v * WIDTH);
    for (int64_t m = 0; m < ROWS; ++m) {
      const float factor = a[m * row_stride + i * column_stride];
      for (int64_t v = 0; v < VECTORS; ++v) sums[m][v] += factor * row[v];
    }
  }
  for (int64_t m = 0; m < ROWS; ++m) {
    for (int64_t v = 0; v < VECTORS; ++v) *reinterpret_cast<FloatVector*>(c + m * c_stride + v * WIDTH) = sums[m][v];
  }
}

// The same for any number of rows.
template <int64_t WIDTH, int64_t VECTORS = 1>
inline void multiply(const float* a, int64_t row_stride, int64_t column_stride, const float* b, int64_t b_stride, float* c,
                     int64_t c_stride, int64_t rows, int64_t n) {
  int64_t m = 0;
  for (; m + 8 <= rows; m += 8) {
    multiply_rows<8, WIDTH, VECTORS>(a + m * row_stride, row_stride, column_stride, b, b_stride, c + m * c_stride, c_stride, n);
  }
  for (; m + 4 <= rows; m += 4) {
    multiply_rows<4, WIDTH, VECTORS>(a + m * row_stride, row_stride, column_stride, b, b_stride, c + m * c_stride, c_stride, n);
  }
  for (; m < rows; ++m) {
    multiply_rows<1, WIDTH, VECTORS>(a + m * row_stride, row_stride, column_stride, b, b_stride, c + m * c_stride, c_stride, n);
  }
}
