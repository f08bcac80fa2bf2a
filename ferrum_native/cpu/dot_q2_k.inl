// Products with Q2_K weights (BlockQ2_K in quant_blocks.h).

inline void to_plain(const BlockQ2_K& block, PlainBlock& out) {
  out.d = f16_to_float(block.d);
  out.dmin = f16_to_float(block.dmin);
  for (int s = 0; s < 16; ++s) {
    out.scale[s] = static_cast<int8_t>(block.scales[s] & 15);
    out.min[s] = static_cast<int8_t>(block.scales[s] >> 4);
  }
  for (int i = 0; i < 256; ++i) out.q[i] = static_cast<int8_t>(block.q[32 * (i / 128) + i % 32] >> 2 * (i / 32 % 4) & 3);
}

#if defined(FERRUM_SIMD_AVX2)

struct Q2_K {
  using Block = BlockQ2_K;
  static constexpr int bits = 2, tile_columns = tuning::tile_columns_q2_k;
  static constexpr bool has_high = false;
  static constexpr size_t q_offset = offsetof(Block, q);

  /// Lanes are rows; the bytes of scale[g] and min[g] are sub-blocks 4 g..4 g + 3.
  struct Head {
    __m256 d, dmin;
    __m256i scale[4], min[4];
  };
  static inline Head load_head(Rows8 rows) {
    Head head;
    __m256i x[4];
    load_quads(rows, 0, x);
    for (int g = 0; g < 4; ++g) {
      head.scale[g] = _mm256_and_si256(x[g], _mm256_set1_epi8(15));
      head.min[g] = _mm256_and_si256(_mm256_srli_epi16(x[g], 4), _mm256_set1_epi8(15));
    }
    load_quads(rows, sizeof(Block) - 16, x);
    load_f16_pairs(x[3], head.d, head.dmin);
    return head;
  }
  static inline __m256i scale(const Head& head, int s) { return _mm256_shuffle_epi8(head.scale[s / 4], lane_bytes_as_u16(s & 3, s & 3)); }
  static inline __m256i pair(const Head& head, int j) { return _mm256_shuffle_epi8(head.min[j / 2], lane_bytes_as_u16(2 * (j & 1), 2 * (j & 1) + 1)); }
};

inline void dot_q2_k(const DotArgs& args) { QuantizedDot<SubBlocks<Q2_K>>::dot(args); }

#elif !defined(FERRUM_SIMD_NEON)

inline void dot_q2_k(const DotArgs& args) { dot_sub_blocks<BlockQ2_K>(args); }

#endif
