// Products with Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL weights with NEON: blocks of 32 weights with a float scale each.

#if defined(FERRUM_SIMD_NEON)

/// The weights of a block without scale and minimum, in two halves.
template <class Block> inline int8x16x2_t load_values_32(const std::byte* block) {
  using Fields = Fields32<Block>;
  const uint8x16_t q = load_bytes(block + offsetof(Block, q));
  uint8x16_t low = vandq_u8(q, vdupq_n_u8(15)), high = vshrq_n_u8(q, 4);
  if constexpr (Fields::has_high) {
    uint32_t fifth;
    std::memcpy(&fifth, block + offsetof(Block, high), sizeof fifth);
    const uint8x16_t bytes = vreinterpretq_u8_u32(vdupq_n_u32(fifth)), bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t first = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    // With the middle taken off, a weight without its fifth bit is its four bits - 16: 0xf0 and they.
    auto with_fifth = [&](uint8x16_t four, uint8x16_t byte) {
      const uint8x16_t set = vtstq_u8(vqtbl1q_u8(bytes, byte), bit);
      return vorrq_u8(four, Fields::has_min ? vandq_u8(set, vdupq_n_u8(16)) : vbicq_u8(vdupq_n_u8(0xf0), set));
    };
    low = with_fifth(low, first);
    high = with_fifth(high, vaddq_u8(first, vdupq_n_u8(2)));
  } else if constexpr (!Fields::has_min) {
    low = vsubq_u8(low, vdupq_n_u8(Fields::middle));
    high = vsubq_u8(high, vdupq_n_u8(Fields::middle));
  }
  return {{as_signed(low), as_signed(high)}};
}
template <> inline int8x16x2_t load_values_32<BlockQ8_0>(const std::byte* block) {
  const std::byte* q = block + offsetof(BlockQ8_0, q);
  return {{as_signed(load_bytes(q)), as_signed(load_bytes(q + 16))}};
}
/// Sixteen bytes as 32 weights.
inline int8x16x2_t load_iq4(const std::byte* stored) {
  const uint8x16_t q = load_bytes(stored);
  const int8x16_t table = vld1q_s8(iq4_values);
  return {{vqtbl1q_s8(table, vandq_u8(q, vdupq_n_u8(15))), vqtbl1q_s8(table, vshrq_n_u8(q, 4))}};
}
template <> inline int8x16x2_t load_values_32<BlockIQ4_NL>(const std::byte* block) { return load_iq4(block + offsetof(BlockIQ4_NL, q)); }

template <class Block> struct NeonBlocks32 {
  static constexpr bool has_min = Fields32<Block>::has_min;
  static constexpr int block_weights = 32, block_bytes = sizeof(Block);

  static inline float32x4_t add_block(float32x4_t acc, float d_y, float32x4_t d, [[maybe_unused]] float32x4_t m, int32x4_t isum,
                                      [[maybe_unused]] float y_sum) {
    const float32x4_t sum = vcvtq_f32_s32(isum);
    if constexpr (has_min)
      return vfmaq_f32(acc, vdupq_n_f32(d_y), vfmaq_f32(vmulq_f32(m, vdupq_n_f32(y_sum)), d, sum));
    else
      return vfmaq_f32(acc, vmulq_f32(d, vdupq_n_f32(d_y)), sum);
  }
  /// The sum of 32 activations.
  static inline float sum_of_32(const int8_t* y) {
    const int8x16_t ones = vdupq_n_s8(1);
    return static_cast<float>(vaddvq_s32(add_products(add_products(vdupq_n_s32(0), ones, vld1q_s8(y)), ones, vld1q_s8(y + 16))));
  }
  static inline float32x4_t load_m(const Rows4& rows, size_t offset) {
    if constexpr (has_min) return load_f16_of_rows(rows, offset + offsetof(Block, m));
    return vdupq_n_f32(0);
  }

  template <int C> static void rows4(const Rows4& rows, int k, const Column* columns, float32x4_t* products) {
    float32x4_t acc[C];
    for (int c = 0; c < C; ++c) acc[c] = vdupq_n_f32(0);
    size_t at = 0;
    for (int i = 0; i < k; i += 32, at += block_bytes) {
      prefetch_lines(rows.row[0], 4 * (rows.stride + at) + tuning::prefetch_bytes, 4 * block_bytes);
      int32x4_t sum[C][4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const int8x16x2_t q = load_values_32<Block>(rows.row[r] + at);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const int8_t* y = columns[c].q8_32 + i;
          sum[c][r] = add_products(add_products(vdupq_n_s32(0), q.val[0], vld1q_s8(y)), q.val[1], vld1q_s8(y + 16));
        }
      }
      const float32x4_t d = load_f16_of_rows(rows, at + offsetof(Block, d)), m = load_m(rows, at);
      for (int c = 0; c < C; ++c) {
        const float y_sum = has_min ? sum_of_32(columns[c].q8_32 + i) : 0;
        acc[c] = add_block(acc[c], columns[c].scale_32[i / 32], d, m, sum_lanes(sum[c]), y_sum);
      }
    }
    for (int c = 0; c < C; ++c) products[c] = acc[c];
  }

#if defined(FERRUM_SIMD_DOTPROD)
  /// Eight blocks of eight rows.
  struct alignas(64) Unpacked {
    Weights8x16 q[16];
    float32x4_t d[8][2], m[8][2];  // lane r of [h] is row 4 h + r
  };

  static void unpack(const Rows4& low, const Rows4& high, int i, int n, Unpacked& out) {
    size_t at = static_cast<size_t>(i / 32) * block_bytes;
    for (int b = 0; b < n / 32; ++b, at += block_bytes) {
      int8x16_t q[2][8];
      for (int h = 0; h < 2; ++h) {
        const Rows4& rows = h ? high : low;
        for (int r = 0; r < 4; ++r) {
          const int8x16x2_t values = load_values_32<Block>(rows.row[r] + at);
          for (int half = 0; half < 2; ++half) q[half][4 * h + r] = values.val[half];
        }
        out.d[b][h] = load_f16_of_rows(rows, at + offsetof(Block, d));
        if constexpr (has_min) out.m[b][h] = load_m(rows, at);
      }
      for (int half = 0; half < 2; ++half) arrange(q[half], out.q[2 * b + half]);
    }
  }

  template <int C> static void tile(const Unpacked& w, int i, int n, const Column* columns, float (*sums)[8]) {
    float32x4_t acc[C][2];
    const int8_t* y[C];
    for (int c = 0; c < C; ++c) {
      y[c] = columns[c].q8_32 + i;
      for (int h = 0; h < 2; ++h) acc[c][h] = vld1q_f32(sums[c] + 4 * h);
    }
    for (int b = 0; b < n / 32; ++b) {
      int32x4_t isum[C][2];
      tile_products<2, C>(w.q + 2 * b, y, 32 * b, isum);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const float d_y = columns[c].scale_32[i / 32 + b], y_sum = has_min ? sum_of_32(y[c] + 32 * b) : 0;
        for (int h = 0; h < 2; ++h) acc[c][h] = add_block(acc[c][h], d_y, w.d[b][h], has_min ? w.m[b][h] : vdupq_n_f32(0), isum[c][h], y_sum);
      }
    }
    for (int c = 0; c < C; ++c)
      for (int h = 0; h < 2; ++h) vst1q_f32(sums[c] + 4 * h, acc[c][h]);
  }
#endif
};

template <class Block> void dot_blocks_32(const DotArgs& args) { NeonDot<NeonBlocks32<Block>>::dot(args); }
inline void dot_q8_0(const DotArgs& args) { dot_blocks_32<BlockQ8_0>(args); }
inline void dot_iq4_nl(const DotArgs& args) { dot_blocks_32<BlockIQ4_NL>(args); }

#endif
