// Products with matrices that lie in panels: PANEL columns of W^T side by side, [N / PANEL, K, PANEL], zeros after the last.
#pragma once
#include <algorithm>
#include <cstring>

#include "multiply.h"

constexpr int64_t PANEL = 32;  // as in panels.py
constexpr int64_t TILE = 48;   // rows of x that meet a panel before the next ones do
constexpr int64_t DEEP = 1024;  // of K at once, so that a panel stays in the caches

// tile[m] += x[m] . a panel, for rows up to TILE.
inline void meet_panel(const float* x, int64_t rows, const float* panel, int64_t K, float* tile) {
  for (int64_t k = 0; k < K; k += DEEP) {
    const int64_t n = std::min(DEEP, K - k);
#ifdef __AVX512F__
    multiply<16, 2>(x + k, K, 1, panel + k * PANEL, PANEL, tile, PANEL, rows, n);
#else  // registers for half as much
    for (int64_t v = 0; v < PANEL; v += 8) multiply<8>(x + k, K, 1, panel + k * PANEL + v, PANEL, tile + v, PANEL, rows, n);
#endif
  }
}

// done(first row, rows, first column, columns, tile [rows, PANEL]) for each tile of x [R, K] . W^T [K, N]. Called by all threads of a
// parallel region, which share the tiles. Sums go over K in one order, so that a row's are the same whatever rows are beside it.
template <typename Done>
inline void for_each_tile(const float* x, int64_t R, int64_t K, const float* panels, int64_t N, Done done) {
  const int64_t count = (N + PANEL - 1) / PANEL, tiles = (R + TILE - 1) / TILE;
#pragma omp for collapse(2) schedule(static)
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t t = 0; t < tiles; ++t) {
      alignas(64) float tile[TILE * PANEL];
      const int64_t first = t * TILE, rows = std::min(TILE, R - first);
      std::memset(tile, 0, rows * PANEL * sizeof(float));
      meet_panel(x + first * K, rows, panels + p * PANEL * K, K, tile);
      done(first, rows, p * PANEL, std::min(PANEL, N - p * PANEL), tile);
    }
  }
}
