// Matmul with a weight W [N, K] in the blocked (packed-panel) weight layout: BLOCK output features side by side,
// [ceil(N / BLOCK), K, BLOCK], padded with zeros after output feature N. R rows of x, K input features, N output features.
#pragma once
#include <algorithm>
#include <cstring>

#include "multiply.h"

constexpr int64_t BLOCK = 32;      // as in blocked.py
constexpr int64_t TILE = 48;       // rows of x that are multiplied by one weight block before the next rows
constexpr int64_t K_CHUNK = 1024;  // input features at a time, so that this part of the weight block stays in cache

// tile [rows, BLOCK] += x . block, for rows <= TILE.
inline void multiply_block(const float* x, int64_t rows, const float* block, int64_t K, float* tile) {
  for (int64_t k = 0; k < K; k += K_CHUNK) {
    const int64_t n = std::min(K_CHUNK, K - k);
#ifdef __AVX512F__
    multiply<16, 2>(x + k, K, 1, block + k * BLOCK, BLOCK, tile, BLOCK, rows, n);
#else  // narrower vectors, one at a time: AVX2 has half as many registers
    for (int64_t v = 0; v < BLOCK; v += 8) multiply<8>(x + k, K, 1, block + k * BLOCK + v, BLOCK, tile + v, BLOCK, rows, n);
#endif
  }
}

// Calls done(first row, rows, first column, columns, tile [rows, BLOCK]) for each tile of x [R, K] . W^T [K, N]. Must be called
// by all threads of a parallel region, which share the tiles. Each sum over K is taken in the same order whatever the batch and
// the number of threads, so that each output row is the same to the bit.
template <typename Done>
inline void for_each_tile(const float* x, int64_t R, int64_t K, const float* weight, int64_t N, Done done) {
  const int64_t blocks = (N + BLOCK - 1) / BLOCK, tiles = (R + TILE - 1) / TILE;
#pragma omp for collapse(2) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t t = 0; t < tiles; ++t) {
      alignas(64) float tile[TILE * BLOCK];
      const int64_t first = t * TILE, rows = std::min(TILE, R - first);
      std::memset(tile, 0, rows * BLOCK * sizeof(float));
      multiply_block(x + first * K, rows, weight + b * BLOCK * K, K, tile);
      done(first, rows, b * BLOCK, std::min(BLOCK, N - b * BLOCK), tile);
    }
  }
}
