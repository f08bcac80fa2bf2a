// Attention of some queries of one kv head over a range of keys. Scores of 16 keys are two vectors, since keys lie [head_dim, 16].

template <class Element> struct KvElement;
template <> struct KvElement<uint16_t> {
  static F8 load(const uint16_t* p) { return load_f16(p); }
  static uint16_t from(float x) { return float_to_f16(x); }
};
template <> struct KvElement<float> {
  static F8 load(const float* p) { return ::ferrum::cpu::FERRUM_ISA::load(p); }
  static float from(float x) { return x; }
};

template <class Element> void write_key_as(const float* key, int head_dim, int place, std::byte* block) {
  auto* out = reinterpret_cast<Element*>(block) + place;
  for (int d = 0; d < head_dim; ++d) out[16 * d] = KvElement<Element>::from(key[d]);
}
template <class Element> void write_value_as(const float* value, int head_dim, int place, std::byte* block) {
  auto* out = reinterpret_cast<Element*>(block) + place * head_dim;
  for (int d = 0; d < head_dim; ++d) out[d] = KvElement<Element>::from(value[d]);
}
void write_key(const float* key, int head_dim, bool f16, int place, std::byte* block) {
  f16 ? write_key_as<uint16_t>(key, head_dim, place, block) : write_key_as<float>(key, head_dim, place, block);
}
void write_value(const float* value, int head_dim, bool f16, int place, std::byte* block) {
  f16 ? write_value_as<uint16_t>(value, head_dim, place, block) : write_value_as<float>(value, head_dim, place, block);
}

/// One row: a query head of a query. `state` is its partial result: head_dim weighted values, largest score, sum of weights.
struct AttentionRow {
  const float* q;
  float* state;
};

/// The 16 scores of `Rows` rows, `scale` not yet applied: one fma chain over head_dim each.
template <class Element, int Rows> inline void block_scores(const AttentionRow* rows, const Element* keys, int head_dim, F8 (*scores)[2]) {
  F8 sum[Rows][2];
  for (int r = 0; r < Rows; ++r) sum[r][0] = sum[r][1] = zero();
  for (int d = 0; d < head_dim; ++d) {
    const F8 low = KvElement<Element>::load(keys + 16 * d), high = KvElement<Element>::load(keys + 16 * d + 8);
    for (int r = 0; r < Rows; ++r) {
      const F8 q = set1(rows[r].q[d]);
      sum[r][0] = fma(q, low, sum[r][0]);
      sum[r][1] = fma(q, high, sum[r][1]);
    }
  }
  for (int r = 0; r < Rows; ++r) scores[r][0] = sum[r][0], scores[r][1] = sum[r][1];
}

/// Turns scores into weights and updates the row's largest score and sum; returns what earlier values are multiplied with.
inline float block_weights(const F8* scores, float scale, int visible, int head_dim, float* state, float* weights) {
  store(weights, scores[0] * set1(scale));
  store(weights + 8, scores[1] * set1(scale));
  for (int i = visible; i < 16; ++i) weights[i] = -INFINITY;
  const F8 low = load(weights), high = load(weights + 8);
  float &largest = state[head_dim], &sum = state[head_dim + 1];
  const float block_largest = reduce_max(max(low, high));
  const float now = block_largest > largest ? block_largest : largest;
  const float keep = now == largest ? 1.0f : exp(largest - now);
  const F8 p = exp(low - set1(now)), r = exp(high - set1(now));
  store(weights, p);
  store(weights + 8, r);
  sum = fma(sum, keep, reduce_add(p + r));
  largest = now;
  return keep;
}

/// state = state * keep + weights . values over the first `visible` keys in order, for `Rows` rows that see the same keys.
template <class Element, int Rows, int Vectors>
inline void add_values_at(const AttentionRow* rows, const float (*weights)[16], const float* keep, const Element* values, int head_dim, int visible, int d) {
  F8 sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sum[r][v] = load(rows[r].state + d + 8 * v) * set1(keep[r]);
  for (int key = 0; key < visible; ++key) {
    F8 value[Vectors];
    for (int v = 0; v < Vectors; ++v) value[v] = KvElement<Element>::load(values + key * head_dim + d + 8 * v);
    for (int r = 0; r < Rows; ++r) {
      const F8 weight = set1(weights[r][key]);
      for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(weight, value[v], sum[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) store(rows[r].state + d + 8 * v, sum[r][v]);
}

template <class Element, int Rows> inline void add_block(const AttentionTileArgs& a, const AttentionRow* rows, const Element* keys, const Element* values, int visible) {
  F8 scores[Rows][2];
  float weights[Rows][16], keep[Rows];
  block_scores<Element, Rows>(rows, keys, a.head_dim, scores);
  for (int r = 0; r < Rows; ++r) keep[r] = block_weights(scores[r], a.scale, visible, a.head_dim, rows[r].state, weights[r]);
  int d = 0;
  for (; d + 16 <= a.head_dim; d += 16) add_values_at<Element, Rows, 2>(rows, weights, keep, values, a.head_dim, visible, d);
  if (d < a.head_dim) add_values_at<Element, Rows, 1>(rows, weights, keep, values, a.head_dim, visible, d);
}

/// Brings the keys and values of a block near: the blocks of a sequence lie anywhere, so that the processor cannot guess the next one.
template <class Element> inline void prefetch_block(const AttentionTileArgs& a, int32_t block) {
  const size_t at = static_cast<size_t>(block) * a.block_bytes, bytes = 16 * static_cast<size_t>(a.head_dim) * sizeof(Element);
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(a.keys + at + line), __builtin_prefetch(a.values + at + line);
}

template <class Element> void attention_tile_of(const AttentionTileArgs& a) {
  const int rows = a.queries * a.group;
  auto row_at = [&](int r) { return AttentionRow{a.q + static_cast<size_t>(r / a.group) * a.q_stride + (r % a.group) * a.head_dim, a.partial + static_cast<size_t>(r) * static_cast<size_t>(a.head_dim + 2)}; };
  for (int r = 0; r < rows; ++r) {
    float* state = row_at(r).state;
    std::memset(state, 0, static_cast<size_t>(a.head_dim) * sizeof(float));
    state[a.head_dim] = -INFINITY;
    state[a.head_dim + 1] = 0;
  }
  for (int begin = a.key_begin; begin < a.key_end; begin += 16) {
    const auto block = static_cast<size_t>(a.blocks[begin / 16]) * a.block_bytes;
    const auto *keys = reinterpret_cast<const Element*>(a.keys + block), *values = reinterpret_cast<const Element*>(a.values + block);
    if (begin + 16 < a.key_end) prefetch_block<Element>(a, a.blocks[begin / 16 + 1]);
    // Rows before `r` of this loop see fewer keys; from the first query that sees the whole block on, all rows do.
    for (int r = 0; r < rows;) {
      const int visible = a.first_position + r / a.group - begin + 1;
      if (visible >= 16 && r + 4 <= rows) {
        const AttentionRow four[4] = {row_at(r), row_at(r + 1), row_at(r + 2), row_at(r + 3)};
        add_block<Element, 4>(a, four, keys, values, 16);
        r += 4;
        continue;
      }
      const AttentionRow one = row_at(r++);
      if (visible > 0) add_block<Element, 1>(a, &one, keys, values, visible < 16 ? visible : 16);
    }
  }
}

void attention_tile(const AttentionTileArgs& a) { a.f16 ? attention_tile_of<uint16_t>(a) : attention_tile_of<float>(a); }

void attention_combine(float* total, const float* partial, int head_dim) {
  if (partial[head_dim + 1] == 0.0f) return;
  const float largest = total[head_dim] > partial[head_dim] ? total[head_dim] : partial[head_dim];
  const float keep = exp(total[head_dim] - largest), take = exp(partial[head_dim] - largest);
  each_vector(head_dim, [&](int i, int n) { put(total + i, fma(get(total + i, n), set1(keep), get(partial + i, n) * set1(take)), n); });
  total[head_dim + 1] = fma(total[head_dim + 1], keep, partial[head_dim + 1] * take);
  total[head_dim] = largest;
}

void attention_result(const float* total, int head_dim, float* out) {
  const F8 scale = set1(1.0f / total[head_dim + 1]);
  each_vector(head_dim, [&](int i, int n) { put(out + i, get(total + i, n) * scale, n); });
}
