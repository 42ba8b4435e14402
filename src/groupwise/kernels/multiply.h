// Small matrix products on numbers where they lie: as fast as a library's, without its cost of a call.
#pragma once
#include <cstdint>
#include <cstring>

template <int64_t WIDTH>
struct Vector {
  typedef float Type __attribute__((vector_size(WIDTH * sizeof(float)), aligned(sizeof(float)), may_alias));
};

template <int64_t WIDTH>
inline float sum_of(typename Vector<WIDTH>::Type x) {
  if constexpr (WIDTH == 1) {
    return x[0];
  } else {
    typename Vector<WIDTH / 2>::Type halves[2];
    std::memcpy(halves, &x, sizeof(x));
    return sum_of<WIDTH / 2>(halves[0] + halves[1]);
  }
}

// c[m] += sum over i < n of a[m across + i along] b[i], for ROWS rows c[m] and n rows b[i] of VECTORS times WIDTH numbers.
template <int64_t ROWS, int64_t WIDTH, int64_t VECTORS>
inline void multiply_rows(const float* a, int64_t across, int64_t along, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                          int64_t n) {
  using Wide = typename Vector<WIDTH>::Type;
  Wide sums[ROWS][VECTORS];
  for (int64_t m = 0; m < ROWS; ++m) {
    for (int64_t v = 0; v < VECTORS; ++v) sums[m][v] = *reinterpret_cast<const Wide*>(c + m * c_stride + v * WIDTH);
  }
  for (int64_t i = 0; i < n; ++i) {
    Wide row[VECTORS];
    for (int64_t v = 0; v < VECTORS; ++v) row[v] = *reinterpret_cast<const Wide*>(b + i * b_stride + v * WIDTH);
    for (int64_t m = 0; m < ROWS; ++m) {
      const float factor = a[m * across + i * along];
      for (int64_t v = 0; v < VECTORS; ++v) sums[m][v] += factor * row[v];
    }
  }
  for (int64_t m = 0; m < ROWS; ++m) {
    for (int64_t v = 0; v < VECTORS; ++v) *reinterpret_cast<Wide*>(c + m * c_stride + v * WIDTH) = sums[m][v];
  }
}

template <int64_t WIDTH, int64_t VECTORS = 1>
inline void multiply(const float* a, int64_t across, int64_t along, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                     int64_t rows, int64_t n) {
  int64_t m = 0;
  for (; m + 8 <= rows; m += 8) multiply_rows<8, WIDTH, VECTORS>(a + m * across, across, along, b, b_stride, c + m * c_stride, c_stride, n);
  for (; m + 4 <= rows; m += 4) multiply_rows<4, WIDTH, VECTORS>(a + m * across, across, along, b, b_stride, c + m * c_stride, c_stride, n);
  for (; m < rows; ++m) multiply_rows<1, WIDTH, VECTORS>(a + m * across, across, along, b, b_stride, c + m * c_stride, c_stride, n);
}
