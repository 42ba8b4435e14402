// Attention in training over packed tokens [N, H, D]: each row (one sequence) attends causally to itself and, if it has a prompt,
// to all of that. Forward and backward, compiled for one HEAD_SIZE. See packed_attention.py. Positions are those in the sequence:
// a row that has a prompt begins at the position after the prompt's last.
//
// LANES queries are processed at once, one per vector lane, so that a softmax over their keys needs no reduction across lanes;
// scores are stored as [keys, LANES]. All matrix multiplications are `multiply`, on keys and values in place.
#include <vector>

#include "multiply.h"
#include "softcap.h"

namespace {

constexpr int64_t D = HEAD_SIZE;
constexpr int64_t LANES = 16;
constexpr int64_t SIMD_WIDTH = D % 16 == 0 ? 16 : D % 8 == 0 ? 8 : D % 4 == 0 ? 4 : D % 2 == 0 ? 2 : 1;  // elements per vector

// Keys and values of consecutive tokens at one key-value head, `stride` elements apart, and where their gradients are
// accumulated.
struct Segment {
  const float *keys = nullptr, *values = nullptr;
  int64_t first = 0, count = 0, stride = 0;  // first: of the tokens, counted from the first of the prompt or row
  float *d_keys = nullptr, *d_values = nullptr;
};

// Up to LANES queries of a row and the keys that they attend to. The queries are those of consecutive tokens, and of each token
// the heads that share key-value head k. The keys are those of the prompt, then those of the row up to the last of these tokens;
// with a sliding window, from the first that the first of these tokens sees. Lanes beyond `count` have no query, and their results
// are ignored.
struct Tile {
  int64_t start, H, k, heads_per_kv;  // start: the row's first token
  int64_t first, count;               // of the row's queries for head k
  Segment segments[2];                // prompt, row
  int64_t first_key;                  // the token of the first key, as `token` counts; negative in the prompt

  // The token of a lane's query, counted from the row's first token.
  int64_t token(int64_t lane) const { return (first + lane) / heads_per_kv; }
  int64_t head(int64_t lane) const { return k * heads_per_kv + (first + lane) % heads_per_kv; }
  // The index of a lane's query in [N, H].
  int64_t index(int64_t lane) const { return (start + token(lane)) * H + head(lane); }
  int64_t keys() const { return segments[0].count + segments[1].count; }
};

// What is added to plain attention.
struct Form {
  int64_t window;      // a token sees the last `window` tokens of its sequence, itself included; 0: all
  float softcap;       // c tanh(score / c) of the scaled scores; 0: none
  const float* sinks;  // [H], logits that take part in the softmax and have no value; null: none
};

// The layout of the rows, as in packed_attention.py: the rows of a set all have the same prompt, or none.
struct PackedRows {
  const int64_t *starts, *lengths, *prompts;  // of each row: its first token, its tokens, the row that is its prompt or -1
  const int64_t *order, *sets;                // set s: the rows order[sets[s]:sets[s + 1]]
  int64_t set_count;
  int64_t H, K, max_keys;                     // max_keys: the most keys that a query attends to

  Tile tile(int64_t row, int64_t k, int64_t first, const float* key, const float* value, int64_t window) const {
    const int64_t prompt = prompts[row], heads_per_kv = H / K;
    const int64_t left = lengths[row] * heads_per_kv - first, n = left < LANES ? left : LANES;
    const int64_t prompt_length = prompt < 0 ? 0 : lengths[prompt], end = (first + n - 1) / heads_per_kv + 1;
    // The first key by its position, then by its token in the prompt and in the row.
    const int64_t lowest = prompt_length + first / heads_per_kv - window + 1, low = window > 0 && lowest > 0 ? lowest : 0;
    const int64_t of_prompt = low < prompt_length ? low : prompt_length, of_row = low - of_prompt;
    return {starts[row], H, k, heads_per_kv, first, n,
            {segment(key, value, prompt < 0 ? 0 : starts[prompt], k, of_prompt, prompt_length),
             segment(key, value, starts[row], k, of_row, end)},
            low - prompt_length};
  }

  // Tokens first to end - 1 of the sequence that begins at token `start`.
  Segment segment(const float* key, const float* value, int64_t start, int64_t k, int64_t first, int64_t end) const {
    const int64_t offset = ((start + first) * K + k) * D;
    return {key + offset, value + offset, first, end - first, K * D};
  }
};

// One vector [D] per lane, and the same transposed. Lanes without a query are zero.
struct LaneVectors {
  float rows[LANES][D], transposed[D][LANES];

  void load(const float* from, const Tile& tile, float scale) {
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const float* x = lane < tile.count ? from + tile.index(lane) * D : nullptr;
      for (int64_t d = 0; d < D; ++d) transposed[d][lane] = rows[lane][d] = x ? x[d] * scale : 0;
    }
  }
};

// scores[t][lane] = key (or value) t of the tile . the lane's vector, for all keys of the tile.
void dot_products(const Tile& tile, const float* Segment::*member, const LaneVectors& vectors, float* scores) {
  std::memset(scores, 0, tile.keys() * LANES * sizeof(float));
  for (const Segment& segment : tile.segments) {
    multiply<LANES>(segment.*member, segment.stride, 1, &vectors.transposed[0][0], LANES, scores, LANES, segment.count, D);
    scores += segment.count * LANES;
  }
}

// sums[lane] += sum over t of weights[t][lane] * key (or value) t of the tile.
void add_weighted_sums(const Tile& tile, const float* Segment::*member, const float* weights, float (*sums)[D]) {
  for (const Segment& segment : tile.segments) {
    for (int64_t d = 0; d < D; d += SIMD_WIDTH) {
      multiply<SIMD_WIDTH>(weights, 1, LANES, segment.*member + d, segment.stride, &sums[0][d], D, LANES, segment.count);
    }
    weights += segment.count * LANES;
  }
}

// The gradient of key (or value) t of the tile += sum over lanes of weights[t][lane] * the lane's vector.
void add_gradients(const Tile& tile, float* Segment::*gradient, const float* weights, const LaneVectors& vectors) {
  for (const Segment& segment : tile.segments) {
    for (int64_t d = 0; d < D; d += SIMD_WIDTH) {
      multiply<SIMD_WIDTH>(weights, LANES, 1, &vectors.rows[0][d], D, segment.*gradient + d, segment.stride, segment.count, LANES);
    }
    weights += segment.count * LANES;
  }
}

// Applies the soft cap to scores. If slopes is not null, stores the derivative 1 - tanh^2 there.
void cap_tile(float* scores, const Tile& tile, float c, float* slopes) {
  if (!slopes) return cap_scores(scores, tile.keys() * LANES, c);
  const float inverse = 1 / c;
  for (int64_t i = 0; i < tile.keys() * LANES; i += LANES) {
#pragma omp simd
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const float x = hyperbolic_tangent(scores[i + lane] * inverse);
      scores[i + lane] = c * x;
      slopes[i + lane] = (1 - x) * (1 + x);
    }
  }
}

// Sets scores to `hidden` where the key lies before the lane's window: among the first keys of the tile, as many as its tokens
// differ.
void hide_before_window(float* scores, const Tile& tile, int64_t window, float hidden) {
  if (!window) return;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    const int64_t visible = tile.token(lane) - window + 1 - tile.first_key, n = visible < tile.keys() ? visible : tile.keys();
    for (int64_t key = 0; key < n; ++key) scores[key * LANES + lane] = hidden;
  }
}

// Raises max [LANES] to the largest score of each lane, over the keys that the causal mask lets its query see.
void max_scores(const float* scores, const Tile& tile, float* max) {
  int32_t tokens[LANES];
  for (int64_t lane = 0; lane < LANES; ++lane) tokens[lane] = tile.token(lane);
  for (int64_t key = 0; key < tile.keys(); ++key) {
    const float* at_key = scores + key * LANES;
    const int32_t key_token = key + tile.first_key;  // negative in the prompt, which every query sees
#pragma omp simd
    for (int64_t lane = 0; lane < LANES; ++lane) {
      max[lane] = key_token <= tokens[lane] && at_key[lane] > max[lane] ? at_key[lane] : max[lane];
    }
  }
}

// Replaces scores by e^(score - shift), or by 0 where the causal mask hides the key from the lane's query, and adds them to sums.
void exponentiate(float* scores, const Tile& tile, const float* shift, float* sums) {
  int32_t tokens[LANES];
  for (int64_t lane = 0; lane < LANES; ++lane) tokens[lane] = tile.token(lane);
  for (int64_t key = 0; key < tile.keys(); ++key) {
    float* at_key = scores + key * LANES;
    const int32_t key_token = key + tile.first_key;
#pragma omp simd
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const float x = key_token > tokens[lane] ? 0.0f : exponential(at_key[lane] - shift[lane]);
      at_key[lane] = x;
      sums[lane] += x;
    }
  }
}

void forward(const Tile& tile, const float* query, float* out, float* log_sum_exp, float scale, const Form& form, float* scores) {
  LaneVectors queries;
  queries.load(query, tile, scale);
  dot_products(tile, &Segment::keys, queries, scores);
  float max[LANES], sum[LANES] = {}, attended[LANES][D] = {};
  for (int64_t lane = 0; lane < LANES; ++lane) max[lane] = form.sinks ? form.sinks[tile.head(lane)] : -INFINITY;
  if (form.softcap) cap_tile(scores, tile, form.softcap, nullptr);
  hide_before_window(scores, tile, form.window, -INFINITY);
  max_scores(scores, tile, max);
  exponentiate(scores, tile, max, sum);
  hide_before_window(scores, tile, form.window, 0);
  if (form.sinks) {
    for (int64_t lane = 0; lane < LANES; ++lane) sum[lane] += exponential(form.sinks[tile.head(lane)] - max[lane]);
  }
  add_weighted_sums(tile, &Segment::values, scores, attended);
  for (int64_t lane = 0; lane < tile.count; ++lane) {
    const int64_t index = tile.index(lane);
    const float inverse = 1 / sum[lane];
    for (int64_t d = 0; d < D; ++d) out[index * D + d] = attended[lane][d] * inverse;
    log_sum_exp[index] = max[lane] + std::log(sum[lane]);
  }
}

// As in FlashAttention: the probabilities are recomputed from the log-sum-exp, and delta = sum over d of d_out * out.
void backward(const Tile& tile, const float* d_out, const float* out, const float* query, const float* log_sum_exp, float* d_query,
              float scale, const Form& form, float* probabilities, float* d_scores, float* slopes) {
  LaneVectors queries, gradients;
  queries.load(query, tile, scale);
  gradients.load(d_out, tile, 1);
  float lane_log_sum_exp[LANES] = {}, delta[LANES] = {}, unused[LANES] = {}, d_queries[LANES][D] = {};
  for (int64_t lane = 0; lane < tile.count; ++lane) {
    const int64_t index = tile.index(lane);
    lane_log_sum_exp[lane] = log_sum_exp[index];
    for (int64_t d = 0; d < D; ++d) delta[lane] += gradients.rows[lane][d] * out[index * D + d];
  }
  dot_products(tile, &Segment::keys, queries, probabilities);
  if (form.softcap) cap_tile(probabilities, tile, form.softcap, slopes);
  exponentiate(probabilities, tile, lane_log_sum_exp, unused);
  hide_before_window(probabilities, tile, form.window, 0);
  dot_products(tile, &Segment::values, gradients, d_scores);
  for (int64_t i = 0; i < tile.keys() * LANES; i += LANES) {
#pragma omp simd
    for (int64_t lane = 0; lane < LANES; ++lane) d_scores[i + lane] = probabilities[i + lane] * (d_scores[i + lane] - delta[lane]);
  }
  if (form.softcap) {
    for (int64_t i = 0; i < tile.keys() * LANES; ++i) d_scores[i] *= slopes[i];
  }
  add_weighted_sums(tile, &Segment::keys, d_scores, d_queries);
  for (int64_t lane = 0; lane < tile.count; ++lane) {
    for (int64_t d = 0; d < D; ++d) d_query[tile.index(lane) * D + d] = d_queries[lane][d] * scale;
  }
  add_gradients(tile, &Segment::d_keys, d_scores, queries);
  add_gradients(tile, &Segment::d_values, probabilities, gradients);
}

// Calls work(tile, set, `buffers` buffers for scores, one after another) for each tile of each row and key-value head. The tiles
// of one set and head are processed in order by one thread.
template <typename Work>
void for_each_tile(const PackedRows& rows, const float* key, const float* value, int64_t window, int64_t buffers, Work work) {
#pragma omp parallel
  {
    std::vector<float> scores(buffers * rows.max_keys * LANES);
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t set = 0; set < rows.set_count; ++set) {
      for (int64_t k = 0; k < rows.K; ++k) {
        for (int64_t i = rows.sets[set]; i < rows.sets[set + 1]; ++i) {
          const int64_t row = rows.order[i], queries = rows.lengths[row] * rows.H / rows.K;
          for (int64_t first = 0; first < queries; first += LANES) {
            work(rows.tile(row, k, first, key, value, window), set, scores.data());
          }
        }
      }
    }
  }
}

}  // namespace

// query and out [N, H, D]; key and value [N, K, D]; log_sum_exp [N, H], of each query's scores and its sink; sinks and window as
// in Form, the other arguments as in PackedRows.
extern "C" void attend(const float* query, const float* key, const float* value, const float* sinks, float* out, float* log_sum_exp,
                       const int64_t* starts, const int64_t* lengths, const int64_t* prompts, const int64_t* order,
                       const int64_t* sets, float scale, float softcap, int64_t set_count, int64_t H, int64_t K, int64_t max_keys,
                       int64_t window) {
  const PackedRows rows{starts, lengths, prompts, order, sets, set_count, H, K, max_keys};
  const Form form{window, softcap, sinks};
  for_each_tile(rows, key, value, window, 1, [=](const Tile& tile, int64_t, float* scores) {
    forward(tile, query, out, log_sum_exp, scale, form, scores);
  });
}

// The gradients. d_query is overwritten; d_key, d_value and d_prompts must be zero on entry. The completions' gradients of their
// prompt's keys and values are accumulated in d_prompts [2 (keys, values), prompt_tokens, K, D], each set from token
// prompt_offsets[set] on, so that no two threads write to the same memory; they are added to d_key and d_value at the end, in a
// fixed order, so that the result is the same to the bit with any number of threads. d_sinks is by itself: sink_gradient.
extern "C" void attend_backward(const float* d_out, const float* out, const float* query, const float* key, const float* value,
                                const float* log_sum_exp, float* d_query, float* d_key, float* d_value, float* d_prompts,
                                const int64_t* starts, const int64_t* lengths, const int64_t* prompts, const int64_t* order,
                                const int64_t* sets, const int64_t* prompt_offsets, float scale, float softcap, int64_t set_count,
                                int64_t H, int64_t K, int64_t max_keys, int64_t window, int64_t prompt_tokens) {
  const PackedRows rows{starts, lengths, prompts, order, sets, set_count, H, K, max_keys};
  const Form form{window, softcap, nullptr};  // the sinks are in log_sum_exp
  const int64_t stride = K * D, buffer = max_keys * LANES;
  for_each_tile(rows, key, value, window, softcap ? 3 : 2, [=](Tile tile, int64_t set, float* buffers) {
    Segment &of_prompt = tile.segments[0], &of_row = tile.segments[1];
    of_prompt.d_keys = d_prompts + ((prompt_offsets[set] + of_prompt.first) * K + tile.k) * D;
    of_prompt.d_values = of_prompt.d_keys + prompt_tokens * stride;
    const int64_t offset = ((tile.start + of_row.first) * K + tile.k) * D;
    of_row.d_keys = d_key + offset;
    of_row.d_values = d_value + offset;
    backward(tile, d_out, out, query, log_sum_exp, d_query, scale, form, buffers, buffers + buffer, buffers + 2 * buffer);
  });
  for (int64_t set = 0; set < set_count; ++set) {
    const int64_t prompt = prompts[order[sets[set]]];
    if (prompt < 0) continue;
    const float* add = d_prompts + prompt_offsets[set] * stride;
    const int64_t to = starts[prompt] * stride, n = lengths[prompt] * stride;
#pragma omp parallel for simd if (n > 1 << 13)
    for (int64_t i = 0; i < n; ++i) d_key[to + i] += add[i], d_value[to + i] += add[prompt_tokens * stride + i];
  }
}

// d_sinks [H] = -sum over tokens of p (d_out . out), where p = e^(sink - log_sum_exp) is the sink's share of the softmax: as the
// gradient of any score of value 0. One thread sums each head, in the order of the tokens.
extern "C" void sink_gradient(const float* d_out, const float* out, const float* log_sum_exp, const float* sinks, float* d_sinks,
                              int64_t N, int64_t H) {
#pragma omp parallel for
  for (int64_t h = 0; h < H; ++h) {
    double sum = 0;
    for (int64_t i = h; i < N * H; i += H) {
      float delta = 0;
#pragma omp simd reduction(+ : delta)
      for (int64_t d = 0; d < D; ++d) delta += d_out[i * D + d] * out[i * D + d];
      sum -= std::exp(sinks[h] - log_sum_exp[i]) * delta;
    }
    d_sinks[h] = sum;
  }
}
