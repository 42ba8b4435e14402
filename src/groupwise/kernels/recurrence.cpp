// Linear recurrences over packed sequences, forward and backward. See recurrent.py, which compiles this for one form of recurrence
// and width of values: DELTA, PER_ROW (0 or 1) and COLUMNS, a divisor of Dv.
#include <algorithm>
#include <vector>

#include "exponential.h"
#include "multiply.h"

namespace {

constexpr int64_t CHUNK = 16;  // tokens between the states that are kept for the backward pass; the same as in recurrent.py
constexpr int64_t MIN_PARALLEL = 1 << 16;  // elements of states to go through, above which several threads are faster than one
constexpr int64_t WIDTH = COLUMNS < 16 ? COLUMNS : 16, VECTORS = COLUMNS / WIDTH;

// The recurrence of one head, with a state S [Dk, Dv]:
//   S = decay * S;  u = value - S^T key (the delta rule; else u = value);  S = S + key (beta u)^T;  output = S^T query.
// No column of S depends on another, so columns are computed in blocks of COLUMNS, whose sums stay in registers.
struct Tokens {
  const float *query, *key;   // [n, Dk], normalised and scaled
  const float* decay;         // [n], or [n, Dk] with a decay of its own for each row of the state
  const float* beta;          // [n], `head_stride` apart
  const float* value;         // [n, Dv], `value_stride` apart
  int64_t n, Dk, head_stride, value_stride;
};

struct Block {
  using V = typename Vector<WIDTH>::Type;
  V of[VECTORS] = {};
  static Block load(const float* x) {
    Block b;
    for (int64_t v = 0; v < VECTORS; ++v) b.of[v] = *reinterpret_cast<const V*>(x + v * WIDTH);
    return b;
  }
  void store(float* x) const {
    for (int64_t v = 0; v < VECTORS; ++v) *reinterpret_cast<V*>(x + v * WIDTH) = of[v];
  }
  void add(float factor, const Block& other) {
    for (int64_t v = 0; v < VECTORS; ++v) of[v] += factor * other.of[v];
  }
  void add(const Block& one, const Block& other) {
    for (int64_t v = 0; v < VECTORS; ++v) of[v] += one.of[v] * other.of[v];
  }
  void scale(float factor) {
    for (int64_t v = 0; v < VECTORS; ++v) of[v] *= factor;
  }
  float sum() const {
    V total = of[0];
    for (int64_t v = 1; v < VECTORS; ++v) total += of[v];
    return horizontal_sum<WIDTH>(total);
  }
  static float dot(const Block& one, const Block& other) {
    Block product;
    product.add(one, other);
    return product.sum();
  }
};

// Runs the tokens through a block of columns. The state after token t is written to `states + (t + 1) * state_step`, read with rows
// `stride` apart; state_step = 0 updates it in place. `output` (rows `output_stride` apart) and `corrections` (u) may be null.
inline void run_block(const Tokens& in, const float* value, float* states, int64_t stride, int64_t state_step, float* output,
               int64_t output_stride, float* corrections) {
  for (int64_t t = 0; t < in.n; ++t) {
    const float *q = in.query + t * in.Dk, *k = in.key + t * in.Dk, *decay = in.decay + t * (PER_ROW ? in.Dk : 1);
    const float *before = states + t * state_step;
    float* after = states + (t + 1) * state_step;
    Block u = Block::load(value + t * in.value_stride);
    if (DELTA) {
      Block read;
      for (int64_t i = 0; i < in.Dk; ++i) read.add(PER_ROW ? k[i] * decay[i] : k[i], Block::load(before + i * stride));
      u.add(PER_ROW ? -1 : -decay[0], read);
    }
    if (corrections) u.store(corrections + t * COLUMNS);
    u.scale(in.beta[t * in.head_stride]);
    Block sum;
    for (int64_t i = 0; i < in.Dk; ++i) {
      Block s = Block::load(before + i * stride);
      s.scale(decay[PER_ROW ? i : 0]);
      s.add(k[i], u);
      s.store(after + i * stride);
      sum.add(q[i], s);
    }
    if (output) sum.store(output + t * output_stride);
  }
}

// The gradients of a chunk, added to what is there but for d_value.
struct Gradients {
  float *query, *key;    // [n, Dk]
  float *decay;          // of the logarithm of the decay: [n] or [n, Dk], `decay_stride` apart
  float *beta;           // [n], `head_stride` apart
  float *value;          // [n, H, Dv]
  int64_t decay_stride, output_stride;
};

// `states` [n + 1, Dk, COLUMNS] as run_block has left them; d_state [Dk, Dv] is the gradient of the last state and becomes that of
// the first one. d_output and d.value point at the block's first column.
inline void run_block_backward(const Tokens& in, const float* states, const float* corrections, const float* d_output, float* d_value,
                        float* d_state, int64_t stride, const Gradients& d) {
  for (int64_t t = in.n - 1; t >= 0; --t) {
    const float *q = in.query + t * in.Dk, *k = in.key + t * in.Dk, *decay = in.decay + t * (PER_ROW ? in.Dk : 1);
    const float *before = states + t * in.Dk * COLUMNS, *after = before + in.Dk * COLUMNS;
    const float beta = in.beta[t * in.head_stride];
    const Block d_out = Block::load(d_output + t * d.output_stride), u = Block::load(corrections + t * COLUMNS);
    Block d_write, write = u, d_read;  // of what is written (beta u), and of what the key has read
    write.scale(beta);
    for (int64_t i = 0; i < in.Dk; ++i) {
      Block g = Block::load(d_state + i * stride);
      g.add(q[i], d_out);
      g.store(d_state + i * stride);
      d_write.add(k[i], g);
    }
    d.beta[t * in.head_stride] += Block::dot(u, d_write);
    d_write.scale(beta);
    d_write.store(d_value + t * d.output_stride);
    if (DELTA) d_read.add(-1, d_write);
    Block d_decay;
    for (int64_t i = 0; i < in.Dk; ++i) {
      const float a = decay[PER_ROW ? i : 0];
      Block g = Block::load(d_state + i * stride), s = Block::load(before + i * COLUMNS), d_key, d_query;
      s.scale(a);
      d_key.add(g, write);
      if (DELTA) {
        d_key.add(s, d_read);
        g.add(k[i], d_read);
      }
      d_query.add(Block::load(after + i * COLUMNS), d_out);
      d.key[t * in.Dk + i] += d_key.sum();
      d.query[t * in.Dk + i] += d_query.sum();
      if (PER_ROW) {
        d.decay[t * d.decay_stride + i] += Block::dot(g, s);
      } else {
        d_decay.add(g, s);
      }
      g.scale(a);
      g.store(d_state + i * stride);
    }
    if (!PER_ROW) d.decay[t * d.decay_stride] += d_decay.sum();
  }
}

// y = scale * x, or scale * x / sqrt(|x|^2 + epsilon) if epsilon > 0. Returns the factor of x.
inline float normalise(const float* x, float epsilon, float scale, float* y, int64_t D) {
  float factor = scale;
  if (epsilon > 0) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) sum += x[d] * x[d];
    factor = scale / std::sqrt(sum + epsilon);
  }
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) y[d] = x[d] * factor;
  return factor;
}

// dx of `normalise`, from dy, x, and the factor that it returned.
inline void normalise_backward(const float* dy, const float* x, float factor, float epsilon, float scale, float* dx, int64_t D) {
  float projection = 0;
  if (epsilon > 0) {
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < D; ++d) dot += dy[d] * x[d];
    projection = dot * factor * factor * factor / (scale * scale);
  }
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) dx[d] = dy[d] * factor - x[d] * projection;
}

struct Shape {
  int64_t S, K, H, Dk, Dv, query_stride, key_stride, value_stride;
};

// A chunk's queries and keys of one key head, and the decays of one value head.
struct Chunk {
  std::vector<float> query, key, decay, query_factor, key_factor;
  explicit Chunk(int64_t Dk) : query(CHUNK * Dk), key(CHUNK * Dk), decay(CHUNK * Dk), query_factor(CHUNK), key_factor(CHUNK) {}

  void read(const float* q, const float* k, const Shape& at, int64_t n, float epsilon, float scale) {
    for (int64_t t = 0; t < n; ++t) {
      query_factor[t] = normalise(q + t * at.query_stride, epsilon, scale, &query[t * at.Dk], at.Dk);
      key_factor[t] = normalise(k + t * at.key_stride, epsilon, 1, &key[t * at.Dk], at.Dk);
    }
  }

  void read_decay(const float* log_decay, int64_t stride, int64_t width, int64_t n) {
    for (int64_t t = 0; t < n; ++t) {
      float* to = &decay[t * width];
      const float* from = log_decay + t * stride;
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) to[d] = exponential(from[d]);
    }
  }
};

void forward(const float* query, const float* key, const float* value, const float* log_decay, const float* beta, float* output,
             const int64_t* ends, const int64_t* initial_of, const float* initial, float* states, float* kept,
             const int64_t* chunks, float scale, float epsilon, const Shape& at) {
  const int64_t group = at.H / at.K, size = at.Dk * at.Dv, decays = PER_ROW ? at.Dk : 1;
#pragma omp parallel if ((ends[at.S] - ends[0]) * at.H * size > MIN_PARALLEL)
  {
    Chunk chunk(at.Dk);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < at.S * at.K; ++task) {
      const int64_t s = task / at.K, head = task % at.K;
      float* first_state = states + (s * at.H + head * group) * size;
      if (initial != states) {
        const int64_t from = initial_of ? initial_of[s] : -1;
        if (from < 0) std::memset(first_state, 0, group * size * sizeof(float));
        if (from >= 0) std::memcpy(first_state, initial + (from * at.H + head * group) * size, group * size * sizeof(float));
      }
      for (int64_t start = ends[s], c = 0; start < ends[s + 1]; start += CHUNK, ++c) {
        const int64_t n = std::min(CHUNK, ends[s + 1] - start);
        chunk.read(query + start * at.query_stride + head * at.Dk, key + start * at.key_stride + head * at.Dk, at, n, epsilon, scale);
        for (int64_t h = head * group; h < (head + 1) * group; ++h) {
          float* state = states + (s * at.H + h) * size;
          if (kept) std::memcpy(kept + ((chunks[s] + c) * at.H + h) * size, state, size * sizeof(float));
          chunk.read_decay(log_decay + (start * at.H + h) * decays, at.H * decays, decays, n);
          const float* v = value + start * at.value_stride + h * at.Dv;
          const Tokens in{chunk.query.data(), chunk.key.data(), chunk.decay.data(), beta + start * at.H + h, v, n, at.Dk, at.H,
                          at.value_stride};
          for (int64_t j = 0; j < at.Dv; j += COLUMNS) {
            float* out = output + (start * at.H + h) * at.Dv + j;
            run_block(in, v + j, state + j, at.Dv, 0, out, at.H * at.Dv, nullptr);
          }
        }
      }
    }
  }
}

void backward(const float* d_output, const float* query, const float* key, const float* value, const float* log_decay,
              const float* beta, const float* kept, const int64_t* chunks, const int64_t* ends, float* d_states, float* d_query,
              float* d_key, float* d_value, float* d_log_decay, float* d_beta, float scale, float epsilon, const Shape& at) {
  const int64_t group = at.H / at.K, size = at.Dk * at.Dv, decays = PER_ROW ? at.Dk : 1;
#pragma omp parallel if ((ends[at.S] - ends[0]) * at.H * size > MIN_PARALLEL)
  {
    Chunk chunk(at.Dk);
    std::vector<float> states((CHUNK + 1) * at.Dk * COLUMNS), corrections(CHUNK * COLUMNS), dq(CHUNK * at.Dk), dk(CHUNK * at.Dk);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < at.S * at.K; ++task) {
      const int64_t s = task / at.K, head = task % at.K;
      for (int64_t c = (ends[s + 1] - ends[s] + CHUNK - 1) / CHUNK - 1; c >= 0; --c) {
        const int64_t start = ends[s] + c * CHUNK, n = std::min(CHUNK, ends[s + 1] - start);
        const float *q = query + start * at.query_stride + head * at.Dk, *k = key + start * at.key_stride + head * at.Dk;
        chunk.read(q, k, at, n, epsilon, scale);
        std::fill(dq.begin(), dq.end(), 0.0f);
        std::fill(dk.begin(), dk.end(), 0.0f);
        for (int64_t h = head * group; h < (head + 1) * group; ++h) {
          chunk.read_decay(log_decay + (start * at.H + h) * decays, at.H * decays, decays, n);
          const float *v = value + start * at.value_stride + h * at.Dv, *state = kept + ((chunks[s] + c) * at.H + h) * size;
          const Tokens in{chunk.query.data(), chunk.key.data(), chunk.decay.data(), beta + start * at.H + h, v, n, at.Dk, at.H,
                          at.value_stride};
          const int64_t first = (start * at.H + h) * at.Dv;
          const Gradients d{dq.data(), dk.data(), d_log_decay + (start * at.H + h) * decays, d_beta + start * at.H + h, d_value + first,
                            at.H * decays, at.H * at.Dv};
          for (int64_t j = 0; j < at.Dv; j += COLUMNS) {
            for (int64_t i = 0; i < at.Dk; ++i) std::memcpy(&states[i * COLUMNS], state + i * at.Dv + j, COLUMNS * sizeof(float));
            run_block(in, v + j, states.data(), COLUMNS, at.Dk * COLUMNS, nullptr, 0,
                                                      corrections.data());
            run_block_backward(in, states.data(), corrections.data(), d_output + first + j,
                                                               d.value + j, d_states + (s * at.H + h) * size + j, at.Dv, d);
          }
        }
        for (int64_t t = 0; t < n; ++t) {
          const int64_t at_token = ((start + t) * at.K + head) * at.Dk;
          normalise_backward(&dq[t * at.Dk], q + t * at.query_stride, chunk.query_factor[t], epsilon, scale, d_query + at_token, at.Dk);
          normalise_backward(&dk[t * at.Dk], k + t * at.key_stride, chunk.key_factor[t], epsilon, 1, d_key + at_token, at.Dk);
        }
      }
    }
  }
}

}  // namespace

// S sequences of packed tokens, sequence s from token ends[s] to ends[s + 1]. query and key [N, K, Dk] and value [N, H, Dv] have
// tokens `..._stride` apart; log_decay [N, H] or [N, H, Dk] (PER_ROW), at most 0; beta and output are contiguous. The state of
// sequence s begins as initial[initial_of[s]] (zero where that is -1 or `initial_of` is null) and ends in states[s]; if `initial`
// is `states`, it is updated in place. `kept` [chunks, H, Dk, Dv] gets the state before each chunk, from index chunks[s] on, or
// is null.
extern "C" void recurrence(const float* query, const float* key, const float* value, const float* log_decay, const float* beta,
                           float* output, const int64_t* ends, const int64_t* initial_of, const float* initial, float* states,
                           float* kept, const int64_t* chunks, float scale, float epsilon, int64_t S, int64_t K,
                           int64_t H, int64_t Dk, int64_t Dv, int64_t query_stride, int64_t key_stride, int64_t value_stride) {
  const Shape at{S, K, H, Dk, Dv, query_stride, key_stride, value_stride};
  forward(query, key, value, log_decay, beta, output, ends, initial_of, initial, states, kept, chunks, scale, epsilon, at);
}

// d_states [S, H, Dk, Dv] is the gradient of each last state and becomes that of each first one. d_log_decay and d_beta are added to.
extern "C" void recurrence_backward(const float* d_output, const float* query, const float* key, const float* value,
                                    const float* log_decay, const float* beta, const float* kept, const int64_t* chunks,
                                    const int64_t* ends, float* d_states, float* d_query, float* d_key, float* d_value,
                                    float* d_log_decay, float* d_beta, float scale, float epsilon, int64_t S, int64_t K, int64_t H,
                                    int64_t Dk, int64_t Dv, int64_t query_stride, int64_t key_stride, int64_t value_stride) {
  const Shape at{S, K, H, Dk, Dv, query_stride, key_stride, value_stride};
  backward(d_output, query, key, value, log_decay, beta, kept, chunks, ends, d_states, d_query, d_key, d_value, d_log_decay, d_beta,
           scale, epsilon, at);
}
