// Small matrix products on numbers where they lie: as fast as a library's, without its cost of a call.
#pragma once
#include <cstdint>

template <int64_t WIDTH>
struct Vector {
  typedef float Type __attribute__((vector_size(WIDTH * sizeof(float)), aligned(sizeof(float)), may_alias));
};

// c[m] += sum over i < n of a[m across + i along] b[i], for ROWS rows c[m] and n rows b[i] of WIDTH numbers.
template <int64_t ROWS, int64_t WIDTH>
inline void multiply_rows(const float* a, int64_t across, int64_t along, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                          int64_t n) {
  using Wide = typename Vector<WIDTH>::Type;
  Wide sums[ROWS];
  for (int64_t m = 0; m < ROWS; ++m) sums[m] = *reinterpret_cast<const Wide*>(c + m * c_stride);
  for (int64_t i = 0; i < n; ++i) {
    const Wide row = *reinterpret_cast<const Wide*>(b + i * b_stride);
    for (int64_t m = 0; m < ROWS; ++m) sums[m] += a[m * across + i * along] * row;
  }
  for (int64_t m = 0; m < ROWS; ++m) *reinterpret_cast<Wide*>(c + m * c_stride) = sums[m];
}

template <int64_t WIDTH>
inline void multiply(const float* a, int64_t across, int64_t along, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                     int64_t rows, int64_t n) {
  int64_t m = 0;
  for (; m + 8 <= rows; m += 8) multiply_rows<8, WIDTH>(a + m * across, across, along, b, b_stride, c + m * c_stride, c_stride, n);
  for (; m + 4 <= rows; m += 4) multiply_rows<4, WIDTH>(a + m * across, across, along, b, b_stride, c + m * c_stride, c_stride, n);
  for (; m < rows; ++m) multiply_rows<1, WIDTH>(a + m * across, across, along, b, b_stride, c + m * c_stride, c_stride, n);
}
