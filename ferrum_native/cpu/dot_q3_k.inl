// Products with Q3_K weights (BlockQ3_K in quant_blocks.h).

inline void to_plain(const BlockQ3_K& block, PlainBlock& out) {
  out.d = f16_to_float(block.d);
  for (int s = 0; s < 16; ++s) {
    const int low = block.scales[s % 8] >> (s < 8 ? 0 : 4) & 15, high = block.scales[8 + s % 4] >> 2 * (s / 4) & 3;
    out.scale[s] = static_cast<int8_t>((low | high << 4) - 32);
  }
  for (int i = 0; i < 256; ++i) {
    const int low = block.q[32 * (i / 128) + i % 32] >> 2 * (i / 32 % 4) & 3, high = block.high[i % 32] >> i / 32 & 1;
    out.q[i] = static_cast<int8_t>((low | high << 2) - 4);
  }
}

#if defined(FERRUM_SIMD_AVX2)

struct Q3_K {
  using Block = BlockQ3_K;
  static constexpr int bits = 2, offset = 4, tile_columns = tuning::tile_columns_q3_k;
  static constexpr bool has_high = true;
  static constexpr size_t q_offset = offsetof(Block, q), high_offset = offsetof(Block, high);

  /// Lanes are rows; the bytes of scale[g] are sub-blocks 4 g..4 g + 3.
  struct Head {
    __m256 d, dmin;
    __m256i scale[4];
  };
  static inline Head load_head(Rows8 rows) {
    __m256i x[4];
    load_quads(rows, sizeof(Block) - 16, x);  // two bytes of q, twelve of scales, d: no byte behind the block
    auto shifted = [&](int i) { return _mm256_or_si256(_mm256_srli_epi32(x[i], 16), _mm256_slli_epi32(x[i + 1], 16)); };
    const __m256i low[2] = {shifted(0), shifted(1)}, high = shifted(2), four = _mm256_set1_epi8(15), upper_two = _mm256_set1_epi8(48);
    auto scale = [&](__m256i lower, __m256i upper) {
      return _mm256_sub_epi8(_mm256_or_si256(_mm256_and_si256(lower, four), _mm256_and_si256(upper, upper_two)), _mm256_set1_epi8(32));
    };
    Head head;
    head.scale[0] = scale(low[0], _mm256_slli_epi16(high, 4));
    head.scale[1] = scale(low[1], _mm256_slli_epi16(high, 2));
    head.scale[2] = scale(_mm256_srli_epi16(low[0], 4), high);
    head.scale[3] = scale(_mm256_srli_epi16(low[1], 4), _mm256_srli_epi16(high, 2));
    load_f16_pairs(x[3], head.dmin, head.d);
    head.dmin = _mm256_setzero_ps();
    return head;
  }
  static inline __m256i scale(const Head& head, int s) { return two(head, s, s); }
  static inline __m256i pair(const Head& head, int j) { return two(head, 2 * j, 2 * j + 1); }

 private:
  static inline __m256i two(const Head& head, int s, int t) { return _mm256_srai_epi16(_mm256_shuffle_epi8(head.scale[s / 4], lane_bytes_as_high(s & 3, t & 3)), 8); }
};

inline void dot_q3_k(const DotArgs& args) { QuantizedDot<SubBlocks<Q3_K>>::dot(args); }

#elif !defined(FERRUM_SIMD_NEON)

inline void dot_q3_k(const DotArgs& args) { dot_sub_blocks<BlockQ3_K>(args); }

#endif
