// One decode step through all layers of a decoder: RMSNorm, attention, RMSNorm, SwiGLU MLP, with residual connections. Compiled
// for one HEAD_SIZE and one CACHE_ELEMENT type of the KV cache, with matrices in float32 or, if BFLOAT16_WEIGHTS is defined, in
// bfloat16; other weights and activations are floats. See decode_step.py.
#include "blocked.h"
#ifdef BFLOAT16_WEIGHTS
#include "blocked_bf16.h"
#endif
#include "decode_attention.h"
#include "rows.h"

namespace {

#ifdef BFLOAT16_WEIGHTS
using Weight = bf16::Element;
#else
using Weight = float;
#endif

// The weights of one layer, in the order of LAYER_WEIGHTS in decode_step.py: matrices in the blocked layout; absent biases and
// norms are null. qkv stacks the projections to queries, keys and values.
struct LayerWeights {
  const float* norm;
  const Weight* qkv;
  const float *qkv_bias, *query_norm, *key_norm;
  const Weight* out;
  const float *out_bias, *mlp_norm;
  const Weight *gate_up, *down;
};

// Where the KV cache of one layer begins, as in Cache.
struct LayerCache {
  CacheElement* row_cache;
  const CacheElement *prompt_keys, *prompt_values;
};

struct Sizes {
  int64_t R, hidden, H, K, intermediate;  // intermediate: the MLP's size, a multiple of BLOCK / 2
  float offset, epsilon, qk_offset, qk_epsilon;  // offset: added to each norm weight; qk: of the QK-norm
};

void rms_norm_rows(const float* x, const float* w, const Sizes& sizes, float* y) {
  const int64_t hidden = sizes.hidden;
#pragma omp for schedule(static)
  for (int64_t r = 0; r < sizes.R; ++r) rms_norm_row(x + r * hidden, w, sizes.offset, sizes.epsilon, y + r * hidden, hidden);
}

// y = x . W^T + bias, or y += x . W^T + bias if ADD.
template <bool ADD>
void blocked_matmul(const float* x, const Weight* weight, const float* bias, int64_t R, int64_t K, int64_t N, float* y) {
  for_each_tile(x, R, K, weight, N, [=](int64_t first, int64_t rows, int64_t column, int64_t columns, const float* tile) {
    for (int64_t m = 0; m < rows; ++m) {
      float* to = y + (first + m) * N + column;
#pragma omp simd
      for (int64_t n = 0; n < columns; ++n) to[n] = (ADD ? to[n] : 0.0f) + tile[m * BLOCK + n] + (bias ? bias[column + n] : 0.0f);
    }
  });
}

// y = silu(x . gate^T) * (x . up^T). Each weight block holds BLOCK / 2 features of gate and the same of up, so that both are in
// one tile.
void swiglu_rows(const float* x, const Weight* gate_up, const Sizes& sizes, float* y) {
  const int64_t I = sizes.intermediate, half = BLOCK / 2;
  for_each_tile(x, sizes.R, sizes.hidden, gate_up, 2 * I, [=](int64_t first, int64_t rows, int64_t column, int64_t, const float* tile) {
    for (int64_t m = 0; m < rows; ++m) {
      float* to = y + (first + m) * I + column / 2;
#pragma omp simd
      for (int64_t n = 0; n < half; ++n) to[n] = swiglu(tile[m * BLOCK + n], tile[m * BLOCK + half + n]);
    }
  });
}

// RoPE and attention of each row's newest token, from qkv [R, (H + 2 K) D] to out [R, H D].
void attend_rows(const float* qkv, const LayerWeights& layer, const Cache& cache, const float* cos, const float* sin,
                 const Sizes& sizes, const Form& form, Scratch& scratch, float* out) {
  const int64_t H = sizes.H, K = sizes.K, heads_per_kv = H / K, width = (H + 2 * K) * D;
  const auto rope = [&](int64_t row, const float* from, const float* w, float* to) {
    // Where the values for the token's position begin in cos and sin.
    const int64_t offset = (cache.prompt_lengths[cache.prompts[row]] + cache.written[row] - 1) * D;
    rope_head(from, w, sizes.qk_offset, sizes.qk_epsilon, cos + offset, sin + offset, to, D);
  };
  // Appends each row's rotated key and its value to the KV cache, and rotates its queries.
  const auto append = [&](int64_t row, int64_t k, CacheElement* key, CacheElement* value, float* rotated) {
    const float* from = qkv + row * width;
    for (int64_t h = 0; h < heads_per_kv; ++h) rope(row, from + (k * heads_per_kv + h) * D, layer.query_norm, rotated + h * D);
    float rotated_key[D];
    rope(row, from + (H + k) * D, layer.key_norm, rotated_key);
    write_head(rotated_key, key);
    write_head(from + (H + K + k) * D, value);
    return rotated;
  };
  attend_newest(cache, heads_per_kv, form, scratch, out, append);
}

}  // namespace

// x [R, hidden]: the embeddings of the rows' newest tokens, overwritten. y [R, hidden]: the hidden states after the last norm.
// Buffers: qkv [R, (H + 2 K) D], attended [R, H D], mlp [R, intermediate]. cos and sin [positions, D]. Of each layer: its cache,
// in caches [layers], and its sliding window or 0, in windows [layers]. softcap as in Form, the rest as in Cache.
extern "C" void decode_step(float* x, float* y, float* qkv, float* attended, float* mlp, const LayerWeights* weights,
                            const float* last_norm, const float* cos, const float* sin, const LayerCache* caches,
                            const int64_t* windows, const int64_t* written, const int64_t* prompt_lengths, const int64_t* prompts,
                            const int64_t* order, const int64_t* starts, float scale, float softcap, float offset, float epsilon,
                            float qk_offset, float qk_epsilon, int64_t R, int64_t hidden, int64_t intermediate, int64_t H,
                            int64_t layers, int64_t row_capacity, int64_t P, int64_t K, int64_t T, int64_t L, int64_t max_rows) {
  const Sizes sizes{R, hidden, H, K, intermediate, offset, epsilon, qk_offset, qk_epsilon};
#pragma omp parallel
  {
    Cache cache{nullptr, nullptr,      nullptr, written, prompt_lengths, prompts, order,
                starts,  row_capacity, P,       K,       T,              L,       max_rows};
    Scratch scratch(cache, H / K);
    for (int64_t i = 0; i < layers; ++i) {
      const LayerWeights& layer = weights[i];
      cache.row_cache = caches[i].row_cache, cache.prompt_keys = caches[i].prompt_keys, cache.prompt_values = caches[i].prompt_values;
      const Form form{scale, softcap, windows[i], nullptr};
      rms_norm_rows(x, layer.norm, sizes, y);
      blocked_matmul<false>(y, layer.qkv, layer.qkv_bias, R, hidden, (H + 2 * K) * D, qkv);
      attend_rows(qkv, layer, cache, cos, sin, sizes, form, scratch, attended);
      blocked_matmul<true>(attended, layer.out, layer.out_bias, R, H * D, hidden, x);
      rms_norm_rows(x, layer.mlp_norm, sizes, y);
      swiglu_rows(y, layer.gate_up, sizes, mlp);
      blocked_matmul<true>(mlp, layer.down, nullptr, R, intermediate, hidden, x);
    }
    rms_norm_rows(x, last_norm, sizes, y);
  }
}
