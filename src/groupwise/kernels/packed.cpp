// Attention in training over flat tokens [N, H, D]: each row looks at itself, up to each token, and at all of its prompt if it
// has one. Forward and backward, compiled for one HEAD_SIZE. See packed.py.
//
// LANES queries are taken at once, one in each lane of a vector, so that a softmax over their keys needs no sum across lanes;
// scores lie as [keys, LANES]. All products are `multiply`, on keys and values where they lie.
#include <vector>

#include "exponential.h"
#include "multiply.h"

namespace {

constexpr int64_t D = HEAD_SIZE;
constexpr int64_t LANES = 16;
constexpr int64_t PART = D % 16 == 0 ? 16 : D % 8 == 0 ? 8 : D % 4 == 0 ? 4 : D % 2 == 0 ? 2 : 1;  // of D, in one vector

// Keys and values of consecutive tokens, `stride` apart, and where their gradients go.
struct Segment {
  const float *keys = nullptr, *values = nullptr;
  int64_t count = 0, stride = 0;
  float *d_keys = nullptr, *d_values = nullptr;
};

// Up to LANES queries of a row: consecutive tokens, and of each the heads that share a key-value head; and the keys they see,
// first those of the prompt, then those of the row up to the last of these tokens. Lanes without a query count for nothing.
struct Tile {
  int64_t start, H, k, share;  // of the row; of the model
  int64_t first, count;        // queries
  Segment segments[2];

  int64_t token(int64_t lane) const { return (first + lane) / share; }
  int64_t place(int64_t lane) const { return (start + token(lane)) * H + k * share + (first + lane) % share; }
  int64_t before() const { return segments[0].count; }
  int64_t seen() const { return segments[0].count + segments[1].count; }
};

// Rows that lie one after another among the flat tokens, and sets of them that one thread takes, all with one prompt or none.
struct Rows {
  const int64_t *starts, *lengths, *prompts;  // of each row; prompts: another row, or -1
  const int64_t *order, *sets;                // set s: rows order[sets[s]] up to order[sets[s + 1]]
  int64_t count;                              // of sets
  int64_t H, K, width;                        // width: the most keys that a query sees

  Tile tile(int64_t row, int64_t k, int64_t first, const float* key, const float* value) const {
    const int64_t prompt = prompts[row], share = H / K, left = lengths[row] * share - first, n = left < LANES ? left : LANES;
    const int64_t from = ((prompt < 0 ? 0 : starts[prompt]) * K + k) * D, own = (starts[row] * K + k) * D;
    const Segment of_prompt{key + from, value + from, prompt < 0 ? 0 : lengths[prompt], K * D};
    const Segment of_row{key + own, value + own, (first + n - 1) / share + 1, K * D};
    return {starts[row], H, k, share, first, n, {of_prompt, of_row}};
  }
};

// LANES rows of D numbers, and the same with one in each lane.
struct Queries {
  float rows[LANES][D], columns[D][LANES];

  void load(const float* from, const Tile& tile, float scale) {
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const float* x = lane < tile.count ? from + tile.place(lane) * D : nullptr;
      for (int64_t d = 0; d < D; ++d) columns[d][lane] = rows[lane][d] = x ? x[d] * scale : 0;
    }
  }
};

// scores[key] = keys . queries.
void meet(const Tile& tile, const float* Segment::*what, const Queries& queries, float* scores) {
  std::memset(scores, 0, tile.seen() * LANES * sizeof(float));
  for (const Segment& segment : tile.segments) {
    multiply<LANES>(segment.*what, segment.stride, 1, &queries.columns[0][0], LANES, scores, LANES, segment.count, D);
    scores += segment.count * LANES;
  }
}

// sums[lane] += sum over keys of weights[key][lane] times what the key has.
void gather(const Tile& tile, const float* Segment::*what, const float* weights, float (*sums)[D]) {
  for (const Segment& segment : tile.segments) {
    for (int64_t d = 0; d < D; d += PART) {
      multiply<PART>(weights, 1, LANES, segment.*what + d, segment.stride, &sums[0][d], D, LANES, segment.count);
    }
    weights += segment.count * LANES;
  }
}

// What each key has += sum over lanes of weights[key][lane] times the lane's row.
void scatter(const Tile& tile, float* Segment::*what, const float* weights, const Queries& lanes) {
  for (const Segment& segment : tile.segments) {
    for (int64_t d = 0; d < D; d += PART) {
      multiply<PART>(weights, LANES, 1, &lanes.rows[0][d], D, segment.*what + d, segment.stride, segment.count, LANES);
    }
    weights += segment.count * LANES;
  }
}

// The largest score of each lane, of keys that its query sees.
void find_top(const float* scores, const Tile& tile, float* top) {
  int32_t tokens[LANES];
  for (int64_t lane = 0; lane < LANES; ++lane) tokens[lane] = tile.token(lane), top[lane] = -INFINITY;
  for (int64_t key = 0; key < tile.seen(); ++key) {
    const float* row = scores + key * LANES;
    const int32_t own = key - tile.before();
#pragma omp simd
    for (int64_t lane = 0; lane < LANES; ++lane) top[lane] = own <= tokens[lane] && row[lane] > top[lane] ? row[lane] : top[lane];
  }
}

// Scores to e^(score - top), zero for keys of the row that come after a lane's query; added to sums.
void soften(float* scores, const Tile& tile, const float* top, float* sums) {
  int32_t tokens[LANES];
  for (int64_t lane = 0; lane < LANES; ++lane) tokens[lane] = tile.token(lane);
  for (int64_t key = 0; key < tile.seen(); ++key) {
    float* row = scores + key * LANES;
    const int32_t own = key - tile.before();
#pragma omp simd
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const float x = own > tokens[lane] ? 0.0f : exponential(row[lane] - top[lane]);
      row[lane] = x;
      sums[lane] += x;
    }
  }
}

void forward(const Tile& tile, const float* query, float* out, float* sums, float scale, float* scores) {
  Queries queries;
  queries.load(query, tile, scale);
  meet(tile, &Segment::keys, queries, scores);
  float top[LANES], sum[LANES] = {}, gathered[LANES][D] = {};
  find_top(scores, tile, top);
  soften(scores, tile, top, sum);
  gather(tile, &Segment::values, scores, gathered);
  for (int64_t lane = 0; lane < tile.count; ++lane) {
    const int64_t place = tile.place(lane);
    const float inverse = 1 / sum[lane];
    for (int64_t d = 0; d < D; ++d) out[place * D + d] = gathered[lane][d] * inverse;
    sums[place] = top[lane] + std::log(sum[lane]);
  }
}

void backward(const Tile& tile, const float* d_out, const float* out, const float* query, const float* sums, float* d_query,
              float scale, float* weights, float* d_scores) {
  Queries queries, gradients;
  queries.load(query, tile, scale);
  gradients.load(d_out, tile, 1);
  float of_sums[LANES] = {}, dots[LANES] = {}, unused[LANES] = {}, d_queries[LANES][D] = {};
  for (int64_t lane = 0; lane < tile.count; ++lane) {
    const int64_t place = tile.place(lane);
    of_sums[lane] = sums[place];
    for (int64_t d = 0; d < D; ++d) dots[lane] += gradients.rows[lane][d] * out[place * D + d];
  }
  meet(tile, &Segment::keys, queries, weights);
  soften(weights, tile, of_sums, unused);  // with the logarithm of their sum for the top, they are the softmax
  meet(tile, &Segment::values, gradients, d_scores);
  for (int64_t i = 0; i < tile.seen() * LANES; i += LANES) {
#pragma omp simd
    for (int64_t lane = 0; lane < LANES; ++lane) d_scores[i + lane] = weights[i + lane] * (d_scores[i + lane] - dots[lane]);
  }
  gather(tile, &Segment::keys, d_scores, d_queries);
  for (int64_t lane = 0; lane < tile.count; ++lane) {
    for (int64_t d = 0; d < D; ++d) d_query[tile.place(lane) * D + d] = d_queries[lane][d] * scale;
  }
  scatter(tile, &Segment::d_keys, d_scores, queries);
  scatter(tile, &Segment::d_values, weights, gradients);
}

// Calls work(tile, set, two buffers for scores) for each tile of each row and key-value head, those of a set in turn.
template <typename Work>
void for_each_tile(const Rows& rows, const float* key, const float* value, Work work) {
#pragma omp parallel
  {
    std::vector<float> scores(2 * rows.width * LANES);
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t set = 0; set < rows.count; ++set) {
      for (int64_t k = 0; k < rows.K; ++k) {
        for (int64_t i = rows.sets[set]; i < rows.sets[set + 1]; ++i) {
          const int64_t row = rows.order[i], queries = rows.lengths[row] * rows.H / rows.K;
          for (int64_t first = 0; first < queries; first += LANES) {
            work(rows.tile(row, k, first, key, value), set, scores.data(), scores.data() + rows.width * LANES);
          }
        }
      }
    }
  }
}

}  // namespace

// Shapes: query and out [N, H, D]; key and value [N, K, D]; sums [N, H], the logarithm of each query's sum of exponentials.
// The rest as in Rows.
extern "C" void attend(const float* query, const float* key, const float* value, float* out, float* sums, const int64_t* starts,
                       const int64_t* lengths, const int64_t* prompts, const int64_t* order, const int64_t* sets, float scale,
                       int64_t count, int64_t H, int64_t K, int64_t width) {
  const Rows rows{starts, lengths, prompts, order, sets, count, H, K, width};
  for_each_tile(rows, key, value,
                [=](const Tile& tile, int64_t, float* scores, float*) { forward(tile, query, out, sums, scale, scores); });
}

// The gradients; with respect to keys and values they are added to d_key and d_value. Those of prompts, one for each set of rows,
// go to of_prompts [2, tokens, K, D] first, from the set's place on, so that no two threads add to the same.
extern "C" void attend_backward(const float* d_out, const float* out, const float* query, const float* key, const float* value,
                                const float* sums, float* d_query, float* d_key, float* d_value, float* of_prompts,
                                const int64_t* starts, const int64_t* lengths, const int64_t* prompts, const int64_t* order,
                                const int64_t* sets, const int64_t* places, float scale, int64_t count, int64_t H, int64_t K,
                                int64_t width, int64_t tokens) {
  const Rows rows{starts, lengths, prompts, order, sets, count, H, K, width};
  const int64_t stride = K * D;
  for_each_tile(rows, key, value, [=](Tile tile, int64_t set, float* weights, float* d_scores) {
    const int64_t own = (tile.start * K + tile.k) * D;
    tile.segments[0].d_keys = of_prompts + (places[set] * K + tile.k) * D;
    tile.segments[0].d_values = tile.segments[0].d_keys + tokens * stride;
    tile.segments[1].d_keys = d_key + own;
    tile.segments[1].d_values = d_value + own;
    backward(tile, d_out, out, query, sums, d_query, scale, weights, d_scores);
  });
  for (int64_t set = 0; set < count; ++set) {
    const int64_t prompt = prompts[order[sets[set]]];
    if (prompt < 0) continue;
    const float* add = of_prompts + places[set] * stride;
    const int64_t to = starts[prompt] * stride, n = lengths[prompt] * stride;
#pragma omp parallel for simd if (n > 1 << 13)
    for (int64_t i = 0; i < n; ++i) d_key[to + i] += add[i], d_value[to + i] += add[tokens * stride + i];
  }
}
