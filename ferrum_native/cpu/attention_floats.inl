// Attention over one block of keys and values in f16 or f32. Scores of 16 keys are one Wide, since keys lie [head_dim, 16].

template <class Element> struct KvElement;
template <> struct KvElement<uint16_t> {
  static F8 load(const uint16_t* p) { return load_f16(p); }
  static Wide wide(const uint16_t* p) { return wide_load_f16(p); }
  static uint16_t from(float x) { return float_to_f16(x); }
};
template <> struct KvElement<float> {
  static F8 load(const float* p) { return ::ferrum::cpu::FERRUM_ISA::load(p); }
  static Wide wide(const float* p) { return wide_load(p); }
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
/// One row: a query head of a query. `state` is its partial result: head_dim weighted values, largest score, sum of weights.
struct AttentionRow {
  const float* q;
  float* state;
};
template <class Element> inline AttentionRow attention_row(const AttentionTileArgs& a, int r, const Element*) {
  return {a.q + static_cast<size_t>(r / a.group) * a.q_stride + (r % a.group) * a.head_dim, a.partial + static_cast<size_t>(r) * static_cast<size_t>(a.head_dim + 2)};
}

/// Rows that share one read of a block, and the vectors of which each adds two to its values at once: so many accumulators fit the registers.
#if defined(FERRUM_SIMD_AVX512)
constexpr int most_attention_rows = 8;
using Values = Wide;
#else
constexpr int most_attention_rows = 4;
using Values = F8;
#endif

/// The 16 scores of `Rows` rows, `scale` not yet applied: one fma chain over head_dim each.
template <class Element, int Rows> inline void block_scores(const AttentionRow* rows, const Element* keys, int head_dim, Wide* scores) {
  Wide sum[Rows];
  for (Wide& x : sum) x = wide_set1(0.0f);
  for (int d = 0; d < head_dim; ++d) {
    const Wide key = KvElement<Element>::wide(keys + 16 * d);
    for (int r = 0; r < Rows; ++r) sum[r] = fma(wide_set1(rows[r].q[d]), key, sum[r]);
  }
  for (int r = 0; r < Rows; ++r) scores[r] = sum[r];
}

/// Turns scores into weights and updates the row's largest score and sum; returns what earlier values are multiplied with.
inline float block_weights(Wide scores, float scale, int visible, int head_dim, float* state, float* weights) {
  scores = scores * wide_set1(scale);
  if (visible < 16) scores = first_lanes(scores, visible, -INFINITY);
  float &largest = state[head_dim], &sum = state[head_dim + 1];
  const float block_largest = reduce_max(max(low_half(scores), high_half(scores)));
  const float now = block_largest > largest ? block_largest : largest;
  const float keep = now == largest ? 1.0f : exp(largest - now);
  const Wide p = exp(scores - wide_set1(now));
  store(weights, p);
  sum = fma(sum, keep, reduce_add(low_half(p) + high_half(p)));
  largest = now;
  return keep;
}

template <class Element> inline void load_values(const Element* p, F8& out) { out = KvElement<Element>::load(p); }
template <class Element> inline void load_values(const Element* p, Wide& out) { out = KvElement<Element>::wide(p); }

/// state = state * keep + weights . values over the first `visible` keys in order, for `Rows` rows that see the same keys: `Count` vectors from d on.
template <class Vector, int Count, class Element, int Rows>
inline void add_values_at(const AttentionRow* rows, const float (*weights)[16], const float* keep, const Element* values, int head_dim, int visible, int d) {
  constexpr int size = sizeof(Vector) / sizeof(float);
  Vector sum[Rows][Count];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Count; ++v) {
      load_values(rows[r].state + d + size * v, sum[r][v]);
      sum[r][v] = sum[r][v] * all_lanes<Vector>(keep[r]);
    }
  for (int key = 0; key < visible; ++key) {
    Vector value[Count];
    for (int v = 0; v < Count; ++v) load_values(values + key * head_dim + d + size * v, value[v]);
    for (int r = 0; r < Rows; ++r) {
      const Vector weight = all_lanes<Vector>(weights[r][key]);
      for (int v = 0; v < Count; ++v) sum[r][v] = fma(weight, value[v], sum[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Count; ++v) store(rows[r].state + d + size * v, sum[r][v]);
}

template <int Rows, class Element> inline void add_block(const AttentionTileArgs& a, const AttentionRow* rows, const Element* keys, const Element* values, int visible) {
  Wide scores[Rows];
  float weights[Rows][16], keep[Rows];
  block_scores<Element, Rows>(rows, keys, a.head_dim, scores);
  for (int r = 0; r < Rows; ++r) keep[r] = block_weights(scores[r], a.scale, visible, a.head_dim, rows[r].state, weights[r]);
  constexpr int two = 2 * sizeof(Values) / sizeof(float);
  int d = 0;
  for (; d + two <= a.head_dim; d += two) add_values_at<Values, 2, Element, Rows>(rows, weights, keep, values, a.head_dim, visible, d);
  for (; d < a.head_dim; d += lanes) add_values_at<F8, 1, Element, Rows>(rows, weights, keep, values, a.head_dim, visible, d);
}
