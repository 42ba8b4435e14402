// One step of generation through all layers of a decoder: norm, attention, norm, gated product. Compiled for one HEAD_SIZE. See step.py.
#include "decode.h"
#include "panels.h"
#include "rows.h"

namespace {

// Weights, those of products in panels; none: nullptr. As in step.py.
struct Layer {
  const float *norm, *heads, *heads_bias, *query_norm, *key_norm, *out, *out_bias, *second_norm, *gate_up, *down;
};

struct Sizes {
  int64_t R, width, H, K, inner;  // inner: of the gated product, a multiple of half a panel
  float scale, offset, epsilon, head_offset, head_epsilon;
};

void norm_rows(const float* x, const float* w, const Sizes& sizes, float* y) {
#pragma omp for schedule(static)
  for (int64_t r = 0; r < sizes.R; ++r) norm_row(x + r * sizes.width, w, sizes.offset, sizes.epsilon, y + r * sizes.width, sizes.width);
}

// y = x . W^T + bias, or that added to y.
template <bool ADD>
void product(const float* x, const float* panels, const float* bias, int64_t R, int64_t K, int64_t N, float* y) {
  for_each_tile(x, R, K, panels, N, [=](int64_t first, int64_t rows, int64_t column, int64_t columns, const float* tile) {
    for (int64_t m = 0; m < rows; ++m) {
      float* to = y + (first + m) * N + column;
#pragma omp simd
      for (int64_t n = 0; n < columns; ++n) to[n] = (ADD ? to[n] : 0.0f) + tile[m * PANEL + n] + (bias ? bias[column + n] : 0.0f);
    }
  });
}

// The panels of gate and up have a half of each.
void gated_rows(const float* x, const float* panels, const Sizes& sizes, float* y) {
  const int64_t inner = sizes.inner, half = PANEL / 2;
  for_each_tile(x, sizes.R, sizes.width, panels, 2 * inner, [=](int64_t first, int64_t rows, int64_t column, int64_t, const float* tile) {
    for (int64_t m = 0; m < rows; ++m) {
      float* to = y + (first + m) * inner + column / 2;
#pragma omp simd
      for (int64_t n = 0; n < half; ++n) to[n] = gated_product(tile[m * PANEL + n], tile[m * PANEL + half + n]);
    }
  });
}

// What each row gathers, from its queries, keys and values side by side.
void attend_rows(const float* heads, const Layer& layer, const Cache& cache, const float* cos, const float* sin, const Sizes& sizes,
                 Room& room, float* out) {
  const int64_t H = sizes.H, K = sizes.K, share = H / K, width = (H + 2 * K) * D;
  const auto turn = [&](int64_t row, const float* from, const float* w, float* to) {
    const int64_t place = (cache.lengths[cache.prompts[row]] + cache.written[row] - 1) * D;
    turn_head(from, w, sizes.head_offset, sizes.head_epsilon, cos + place, sin + place, to, D);
  };
  attend_newest(cache, share, sizes.scale, room, out, [&](int64_t row, int64_t k, float* key, float* value, float* turned) {
    const float* from = heads + row * width;
    for (int64_t s = 0; s < share; ++s) turn(row, from + (k * share + s) * D, layer.query_norm, turned + s * D);
    turn(row, from + (H + k) * D, layer.key_norm, key);
    std::memcpy(value, from + (H + K + k) * D, D * sizeof(float));
    return turned;
  });
}

}  // namespace

// Shapes: x [R, width], the rows' newest embeddings, which are lost; y [R, width], the last hidden states; heads [R, (H + 2K) D],
// gathered [R, H D] and inner [R, inner]: room; cos and sin [places, D]; the rest as in Cache.
extern "C" void step(float* x, float* y, float* heads, float* gathered, float* inner, const Layer* all, const float* last_norm,
                     const float* cos, const float* sin, float* of_rows, const float* prompt_keys, const float* prompt_values,
                     const int64_t* written, const int64_t* lengths, const int64_t* prompts, const int64_t* order,
                     const int64_t* starts, float scale, float offset, float epsilon, float head_offset, float head_epsilon,
                     int64_t R, int64_t width, int64_t inner_size, int64_t H, int64_t layers, int64_t rows, int64_t prompts_room,
                     int64_t P, int64_t K, int64_t T, int64_t L, int64_t most_rows) {
  const Sizes sizes{R, width, H, K, inner_size, scale, offset, epsilon, head_offset, head_epsilon};
#pragma omp parallel
  {
    Cache cache{of_rows, prompt_keys, prompt_values, written, lengths, prompts, order, starts,
                0,       rows,        prompts_room,  P,       K,       T,       L,     most_rows};
    Room room(cache, H / K);
    for (; cache.layer < layers; ++cache.layer) {
      const Layer& layer = all[cache.layer];
      norm_rows(x, layer.norm, sizes, y);
      product<false>(y, layer.heads, layer.heads_bias, R, width, (H + 2 * K) * D, heads);
      attend_rows(heads, layer, cache, cos, sin, sizes, room, gathered);
      product<true>(gathered, layer.out, layer.out_bias, R, H * D, width, x);
      norm_rows(x, layer.second_norm, sizes, y);
      gated_rows(y, layer.gate_up, sizes, inner);
      product<true>(inner, layer.down, nullptr, R, inner_size, width, x);
    }
    norm_rows(x, last_norm, sizes, y);
  }
}
