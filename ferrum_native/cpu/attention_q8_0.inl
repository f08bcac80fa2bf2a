// Attention over one block of keys and values in q8_0 (KvGroupQ8_0): products of int16 with int8, summed in int32.

#if defined(FERRUM_SIMD_AVX512)

/// Sixteen int32 lanes; and sixteen lanes of two int16.
struct WideSums { __m512i v; };
struct WidePairs { __m512i v; };

inline WideSums no_sums() { return {_mm512_setzero_si512()}; }
inline WidePairs load_pairs(const int8_t* p) { return {_mm512_cvtepi8_epi16(load_256(p))}; }
/// Adds to each lane the products of its pair with the two int16 at y.
inline void add_pairs(WideSums& sums, const WidePairs& x, const int16_t* y) { add_pairs(sums.v, x.v, y); }
inline Wide to_floats(const WideSums& x) { return {_mm512_cvtepi32_ps(x.v)}; }
/// Sixteen floats within +-32767, rounded to nearest even. A lane that is no such number gives any.
inline void store_i16(int16_t* out, Wide x) { store_256(out, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x.v))); }

#elif defined(FERRUM_SIMD_AVX2)

struct WideSums { __m256i low, high; };
struct WidePairs { __m256i low, high; };

inline WideSums no_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline WidePairs load_pairs(const int8_t* p) {
  const __m256i x = load_256(p);
  return {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(x)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(x, 1))};
}
inline void add_pairs(WideSums& sums, const WidePairs& x, const int16_t* y) {
  const __m256i pair = broadcast_4(y);
  sums = {_mm256_add_epi32(sums.low, _mm256_madd_epi16(x.low, pair)), _mm256_add_epi32(sums.high, _mm256_madd_epi16(x.high, pair))};
}
inline Wide to_floats(const WideSums& x) { return {{_mm256_cvtepi32_ps(x.low)}, {_mm256_cvtepi32_ps(x.high)}}; }
inline void store_i16(int16_t* out, Wide x) {
  store_256(out, _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.low.v), _mm256_cvtps_epi32(x.high.v)), 0xd8));
}

#else

struct WideSums { int32_t v[16]; };
struct WidePairs { int8_t v[32]; };

inline WideSums no_sums() { return {}; }
inline WidePairs load_pairs(const int8_t* p) {
  WidePairs x;
  std::memcpy(x.v, p, sizeof x.v);
  return x;
}
inline void add_pairs(WideSums& sums, const WidePairs& x, const int16_t* y) {
  for (int i = 0; i < 16; ++i) sums.v[i] += x.v[2 * i] * y[0] + x.v[2 * i + 1] * y[1];
}
inline Wide to_floats(const WideSums& x) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(x.v[i]);
  return {load(values), load(values + 8)};
}
inline void store_i16(int16_t* out, Wide x) {
  float all[16];
  store(all, x);
  for (int i = 0; i < 16; ++i) {
    const float rounded = std::nearbyint(all[i]);
    out[i] = static_cast<int16_t>(rounded >= -32767 && rounded <= 32767 ? static_cast<int>(rounded) : 0);
  }
}

#endif

/// Makes int8 of 32 values and returns their scale.
inline uint16_t quantize_kv(const float* x, int8_t* q) {
  const float needed = largest_of_32(x) / 127.0f;
  uint16_t scale = float_to_f16(needed);
  if (f16_to_float(scale) < needed) ++scale;
  quantize_32(x, scale == 0 ? 0.0f : 1.0f / f16_to_float(scale), q);
  return scale;
}
/// `At` is where a dimension of this token lies in a group.
template <int (*At)(int place, int d)> void write_groups(const float* x, int head_dim, int place, std::byte* block) {
  auto* groups = reinterpret_cast<KvGroupQ8_0*>(block);
  for (int g = 0; g < head_dim / kv_group; ++g) {
    int8_t q[kv_group];
    groups[g].scale[place] = quantize_kv(x + kv_group * g, q);
    for (int d = 0; d < kv_group; ++d) groups[g].q[At(place, d)] = q[d];
  }
}

/// AttentionRow of a packed query.
struct PackedAttentionRow {
  const int16_t* q;
  const float* scale;  // [head_dim / 32]
  float* state;
};
inline PackedAttentionRow attention_row(const AttentionTileArgs& a, int r, const KvGroupQ8_0*) {
  return {a.q_16 + r * a.head_dim, a.q_scale + r * (a.head_dim / kv_group), a.partial + static_cast<size_t>(r) * static_cast<size_t>(a.head_dim + 2)};
}
inline void pack_query(const float* q, int head_dim, int16_t* q_16, float* q_scale) {
  for (int g = 0; g < head_dim / kv_group; ++g, q += kv_group, q_16 += kv_group) {
    const float largest = largest_of_32(q);
    const bool zeros = largest < smallest_block;
    q_scale[g] = zeros ? 0.0f : largest / 32767.0f;
    const Wide inverse = wide_set1(zeros ? 0.0f : 32767.0f / largest);
    store_i16(q_16, wide_load(q) * inverse);
    store_i16(q_16 + 16, wide_load(q + 16) * inverse);
  }
}

inline void pack_queries(const AttentionTileArgs& a) {
  for (int r = 0; r < a.queries * a.group; ++r)
    pack_query(attention_row<float>(a, r, nullptr).q, a.head_dim, a.q_16 + r * a.head_dim, a.q_scale + r * (a.head_dim / kv_group));
}

/// The 16 scores of `Rows` rows, the softmax's scale not yet applied.
template <int Rows> inline void block_scores(const PackedAttentionRow* rows, const KvGroupQ8_0* keys, int head_dim, Wide* scores) {
  Wide total[Rows];
  for (Wide& x : total) x = wide_set1(0.0f);
  for (int g = 0; g < head_dim / kv_group; ++g) {
    WideSums sums[Rows];
    for (WideSums& x : sums) x = no_sums();
    for (int pair = 0; pair < 16; ++pair) {
      const WidePairs key = load_pairs(keys[g].q + 32 * pair);
      for (int r = 0; r < Rows; ++r) add_pairs(sums[r], key, rows[r].q + kv_group * g + 2 * pair);
    }
    const Wide scale = wide_load_f16(keys[g].scale);
    for (int r = 0; r < Rows; ++r) total[r] = fma(scale * wide_set1(rows[r].scale[g]), to_floats(sums[r]), total[r]);
  }
  for (int r = 0; r < Rows; ++r) scores[r] = total[r];
}

/// The weights of `Rows` rows relative to the block's largest, and what they and earlier values are multiplied with.
template <int Rows> struct RelativeWeights {
  Wide p[Rows];
  float take[lanes], keep[lanes];
};
/// Turns scores into weights and updates the rows' largest scores and sums.
template <int Rows> inline void relative_weights(const AttentionTileArgs& a, const PackedAttentionRow* rows, const Wide* scores, int visible, RelativeWeights<Rows>& out) {
  static_assert(Rows <= lanes);
  float largest_of_block[Rows], distance[lanes] = {};
  for (int r = 0; r < Rows; ++r) {
    Wide scaled = scores[r] * wide_set1(a.scale);
    if (visible < 16) scaled = first_lanes(scaled, visible, -INFINITY);
    largest_of_block[r] = reduce_max(max(low_half(scaled), high_half(scaled)));
    distance[r] = largest_of_block[r] - rows[r].state[a.head_dim];
    out.p[r] = exp(scaled - wide_set1(largest_of_block[r]));
  }
  // One of the two factors is 1.
  store(out.take, exp(min(load(distance), zero())));
  store(out.keep, exp(min(zero() - load(distance), zero())));
  for (int r = 0; r < Rows; ++r) {
    float &largest = rows[r].state[a.head_dim], &sum = rows[r].state[a.head_dim + 1];
    sum = fma(sum, out.keep[r], out.take[r] * reduce_add(low_half(out.p[r]) + high_half(out.p[r])));
    if (largest_of_block[r] > largest) largest = largest_of_block[r];
  }
}

/// state = state * keep + weights . values, for `Rows` rows that see the same keys.
template <int Rows> inline void add_values(const PackedAttentionRow* rows, const RelativeWeights<Rows>& weights, const KvGroupQ8_0* values, int head_dim, int visible) {
  constexpr int count = sizeof(Values) / sizeof(F8);  // of 16 dimensions, whose sums fit the registers
  for (int g = 0; g < head_dim / kv_group; ++g) {
    Wide scale = wide_load_f16(values[g].scale);
    if (visible < 16) scale = first_lanes(scale, visible, 0.0f);
    const float largest = reduce_max_or_nan(max_or_nan(abs(low_half(scale)), abs(high_half(scale)))), step = largest / 32767.0f;
    scale = scale * wide_set1(largest > 0.0f ? 32767.0f / largest : 0.0f);
    int16_t w[Rows][16];
    for (int r = 0; r < Rows; ++r) store_i16(w[r], weights.p[r] * scale);
    for (int d = 0; d < kv_group; d += 16 * count) {
      WideSums sums[Rows][count];
      for (auto& row : sums)
        for (WideSums& x : row) x = no_sums();
      for (int pair = 0; pair < 8; ++pair) {
        WidePairs value[count];
        for (int v = 0; v < count; ++v) value[v] = load_pairs(values[g].q + 64 * pair + 2 * d + 32 * v);
        for (int r = 0; r < Rows; ++r)
          for (int v = 0; v < count; ++v) add_pairs(sums[r][v], value[v], w[r] + 2 * pair);
      }
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < count; ++v) {
          float* at = rows[r].state + kv_group * g + d + 16 * v;
          store(at, fma(to_floats(sums[r][v]), wide_set1(step * weights.take[r]), wide_load(at) * wide_set1(weights.keep[r])));
        }
    }
  }
}

template <> inline constexpr int blocks_together<KvGroupQ8_0> = 1;

template <bool Ahead, int Rows> inline void add_blocks(const AttentionTileArgs& a, const PackedAttentionRow* rows, const Blocks<KvGroupQ8_0>& at, int visible) {
  if constexpr (Ahead)
    for (int g = 0; g < a.head_dim / kv_group; ++g) {
      prefetch_lines<sizeof(KvGroupQ8_0)>(at.next_keys[0], static_cast<size_t>(g) * sizeof(KvGroupQ8_0));
      prefetch_lines<sizeof(KvGroupQ8_0)>(at.next_values[0], static_cast<size_t>(g) * sizeof(KvGroupQ8_0));
    }
  Wide scores[Rows];
  RelativeWeights<Rows> weights;
  block_scores<Rows>(rows, at.keys[0], a.head_dim, scores);
  relative_weights<Rows>(a, rows, scores, visible, weights);
  add_values<Rows>(rows, weights, at.values[0], a.head_dim, visible);
}
