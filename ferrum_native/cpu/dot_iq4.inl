// Products with IQ4_NL and IQ4_XS weights (quant_blocks.h): four bits choose one of sixteen values.

/// Fewer bits for large values, where weights are rare.
constexpr int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/// 32 weights without scale.
inline void unpack_iq4(const uint8_t stored[16], int8_t q[32]) {
  for (int i = 0; i < 16; ++i) {
    q[i] = iq4_values[stored[i] & 15];
    q[16 + i] = iq4_values[stored[i] >> 4];
  }
}
inline void unpack_values_32(const BlockIQ4_NL& block, int8_t q[32]) { unpack_iq4(block.q, q); }

inline void to_plain(const BlockIQ4_XS& block, PlainBlock& out) {
  out.d = f16_to_float(block.d);
  for (int s = 0; s < 8; ++s) {
    const int low = block.scales_low[s / 2] >> (s & 1 ? 4 : 0) & 15, high = block.scales_high >> 2 * s & 3;
    out.scale[2 * s] = out.scale[2 * s + 1] = static_cast<int8_t>((low | high << 4) - 32);
    unpack_iq4(block.q + 16 * s, out.q + 32 * s);
  }
}

#if defined(FERRUM_SIMD_AVX2)

inline __m256i iq4_table() { return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(iq4_values))); }

/// Sixteen bytes of eight rows as 32 weights: out[n] holds weights 4 n..4 n + 3, lanes are rows.
inline void load_iq4(Rows8 rows, size_t offset, __m256i out[8]) {
  const __m256i four = _mm256_set1_epi8(15), table = iq4_table();
  __m256i q[4];
  load_quads(rows, offset, q);
  for (int n = 0; n < 4; ++n) {
    out[n] = _mm256_shuffle_epi8(table, _mm256_and_si256(q[n], four));
    out[4 + n] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(q[n], 4), four));
  }
}

struct IQ4_NL {
  static constexpr int block_weights = 32, block_bytes = sizeof(BlockIQ4_NL), step_weights = Q8_0::step_weights;
  static constexpr int tile_columns = tuning::tile_columns_iq4;

  template <int C> static void rows8(Rows8 rows, int k, const Column* columns, float* const* out) {
    Prefetch prefetch(rows, 8, static_cast<size_t>(k / block_weights) * block_bytes);
    __m256 acc[C];
    for (int c = 0; c < C; ++c) acc[c] = _mm256_setzero_ps();
    for (int i = 0; i < k; i += 32, rows.base += block_bytes) {
      prefetch.to_l2<8 * block_bytes>();
      const __m256 d = load_f16_of_rows(rows, 0);
      __m256i q[8], isum[C];
      load_iq4(rows, offsetof(BlockIQ4_NL, q), q);
      for (int c = 0; c < C; ++c) isum[c] = _mm256_setzero_si256();
#pragma GCC unroll 8
      for (int n = 0; n < 8; ++n) {
        const __m256i magnitude = _mm256_abs_epi8(q[n]);
        for (int c = 0; c < C; ++c) Q8_0::add_quad(isum[c], magnitude, q[n], broadcast_4(columns[c].q8_32 + i + 4 * n));
      }
      for (int c = 0; c < C; ++c) acc[c] = Q8_0::add_block(acc[c], columns[c].scale_32[i / 32], d, isum[c]);
    }
    for (int c = 0; c < C; ++c) _mm256_storeu_ps(out[c], acc[c]);
  }

  using Unpacked = Q8_0::Unpacked;
  static void unpack(Rows8 low, Rows8 high, int n, Prefetch& prefetch, Unpacked& out) {
    for (int b = 0; b < n / 32; ++b) {
      prefetch.to_l2<16 * block_bytes>();
      const size_t offset = static_cast<size_t>(b * block_bytes);
      for (int h = 0; h < 2; ++h) {
        const Rows8 rows = h ? high : low;
        out.d[b][h] = load_f16_of_rows(rows, offset);
        __m256i q[8];
        load_iq4(rows, offset + offsetof(BlockIQ4_NL, q), q);
        for (int j = 0; j < 8; ++j) out.q[8 * b + j][h] = q[j];
      }
    }
  }
  template <int C> static void tile(const Unpacked& w, int n, int i, const Column* columns, float (*sums)[16]) { Q8_0::tile<C>(w, n, i, columns, sums); }
};

struct IQ4_XS {
  static constexpr int block_weights = 256, block_bytes = sizeof(BlockIQ4_XS), step_weights = 256;
  static constexpr int tile_columns = tuning::tile_columns_iq4;

  /// Of eight blocks, lanes are rows; the bytes of scale[g] are sub-blocks 4 g..4 g + 3.
  struct Head {
    __m256 d;
    __m256i scale[2];
  };
  static inline Head load_head(Rows8 rows) {
    __m256i x[4];
    load_quads(rows, 0, x);  // d and scales_high, scales_low
    Head head;
    __m256 unused;
    load_f16_pairs(x[0], head.d, unused);
    for (int g = 0; g < 2; ++g) {
      // Sub-block 4 g + j: bits 2 j of byte g of scales_high, a nibble of byte 2 g + j / 2 of scales_low.
      const __m256i both = _mm256_shuffle_epi8(x[1], lane_bytes(2 * g, 2 * g, 2 * g + 1, 2 * g + 1)), high = _mm256_shuffle_epi8(x[0], lane_bytes(2 + g, 2 + g, 2 + g, 2 + g));
      const __m256i four = _mm256_or_si256(masked(both, 0x000f000f), masked(_mm256_srli_epi16(both, 4), 0x0f000f00));
      const __m256i first = _mm256_or_si256(masked(_mm256_slli_epi32(high, 4), 0x30), masked(_mm256_slli_epi32(high, 2), 0x3000));
      const __m256i last = _mm256_or_si256(masked(high, 0x300000), masked(_mm256_srli_epi32(high, 2), 0x30000000));
      head.scale[g] = _mm256_sub_epi8(_mm256_or_si256(four, _mm256_or_si256(first, last)), _mm256_set1_epi8(32));
    }
    return head;
  }
  static inline __m256i scale(const Head& head, int s) { return _mm256_srai_epi16(_mm256_shuffle_epi8(head.scale[s / 4], lane_bytes_as_high(s & 3, s & 3)), 8); }

  /// The products of magnitudes below 128 fit an int16, as those of Q8_0; `scaled` is scale and factor.
  static inline void add_quad(__m256i& isum, __m256i magnitude, __m256i w, __m256i y, __m256i scaled) {
    const __m256i product = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(y, w));
    isum = _mm256_add_epi32(isum, _mm256_madd_epi16(product, scaled));
  }
  static inline __m256 add_block(__m256 acc, float d_y, __m256 d, __m256i isum) {
    return _mm256_fmadd_ps(_mm256_mul_ps(_mm256_set1_ps(d_y), d), _mm256_cvtepi32_ps(isum), acc);
  }

  template <int C> static void rows8(Rows8 rows, int k, const Column* columns, float* const* out) {
    Prefetch prefetch(rows, 8, static_cast<size_t>(k / block_weights) * block_bytes);
    __m256 acc[C];
    for (int c = 0; c < C; ++c) acc[c] = _mm256_setzero_ps();
    for (int i = 0; i < k; i += 256, rows.base += block_bytes) {
      prefetch.next_block<block_bytes>();
      const Head head = load_head(rows);
      __m256i isum[C];
      for (int c = 0; c < C; ++c) isum[c] = _mm256_setzero_si256();
#pragma GCC unroll 8
      for (int s = 0; s < 8; ++s) {
        prefetch.to_l2<block_bytes>();
        prefetch.to_l1<block_bytes>(s);
        __m256i q[8], scaled[C];
        load_iq4(rows, offsetof(BlockIQ4_XS, q) + 16 * static_cast<size_t>(s), q);
        for (int c = 0; c < C; ++c) scaled[c] = _mm256_mullo_epi16(scale(head, s), broadcast_2(columns[c].factor_32 + i / 32 + s));
#pragma GCC unroll 8
        for (int n = 0; n < 8; ++n) {
          const __m256i magnitude = _mm256_abs_epi8(q[n]);
          for (int c = 0; c < C; ++c) add_quad(isum[c], magnitude, q[n], broadcast_4(columns[c].q8_256 + i + 32 * s + 4 * n), scaled[c]);
        }
      }
      for (int c = 0; c < C; ++c) acc[c] = add_block(acc[c], columns[c].scale_256[i / 256], head.d, isum[c]);
    }
    for (int c = 0; c < C; ++c) _mm256_storeu_ps(out[c], acc[c]);
  }

  /// One block of 16 rows; [2] is rows 0..7 and 8..15, lanes are rows.
  struct alignas(64) Unpacked {
    __m256i q[64][2];     // [k / 4]: four values
    __m256i scale[8][2];  // twice as int16
    __m256 d[2];
  };
  static void unpack(Rows8 low, Rows8 high, int, Prefetch& prefetch, Unpacked& out) {
    prefetch.next_block<block_bytes>();
    for (int r = 0; r < 16; ++r) prefetch.to_l1<block_bytes>(r);
    for (int h = 0; h < 2; ++h) {
      const Rows8 rows = h ? high : low;
      const Head head = load_head(rows);
      out.d[h] = head.d;
      for (int s = 0; s < 8; ++s) {
        __m256i q[8];
        load_iq4(rows, offsetof(BlockIQ4_XS, q) + 16 * static_cast<size_t>(s), q);
        for (int n = 0; n < 8; ++n) out.q[8 * s + n][h] = q[n];
        out.scale[s][h] = scale(head, s);
      }
      prefetch.to_l2<8 * block_bytes>();
    }
  }

  template <int C> static void tile(const Unpacked& w, int, int i, const Column* columns, float (*sums)[16]) {
    __m256i isum[C][2];
    for (int c = 0; c < C; ++c) isum[c][0] = isum[c][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int s = 0; s < 8; ++s)
      for (int h = 0; h < 2; ++h) {
        __m256i scaled[C];
        for (int c = 0; c < C; ++c) scaled[c] = _mm256_mullo_epi16(w.scale[s][h], broadcast_2(columns[c].factor_32 + i / 32 + s));
#pragma GCC unroll 8
        for (int n = 8 * s; n < 8 * s + 8; ++n) {
          const __m256i q = w.q[n][h], magnitude = _mm256_abs_epi8(q);
          for (int c = 0; c < C; ++c) add_quad(isum[c][h], magnitude, q, broadcast_4(columns[c].q8_256 + i + 4 * n), scaled[c]);
        }
      }
    for (int c = 0; c < C; ++c)
      for (int h = 0; h < 2; ++h) {
        float* sum = sums[c] + 8 * h;
        _mm256_store_ps(sum, add_block(_mm256_load_ps(sum), columns[c].scale_256[i / 256], w.d[h], isum[c][h]));
      }
  }

 private:
  static inline __m256i masked(__m256i x, int bits) { return _mm256_and_si256(x, _mm256_set1_epi32(bits)); }
  /// Shuffle control that gives each lane of 4 bytes these of its bytes.
  static inline __m256i lane_bytes(int a, int b, int c, int d) {
    auto lane = [=](int i) { return 0x04040404 * i + (a | b << 8 | c << 16 | d << 24); };
    return _mm256_setr_epi32(lane(0), lane(1), lane(2), lane(3), lane(0), lane(1), lane(2), lane(3));
  }
};

inline void dot_iq4_nl(const DotArgs& args) { QuantizedDot<IQ4_NL>::dot(args); }
inline void dot_iq4_xs(const DotArgs& args) { QuantizedDot<IQ4_XS>::dot(args); }

#elif !defined(FERRUM_SIMD_NEON)

inline void dot_iq4_nl(const DotArgs& args) { dot_blocks_32<BlockIQ4_NL>(args); }
inline void dot_iq4_xs(const DotArgs& args) { dot_sub_blocks<BlockIQ4_XS>(args); }

#endif
