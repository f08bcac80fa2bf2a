// Attention of some queries of one kv head over a range of keys. Scores of 16 keys are one Wide, since keys lie [head_dim, 16].

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

template <class Element, int Rows> inline void add_block(const AttentionTileArgs& a, const AttentionRow* rows, const Element* keys, const Element* values, int visible) {
  Wide scores[Rows];
  float weights[Rows][16], keep[Rows];
  block_scores<Element, Rows>(rows, keys, a.head_dim, scores);
  for (int r = 0; r < Rows; ++r) keep[r] = block_weights(scores[r], a.scale, visible, a.head_dim, rows[r].state, weights[r]);
  constexpr int two = 2 * sizeof(Values) / sizeof(float);
  int d = 0;
  for (; d + two <= a.head_dim; d += two) add_values_at<Values, 2, Element, Rows>(rows, weights, keep, values, a.head_dim, visible, d);
  for (; d < a.head_dim; d += lanes) add_values_at<F8, 1, Element, Rows>(rows, weights, keep, values, a.head_dim, visible, d);
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
    // The heads of a query see the same keys; from the first query that sees the whole block on, all rows do.
    for (int r = 0; r < rows;) {
      const int seen = a.first_position + r / a.group - begin + 1, visible = seen < 16 ? seen : 16;
      const int alike = visible < 16 ? a.group - r % a.group : rows - r;
      const int count = visible <= 0 ? 0 : alike >= most_attention_rows ? most_attention_rows : alike >= 4 ? 4 : 1;
      AttentionRow some[most_attention_rows];
      for (int i = 0; i < count; ++i) some[i] = row_at(r + i);
      if (count == most_attention_rows) add_block<Element, most_attention_rows>(a, some, keys, values, visible);
      else if (count == 4) add_block<Element, 4>(a, some, keys, values, visible);
      else if (count == 1) add_block<Element, 1>(a, some, keys, values, visible);
      r += count ? count : alike;
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
