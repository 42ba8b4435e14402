// Matmul with a bfloat16 weight W [N, K] in a blocked (packed-panel) layout, accumulated in float32: BLOCK output features side by
// side, and of each the weights of two input features, [ceil(N / BLOCK), K / 2, BLOCK, 2], which one instruction multiplies and
// adds. Padded with zeros after output feature N. R rows of x, K input features (an even number), N output features.
#pragma once
#ifndef __AVX512BF16__
#error "this processor has no AVX-512 BF16 instructions"
#endif
#include <immintrin.h>

#include <vector>

#include "blocked.h"

namespace bf16 {

using Element = uint16_t;  // the bits of a bfloat16

// n floats, rounded to nearest, ties to even.
inline void round(const float* from, Element* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i < 16 ? (1u << (n - i)) - 1 : 0xFFFF;
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from + i));
    __m256i bits;
    std::memcpy(&bits, &rounded, sizeof(bits));
    _mm256_mask_storeu_epi16(to + i, mask, bits);
  }
}

// tile [ROWS, BLOCK] += x . block, for rows of x that are `stride` elements apart, accumulated in registers.
template <int64_t ROWS>
inline void multiply_rows(const Element* x, int64_t stride, const Element* block, int64_t K, float* tile) {
  __m512 sums[ROWS][2];
  for (int64_t m = 0; m < ROWS; ++m) {
    for (int64_t v = 0; v < 2; ++v) sums[m][v] = _mm512_load_ps(tile + m * BLOCK + v * 16);
  }
  for (int64_t k = 0; k < K; k += 2) {
    __m512bh weights[2];
    std::memcpy(weights, block + k * BLOCK, sizeof(weights));
    for (int64_t m = 0; m < ROWS; ++m) {
      int32_t pair;
      std::memcpy(&pair, x + m * stride + k, sizeof(pair));
      const __m512i pairs = _mm512_set1_epi32(pair);
      __m512bh inputs;
      std::memcpy(&inputs, &pairs, sizeof(inputs));
      for (int64_t v = 0; v < 2; ++v) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], inputs, weights[v]);
    }
  }
  for (int64_t m = 0; m < ROWS; ++m) {
    for (int64_t v = 0; v < 2; ++v) _mm512_store_ps(tile + m * BLOCK + v * 16, sums[m][v]);
  }
}

// tile [rows, BLOCK] += x . block, for rows <= TILE.
inline void multiply_block(const Element* x, int64_t rows, const Element* block, int64_t K, float* tile) {
  for (int64_t k = 0; k < K; k += K_CHUNK) {
    const int64_t n = std::min(K_CHUNK, K - k);
    const Element *from = x + k, *weights = block + k * BLOCK;
    int64_t m = 0;
    for (; m + 12 <= rows; m += 12) multiply_rows<12>(from + m * K, K, weights, n, tile + m * BLOCK);
    for (; m + 4 <= rows; m += 4) multiply_rows<4>(from + m * K, K, weights, n, tile + m * BLOCK);
    for (; m < rows; ++m) multiply_rows<1>(from + m * K, K, weights, n, tile + m * BLOCK);
  }
}

}  // namespace bf16

// As for_each_tile of blocked.h: calls done(first row, rows, first column, columns, tile [rows, BLOCK]) for each tile of
// x [R, K] . W^T [K, N]. Must be called by all threads of a parallel region, which share the tiles. Each sum over K is taken in the
// same order whatever the batch and the number of threads, so that each output row is the same to the bit.
template <typename Done>
inline void for_each_tile(const bf16::Element* x, int64_t R, int64_t K, const bf16::Element* weight, int64_t N, Done done) {
  const int64_t blocks = (N + BLOCK - 1) / BLOCK, tiles = (R + TILE - 1) / TILE;
#pragma omp for collapse(2) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t t = 0; t < tiles; ++t) {
      alignas(64) float tile[TILE * BLOCK];
      const int64_t first = t * TILE, rows = std::min(TILE, R - first);
      std::memset(tile, 0, rows * BLOCK * sizeof(float));
      bf16::multiply_block(x + first * K, rows, weight + b * BLOCK * K, K, tile);
      done(first, rows, b * BLOCK, std::min(BLOCK, N - b * BLOCK), tile);
    }
  }
}

// The same for x in float32, which is rounded to bfloat16 first.
template <typename Done>
inline void for_each_tile(const float* x, int64_t R, int64_t K, const bf16::Element* weight, int64_t N, Done done) {
  thread_local std::vector<bf16::Element> buffer;
  bf16::Element* rounded;
#pragma omp single copyprivate(rounded)
  {
    if (int64_t(buffer.size()) < R * K) buffer.resize(R * K);
    rounded = buffer.data();
  }
#pragma omp for schedule(static)
  for (int64_t r = 0; r < R; ++r) bf16::round(x + r * K, rounded + r * K, K);
  for_each_tile(static_cast<const bf16::Element*>(rounded), R, K, weight, N, done);
}
