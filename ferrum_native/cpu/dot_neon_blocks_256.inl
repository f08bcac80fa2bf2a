// Products with Q2_K, Q3_K, Q4_K, Q5_K, Q6_K and IQ4_XS weights with NEON: 256 weights in sub-blocks of 16 or 32 whose scales are integers.

#if defined(FERRUM_SIMD_NEON)

/// Scales and minima of a block's sub-blocks: 16, or 8 in [0].
struct Head256 {
  int16x8_t scale[2], min[2];
};

/// What a type's blocks hold:
///   sub_weights: of a sub-block, 16 or 32,
///   head(block) -> Head256; without minima `min` is not set,
///   values<Half>(block, q): weights 128 Half..128 Half + 127 in their order, without scale.
template <class Block> struct Fields256;

/// Nibbles of 64 bytes: bytes 32 j..32 j + 31 are 32 weights in their low nibbles, then 32 in their high ones.
inline void load_nibbles(const std::byte* p, uint8x16_t q[8]) {
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t both = load_bytes(p + 16 * i);
    const int at = 4 * (i / 2) + i % 2;
    q[at] = vandq_u8(both, vdupq_n_u8(15));
    q[at + 2] = vshrq_n_u8(both, 4);
  }
}
/// Pairs of bits of 32 bytes: bits 2 g of byte l are weight 32 g + l.
inline void load_bit_pairs(const std::byte* p, uint8x16_t q[8]) {
  const uint8x16_t three = vdupq_n_u8(3);
  for (int part = 0; part < 2; ++part) {
    const uint8x16_t four = load_bytes(p + 16 * part);
    q[part] = vandq_u8(four, three);
    q[2 + part] = vandq_u8(vshrq_n_u8(four, 2), three);
    q[4 + part] = vandq_u8(vshrq_n_u8(four, 4), three);
    q[6 + part] = vshrq_n_u8(four, 6);
  }
}
/// All bits where bit `bit` is set.
inline uint8x16_t where_bit(uint8x16_t x, int bit) { return vtstq_u8(x, vdupq_n_u8(static_cast<uint8_t>(1 << bit))); }

template <> struct Fields256<BlockQ4_K> {
  static constexpr int sub_weights = 32;

  /// Six bits each, as in the comment of BlockQ4_K. Lanes: scales 0..3, scales 4..7, minima 0..3, minima 4..7.
  static inline Head256 head(const std::byte* block) {
    const uint8x16_t x = load_bytes(block);  // d, dmin, scales
    const uint8x16_t low_at = {4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15};
    const uint8x16_t upper_at = {255, 255, 255, 255, 4, 5, 6, 7, 255, 255, 255, 255, 8, 9, 10, 11};  // 255: no byte, 0
    const int8x16_t shift = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -4, -4, -4, -4};
    const uint8x16_t mask = {63, 63, 63, 63, 15, 15, 15, 15, 63, 63, 63, 63, 15, 15, 15, 15};
    const uint8x16_t low = vandq_u8(vshlq_u8(vqtbl1q_u8(x, low_at), shift), mask);
    const uint8x16_t six = vorrq_u8(low, vandq_u8(vshrq_n_u8(vqtbl1q_u8(x, upper_at), 2), vdupq_n_u8(48)));
    Head256 head;
    head.scale[0] = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(six)));
    head.min[0] = vreinterpretq_s16_u16(vmovl_high_u8(six));
    return head;
  }
  template <int Half> static inline void values(const std::byte* block, int8x16_t q[8]) {
    uint8x16_t four[8];
    load_nibbles(block + offsetof(BlockQ4_K, q) + 64 * Half, four);
    for (int i = 0; i < 8; ++i) q[i] = as_signed(four[i]);
  }
};

template <> struct Fields256<BlockQ5_K> {
  static constexpr int sub_weights = 32;

  static inline Head256 head(const std::byte* block) { return Fields256<BlockQ4_K>::head(block); }
  template <int Half> static inline void values(const std::byte* block, int8x16_t q[8]) {
    uint8x16_t four[8];
    load_nibbles(block + offsetof(BlockQ5_K, q) + 64 * Half, four);
    const uint8x16_t high[2] = {load_bytes(block + offsetof(BlockQ5_K, high)), load_bytes(block + offsetof(BlockQ5_K, high) + 16)};
    for (int i = 0; i < 8; ++i) q[i] = as_signed(vorrq_u8(four[i], vandq_u8(where_bit(high[i % 2], 4 * Half + i / 2), vdupq_n_u8(16))));
  }
};

template <> struct Fields256<BlockQ6_K> {
  static constexpr int sub_weights = 16;

  static inline Head256 head(const std::byte* block) {
    const int8x16_t scales = as_signed(load_bytes(block + offsetof(BlockQ6_K, scales)));
    Head256 head;
    head.scale[0] = vmovl_s8(vget_low_s8(scales));
    head.scale[1] = vmovl_high_s8(scales);
    return head;
  }
  /// Shifts that insert put a nibble and two bits together, with two more bits above them.
  template <int Half> static inline void values(const std::byte* block, int8x16_t q[8]) {
    const std::byte* ql = block + 64 * Half;
    auto value = [](uint8x16_t x) { return vsubq_s8(as_signed(vandq_u8(x, vdupq_n_u8(63))), vdupq_n_s8(32)); };
    for (int part = 0; part < 2; ++part) {
      const uint8x16_t first = load_bytes(ql + 16 * part), second = load_bytes(ql + 32 + 16 * part);
      const uint8x16_t high = load_bytes(block + offsetof(BlockQ6_K, qh) + 32 * Half + 16 * part), next = vshrq_n_u8(high, 2);
      q[part] = value(vsliq_n_u8(first, high, 4));
      q[2 + part] = value(vsliq_n_u8(second, next, 4));
      q[4 + part] = value(vsriq_n_u8(high, first, 4));
      q[6 + part] = value(vsriq_n_u8(next, second, 4));
    }
  }
};

template <> struct Fields256<BlockQ2_K> {
  static constexpr int sub_weights = 16;

  static inline Head256 head(const std::byte* block) {
    const uint8x16_t both = load_bytes(block + offsetof(BlockQ2_K, scales)), scale = vandq_u8(both, vdupq_n_u8(15)), min = vshrq_n_u8(both, 4);
    auto low = [](uint8x16_t x) { return vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(x))); };
    auto high = [](uint8x16_t x) { return vreinterpretq_s16_u16(vmovl_high_u8(x)); };
    return {{low(scale), high(scale)}, {low(min), high(min)}};
  }
  template <int Half> static inline void values(const std::byte* block, int8x16_t q[8]) {
    uint8x16_t two[8];
    load_bit_pairs(block + offsetof(BlockQ2_K, q) + 32 * Half, two);
    for (int i = 0; i < 8; ++i) q[i] = as_signed(two[i]);
  }
};

template <> struct Fields256<BlockQ3_K> {
  static constexpr int sub_weights = 16;

  static inline Head256 head(const std::byte* block) {
    const uint8x16_t x = load_bytes(block + sizeof(BlockQ3_K) - 16);  // two bytes of q, twelve of scales, d: no byte behind the block
    const uint8x16_t low_at = {2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5, 6, 7, 8, 9};
    const uint8x16_t upper_at = {10, 11, 12, 13, 10, 11, 12, 13, 10, 11, 12, 13, 10, 11, 12, 13};
    const int8x16_t low_shift = {0, 0, 0, 0, 0, 0, 0, 0, -4, -4, -4, -4, -4, -4, -4, -4};
    const int8x16_t upper_shift = {4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0, -2, -2, -2, -2};
    const uint8x16_t low = vandq_u8(vshlq_u8(vqtbl1q_u8(x, low_at), low_shift), vdupq_n_u8(15));
    const uint8x16_t upper = vandq_u8(vshlq_u8(vqtbl1q_u8(x, upper_at), upper_shift), vdupq_n_u8(48));
    const int8x16_t scale = vsubq_s8(as_signed(vorrq_u8(low, upper)), vdupq_n_s8(32));
    Head256 head;
    head.scale[0] = vmovl_s8(vget_low_s8(scale));
    head.scale[1] = vmovl_high_s8(scale);
    return head;
  }
  /// A weight without its third bit is its two bits - 4: 0xfc and they.
  template <int Half> static inline void values(const std::byte* block, int8x16_t q[8]) {
    uint8x16_t two[8];
    load_bit_pairs(block + offsetof(BlockQ3_K, q) + 32 * Half, two);
    const uint8x16_t high[2] = {load_bytes(block + offsetof(BlockQ3_K, high)), load_bytes(block + offsetof(BlockQ3_K, high) + 16)};
    for (int i = 0; i < 8; ++i) q[i] = as_signed(vorrq_u8(two[i], vbicq_u8(vdupq_n_u8(0xfc), where_bit(high[i % 2], 4 * Half + i / 2))));
  }
};

template <> struct Fields256<BlockIQ4_XS> {
  static constexpr int sub_weights = 32;

  static inline Head256 head(const std::byte* block) {
    const uint8x16_t x = load_bytes(block);  // d, scales_high, scales_low
    const uint8x8_t low_at = {4, 4, 5, 5, 6, 6, 7, 7}, upper_at = {2, 2, 2, 2, 3, 3, 3, 3};
    const int8x8_t low_shift = {0, -4, 0, -4, 0, -4, 0, -4}, upper_shift = {4, 2, 0, -2, 4, 2, 0, -2};
    const uint8x8_t low = vand_u8(vshl_u8(vqtbl1_u8(x, low_at), low_shift), vdup_n_u8(15));
    const uint8x8_t upper = vand_u8(vshl_u8(vqtbl1_u8(x, upper_at), upper_shift), vdup_n_u8(48));
    Head256 head;
    head.scale[0] = vmovl_s8(vsub_s8(vreinterpret_s8_u8(vorr_u8(low, upper)), vdup_n_s8(32)));
    return head;
  }
  template <int Half> static inline void values(const std::byte* block, int8x16_t q[8]) {
    for (int s = 0; s < 4; ++s) {
      const int8x16x2_t weights = load_iq4(block + offsetof(BlockIQ4_XS, q) + 64 * Half + 16 * s);
      q[2 * s] = weights.val[0];
      q[2 * s + 1] = weights.val[1];
    }
  }
};

template <class Block> struct NeonBlocks256 {
  using Fields = Fields256<Block>;
  static constexpr int block_weights = 256, block_bytes = sizeof(Block);
  static constexpr int vectors = Fields::sub_weights / 16;  // of a sub-block
  static constexpr int parts = 2 / vectors;                 // eight sub-blocks each, or all
  static constexpr bool min_too = has_min<Block>;

  static inline float32x4_t add_block(float32x4_t acc, float d_y, float32x4_t d, [[maybe_unused]] float32x4_t dmin, int32x4_t isum,
                                      [[maybe_unused]] int32x4_t msum) {
    const float32x4_t sum = vcvtq_f32_s32(isum);
    if constexpr (min_too)
      return vfmaq_f32(acc, vdupq_n_f32(d_y), vfmaq_f32(vnegq_f32(vmulq_f32(dmin, vcvtq_f32_s32(msum))), d, sum));
    else
      return vfmaq_f32(acc, vmulq_f32(vdupq_n_f32(d_y), d), sum);
  }
  static inline float32x4_t load_dmin(const Rows4& rows, size_t offset) {
    if constexpr (min_too) return load_f16_of_rows(rows, offset + offsetof(Block, dmin));
    return vdupq_n_f32(0);
  }
  /// The sums of the sub-blocks' activations.
  static inline void load_sums(const Column& column, int i, int16x8_t sums[parts]) {
    const int16x8_t first = vld1q_s16(column.sums_16 + i / 16), last = vld1q_s16(column.sums_16 + i / 16 + 8);
    if constexpr (parts == 2) sums[0] = first, sums[1] = last;
    else sums[0] = vpaddq_s16(first, last);
  }

  /// Half a block of one row with one column: four sub-blocks at a time become lanes of a sum that their scales multiply.
  template <int Half> [[gnu::always_inline]] static inline int32x4_t add_half(int32x4_t isum, const int8x16_t* q, const int8_t* y, const int32x4_t* scales) {
#pragma GCC unroll 2
    for (int part = 0; part < parts; ++part) {
      int32x4_t sub[4];
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        sub[s] = vdupq_n_s32(0);
#pragma GCC unroll 2
        for (int n = vectors * (4 * part + s); n < vectors * (4 * part + s + 1); ++n)
          sub[s] = add_products(sub[s], q[n], vld1q_s8(y + 128 * Half + 16 * n));
      }
      isum = vmlaq_s32(isum, sum_lanes(sub), scales[parts * Half + part]);
    }
    return isum;
  }

  template <int C> static void rows4(const Rows4& rows, int k, const Column* columns, float32x4_t* products) {
    float32x4_t acc[C];
    for (int c = 0; c < C; ++c) acc[c] = vdupq_n_f32(0);
    size_t at = 0;
    for (int i = 0; i < k; i += 256, at += block_bytes) {
      int32x4_t isum[C][4], msum[C][4];  // lanes are some of a row's sub-blocks
#pragma GCC unroll 1
      for (int r = 0; r < 4; ++r) {
        const size_t ahead = 4 * (rows.stride + at) + tuning::prefetch_bytes;
        prefetch_lines(rows.row[0], ahead + static_cast<size_t>(r * block_bytes), block_bytes);
        const std::byte* block = rows.row[r] + at;
        const Head256 head = Fields::head(block);
        int32x4_t scales[C][2 * parts];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const int16x8_t factors = vld1q_s16(columns[c].factor_32 + i / 32);
          int16x8_t sums[parts];
          if constexpr (min_too) load_sums(columns[c], i, sums);
          msum[c][r] = vdupq_n_s32(0);
#pragma GCC unroll 2
          for (int part = 0; part < parts; ++part) {
            const int16x8_t factor = parts == 1 ? factors : part ? vzip2q_s16(factors, factors) : vzip1q_s16(factors, factors);
            const int16x8_t scaled = vmulq_s16(head.scale[part], factor);
            scales[c][2 * part] = vmovl_s16(vget_low_s16(scaled));
            scales[c][2 * part + 1] = vmovl_high_s16(scaled);
            if constexpr (min_too) {
              msum[c][r] = vmlal_s16(msum[c][r], vget_low_s16(head.min[part]), vget_low_s16(sums[part]));
              msum[c][r] = vmlal_high_s16(msum[c][r], head.min[part], sums[part]);
            }
          }
          isum[c][r] = vdupq_n_s32(0);
        }
        int8x16_t q[8];
        Fields::template values<0>(block, q);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) isum[c][r] = add_half<0>(isum[c][r], q, columns[c].q8_256 + i, scales[c]);
        Fields::template values<1>(block, q);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) isum[c][r] = add_half<1>(isum[c][r], q, columns[c].q8_256 + i, scales[c]);
      }
      const float32x4_t d = load_f16_of_rows(rows, at + offsetof(Block, d)), dmin = load_dmin(rows, at);
      for (int c = 0; c < C; ++c) acc[c] = add_block(acc[c], columns[c].scale_256[i / 256], d, dmin, sum_lanes(isum[c]), sum_lanes(msum[c]));
    }
    for (int c = 0; c < C; ++c) products[c] = acc[c];
  }

#if defined(FERRUM_SIMD_DOTPROD)
  /// One block of eight rows; lanes are rows.
  struct alignas(64) Unpacked {
    Weights8x16 q[16];
    int16x8_t scale[16], min[16];
    float32x4_t d[2], dmin[2];
  };

  /// Eight rows of eight lanes, transposed.
  static inline void transpose(const int16x8_t rows[8], int16x8_t* out) {
    int16x8_t x[8], y[8];
    for (int i = 0; i < 4; ++i) x[2 * i] = vzip1q_s16(rows[i], rows[i + 4]), x[2 * i + 1] = vzip2q_s16(rows[i], rows[i + 4]);
    for (int i = 0; i < 4; ++i) y[2 * i] = vzip1q_s16(x[i], x[i + 4]), y[2 * i + 1] = vzip2q_s16(x[i], x[i + 4]);
    for (int i = 0; i < 4; ++i) out[2 * i] = vzip1q_s16(y[i], y[i + 4]), out[2 * i + 1] = vzip2q_s16(y[i], y[i + 4]);
  }

  static void unpack(const Rows4& low, const Rows4& high, int i, int, Unpacked& out) {
    const size_t at = static_cast<size_t>(i / 256) * block_bytes;
    const Rows4* rows[2] = {&low, &high};
    int8x16_t q[2][8][8];
    int16x8_t scale[parts][8], min[parts][8];
    for (int half = 0; half < 2; ++half)
      for (int r = 0; r < 8; ++r) {
        const std::byte* block = rows[r / 4]->row[r % 4] + at;
        int8x16_t values[8];
        half ? Fields::template values<1>(block, values) : Fields::template values<0>(block, values);
        for (int n = 0; n < 8; ++n) q[half][n][r] = values[n];
      }
    for (int r = 0; r < 8; ++r) {
      const Head256 head = Fields::head(rows[r / 4]->row[r % 4] + at);
      for (int part = 0; part < parts; ++part) {
        scale[part][r] = head.scale[part];
        if constexpr (min_too) min[part][r] = head.min[part];
      }
    }
    for (int n = 0; n < 16; ++n) arrange(q[n / 8][n % 8], out.q[n]);
    for (int part = 0; part < parts; ++part) {
      transpose(scale[part], out.scale + 8 * part);
      if constexpr (min_too) transpose(min[part], out.min + 8 * part);
    }
    for (int h = 0; h < 2; ++h) {
      out.d[h] = load_f16_of_rows(*rows[h], at + offsetof(Block, d));
      if constexpr (min_too) out.dmin[h] = load_dmin(*rows[h], at);
    }
  }

  template <int C> static void tile(const Unpacked& w, int i, int, const Column* columns, float (*sums)[8]) {
    int32x4_t isum[C][2];
    const int8_t* y[C];
    for (int c = 0; c < C; ++c) {
      y[c] = columns[c].q8_256 + i;
      isum[c][0] = isum[c][1] = vdupq_n_s32(0);
    }
#pragma GCC unroll 1
    for (int g = 0; g < 8; ++g) {  // 32 weights, which share a factor
      int32x4_t both[C][2];
#pragma GCC unroll 2
      for (int part = 0; part < parts; ++part) {
        int32x4_t a[C][2];
        tile_products<vectors, C>(w.q + 2 * g + part, y, 32 * g + 16 * part, a);
        const int16x8_t scale = w.scale[parts * g + part];
        const int32x4_t wide[2] = {vmovl_s16(vget_low_s16(scale)), vmovl_high_s16(scale)};
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
          for (int h = 0; h < 2; ++h) both[c][h] = part ? vmlaq_s32(both[c][h], a[c][h], wide[h]) : vmulq_s32(a[c][h], wide[h]);
      }
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const int32_t factor = columns[c].factor_32[i / 32 + g];
        for (int h = 0; h < 2; ++h) isum[c][h] = vmlaq_n_s32(isum[c][h], both[c][h], factor);
      }
    }
    for (int c = 0; c < C; ++c) {
      int32x4_t msum[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
      if constexpr (min_too) {
        int16x8_t in_lanes[parts];
        int16_t y_sums[8 * parts];
        load_sums(columns[c], i, in_lanes);
        for (int part = 0; part < parts; ++part) vst1q_s16(y_sums + 8 * part, in_lanes[part]);
        for (int s = 0; s < 8 * parts; ++s) {
          msum[0] = vmlal_n_s16(msum[0], vget_low_s16(w.min[s]), y_sums[s]);
          msum[1] = vmlal_high_n_s16(msum[1], w.min[s], y_sums[s]);
        }
      }
      for (int h = 0; h < 2; ++h) {
        float* sum = sums[c] + 4 * h;
        vst1q_f32(sum, add_block(vld1q_f32(sum), columns[c].scale_256[i / 256], w.d[h], min_too ? w.dmin[h] : vdupq_n_f32(0), isum[c][h], msum[h]));
      }
    }
  }
#endif
};

template <class Block> void dot_blocks_256(const DotArgs& args) { NeonDot<NeonBlocks256<Block>>::dot(args); }
inline void dot_q2_k(const DotArgs& args) { dot_blocks_256<BlockQ2_K>(args); }
inline void dot_q3_k(const DotArgs& args) { dot_blocks_256<BlockQ3_K>(args); }
inline void dot_q4_k(const DotArgs& args) { dot_blocks_256<BlockQ4_K>(args); }
inline void dot_q5_k(const DotArgs& args) { dot_blocks_256<BlockQ5_K>(args); }
inline void dot_q6_k(const DotArgs& args) { dot_blocks_256<BlockQ6_K>(args); }
inline void dot_iq4_xs(const DotArgs& args) { dot_blocks_256<BlockIQ4_XS>(args); }

#endif
