// Products with Q5_K weights (BlockQ5_K in quant_blocks.h).

inline void to_plain(const BlockQ5_K& block, PlainBlock& out) {
  BlockQ4_K head;
  std::memcpy(head.scales, block.scales, sizeof head.scales);
  const ScalesQ4_K scales = unpack_scales(head);
  out.d = f16_to_float(block.d);
  out.dmin = f16_to_float(block.dmin);
  for (int s = 0; s < 16; ++s) {
    out.scale[s] = static_cast<int8_t>(scales.scale[s / 2]);
    out.min[s] = static_cast<int8_t>(scales.min[s / 2]);
  }
  for (int s = 0; s < 8; ++s)
    for (int i = 0; i < 32; ++i) {
      const int low = block.q[32 * (s / 2) + i] >> (s & 1 ? 4 : 0) & 15, high = block.high[i] >> s & 1;
      out.q[32 * s + i] = static_cast<int8_t>(low | high << 4);
    }
}

#if defined(FERRUM_SIMD_AVX2)

struct Q5_K {
  using Block = BlockQ5_K;
  using Head = Q4_K::Head;
  static constexpr int bits = 4, tile_columns = tuning::tile_columns_q5_k;
  static constexpr bool has_high = true;
  static constexpr size_t q_offset = offsetof(Block, q), high_offset = offsetof(Block, high);

  static inline Head load_head(Rows8 rows) { return Q4_K::load_head(rows); }
  static inline __m256i scale(const Head& head, int s) { return twice(head.scale, s / 2); }
  static inline __m256i pair(const Head& head, int j) { return twice(head.min, j); }

 private:
  static inline __m256i twice(const __m256i x[2], int s) { return _mm256_shuffle_epi8(x[s / 4], lane_bytes_as_u16(s & 3, s & 3)); }
};

inline void dot_q5_k(const DotArgs& args) { QuantizedDot<SubBlocks<Q5_K>>::dot(args); }

#elif !defined(FERRUM_SIMD_NEON)

inline void dot_q5_k(const DotArgs& args) { dot_sub_blocks<BlockQ5_K>(args); }

#endif
