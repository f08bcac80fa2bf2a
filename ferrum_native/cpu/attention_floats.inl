// Attention over blocks of keys and values in f16 or f32. Scores of 16 keys are one Wide, since keys lie [head_dim, 16].

/// How many blocks of 16 keys become weights together; of a kind of keys and values.
template <class Element> constexpr int blocks_together = 4;

/// Some blocks of a sequence, and those after them, whose memory is to be fetched.
template <class Element> struct Blocks {
  const Element *keys[blocks_together<Element>], *values[blocks_together<Element>];
  const std::byte *next_keys[blocks_together<Element>], *next_values[blocks_together<Element>];
};

/// Fetches the lines that begin in `Bytes` bytes at p + offset; blocks begin with a line.
template <size_t Bytes> inline void prefetch_lines(const std::byte* p, size_t offset) {
  if constexpr (Bytes >= 64)
    for (size_t line = 0; line < Bytes; line += 64) prefetch(p, offset + line);
  else if (offset % 64 == 0)
    prefetch(p, offset);
}

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

/// Rows that share one read of a block, the blocks whose scores they compute at once, and the vectors of which each adds two to its values at
/// once: so many accumulators fit the registers.
#if defined(FERRUM_SIMD_AVX512)
constexpr int most_attention_rows = 8, score_blocks = 2;
using Values = Wide;
#else
constexpr int most_attention_rows = 4, score_blocks = 1;
using Values = F8;
#endif

/// The 16 scores of each of `Rows` rows with each of `Count` blocks, `scale` not yet applied: one fma chain over head_dim each. Ahead: fetches
/// the next keys.
template <bool Ahead, int Count, class Element, int Rows>
inline void block_scores(const AttentionRow* rows, const Element* const* keys, const std::byte* const* next, int head_dim, Wide (*scores)[Rows]) {
  Wide sum[Count][Rows];
  for (auto& block : sum)
    for (Wide& x : block) x = wide_set1(0.0f);
  for (int d = 0; d < head_dim; d += 2) {
    if constexpr (Ahead)
      for (int b = 0; b < Count; ++b) prefetch_lines<2 * 16 * sizeof(Element)>(next[b], static_cast<size_t>(d) * 16 * sizeof(Element));
    for (int i = d; i < d + 2; ++i) {
      Wide key[Count];
      for (int b = 0; b < Count; ++b) key[b] = KvElement<Element>::wide(keys[b] + 16 * i);
      for (int r = 0; r < Rows; ++r) {
        const Wide q = wide_set1(rows[r].q[i]);
        for (int b = 0; b < Count; ++b) sum[b][r] = fma(q, key[b], sum[b][r]);
      }
    }
  }
  for (int b = 0; b < Count; ++b)
    for (int r = 0; r < Rows; ++r) scores[b][r] = sum[b][r];
}

/// Turns the scores of `blocks` blocks into weights and updates the rows' largest scores and sums; keep[r] is what earlier values are multiplied with.
template <int Rows, int Most>
inline void block_weights(const AttentionTileArgs& a, const AttentionRow* rows, Wide (*scores)[Rows], int blocks, int visible, float (*weights)[16 * Most], float* keep) {
  static_assert(Rows <= lanes);
  float distance[lanes] = {}, now[Rows];
  for (int r = 0; r < Rows; ++r) {
    Wide largest = wide_set1(-INFINITY);
    for (int b = 0; b < blocks; ++b) {
      scores[b][r] = scores[b][r] * wide_set1(a.scale);
      if (visible < 16 * (b + 1)) scores[b][r] = first_lanes(scores[b][r], visible - 16 * b, -INFINITY);
      largest = max(scores[b][r], largest);
    }
    const float earlier = rows[r].state[a.head_dim], of_blocks = reduce_max(max(low_half(largest), high_half(largest)));
    now[r] = of_blocks > earlier ? of_blocks : earlier;
    distance[r] = now[r] == earlier ? 0.0f : earlier - now[r];
  }
  float kept[lanes];
  store(kept, exp(load(distance)));
  for (int r = 0; r < Rows; ++r) {
    Wide total = wide_set1(0.0f);
    for (int b = 0; b < blocks; ++b) {
      const Wide p = exp(scores[b][r] - wide_set1(now[r]));
      store(weights[r] + 16 * b, p);
      total = total + p;
    }
    float &largest = rows[r].state[a.head_dim], &sum = rows[r].state[a.head_dim + 1];
    sum = fma(sum, kept[r], reduce_add(low_half(total) + high_half(total)));
    largest = now[r];
    keep[r] = kept[r];
  }
}

template <class Element> inline void load_values(const Element* p, F8& out) { out = KvElement<Element>::load(p); }
template <class Element> inline void load_values(const Element* p, Wide& out) { out = KvElement<Element>::wide(p); }

/// state = state * keep + weights . values over the first `visible` keys in order, for `Rows` rows that see the same keys: `Count` vectors from
/// d on. Ahead: fetches the next values.
template <bool Ahead, class Vector, int Count, class Element, int Rows, int Most>
inline void add_values_at(const AttentionRow* rows, const float (*weights)[16 * Most], const float* keep, const Element* const* values, const std::byte* const* next, int head_dim, int visible, int d) {
  constexpr int size = sizeof(Vector) / sizeof(float);
  Vector sum[Rows][Count];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Count; ++v) {
      load_values(rows[r].state + d + size * v, sum[r][v]);
      sum[r][v] = sum[r][v] * all_lanes<Vector>(keep[r]);
    }
  for (int first = 0; first < visible; first += 16) {
    const Element* at = values[first / 16] + d;
    const int count = visible - first < 16 ? visible - first : 16;
    for (int key = 0; key < count; ++key, at += head_dim) {
      if constexpr (Ahead) prefetch_lines<Count * size * sizeof(Element)>(next[first / 16], static_cast<size_t>(key * head_dim + d) * sizeof(Element));
      Vector value[Count];
      for (int v = 0; v < Count; ++v) load_values(at + size * v, value[v]);
      for (int r = 0; r < Rows; ++r) {
        const Vector weight = all_lanes<Vector>(weights[r][first + key]);
        for (int v = 0; v < Count; ++v) sum[r][v] = fma(weight, value[v], sum[r][v]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Count; ++v) store(rows[r].state + d + size * v, sum[r][v]);
}

template <bool Ahead, int Rows, class Element> inline void add_blocks(const AttentionTileArgs& a, const AttentionRow* rows, const Blocks<Element>& at, int visible) {
  constexpr int most = blocks_together<Element>;
  const int blocks = (visible + 15) / 16;
  Wide scores[most][Rows];
  float weights[Rows][16 * most], keep[Rows];
  int b = 0;
  for (; b + score_blocks <= blocks; b += score_blocks) block_scores<Ahead, score_blocks, Element, Rows>(rows, at.keys + b, at.next_keys + b, a.head_dim, scores + b);
  for (; b < blocks; ++b) block_scores<Ahead, 1, Element, Rows>(rows, at.keys + b, at.next_keys + b, a.head_dim, scores + b);
  block_weights<Rows, most>(a, rows, scores, blocks, visible, weights, keep);
  constexpr int two = 2 * sizeof(Values) / sizeof(float);
  int d = 0;
  for (; d + two <= a.head_dim; d += two) add_values_at<Ahead, Values, 2, Element, Rows, most>(rows, weights, keep, at.values, at.next_values, a.head_dim, visible, d);
  for (; d < a.head_dim; d += lanes) add_values_at<Ahead, F8, 1, Element, Rows, most>(rows, weights, keep, at.values, at.next_values, a.head_dim, visible, d);
}
