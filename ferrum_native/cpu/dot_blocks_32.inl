// Products with Q4_0, Q4_1, Q5_0 and Q5_1 weights (quant_blocks.h): 32 weights of four or five bits, with a minimum `m` or around the middle.

template <class Block> struct Fields32 {
  static constexpr bool has_min = requires(Block block) { block.m; }, has_high = requires(Block block) { block.high; };
  static constexpr int middle = has_min ? 0 : has_high ? 16 : 8;
};

inline void unpack_values_32(const BlockIQ4_NL& block, int8_t q[32]);  // in dot_iq4.inl

/// The weights of a block without scale and minimum.
template <class Block> void unpack_values_32(const Block& block, int8_t q[32]) {
  using Fields = Fields32<Block>;
  for (int i = 0; i < 32; ++i) {
    int value = block.q[i % 16] >> (i < 16 ? 0 : 4) & 15;
    if constexpr (Fields::has_high) value |= (block.high[i / 8] >> i % 8 & 1) << 4;
    q[i] = static_cast<int8_t>(value - Fields::middle);
  }
}

template <class Block> void dequantize_blocks_32(const std::byte* row, int k, float* out) {
  for (int i = 0; i < k; i += 32, row += sizeof(Block)) {
    const auto block = load_block<Block>(row);
    int8_t q[32];
    unpack_values_32(block, q);
    const F8 d = set1(f16_to_float(block.d));
    for (int j = 0; j < 32; j += 8) {
      if constexpr (Fields32<Block>::has_min)
        store(out + i + j, fma(d, load_i8(q + j), set1(f16_to_float(block.m))));
      else
        store(out + i + j, d * load_i8(q + j));
    }
  }
}

#if defined(FERRUM_SIMD_AVX2)

/// The sum of 32 activations, in all lanes.
inline __m256i sum_of_32(const int8_t* y) {
  __m256i x = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), load_256(y)), _mm256_set1_epi16(1));
  x = _mm256_add_epi32(x, _mm256_permute2x128_si256(x, x, 1));
  x = _mm256_add_epi32(x, _mm256_shuffle_epi32(x, 0x4e));
  return _mm256_add_epi32(x, _mm256_shuffle_epi32(x, 0xb1));
}

template <class Block> struct Blocks32 {
  using Fields = Fields32<Block>;
  static constexpr int block_weights = 32, block_bytes = sizeof(Block), step_weights = 128;
  static constexpr int tile_columns = tuning::tile_columns_blocks_32;
  /// vpmaddubsw whose sum fits an int16: 8 * 2 * 15 * 127 = 30480, 4 * 2 * 31 * 127 = 31496.
  static constexpr int quads_in_sum = Fields::has_high ? 4 : 8;

  /// Of eight blocks, lanes are rows; `high` are the fifth bits.
  struct Head {
    __m256 d, m;
    __m256i high;
  };
  static inline Head load_head(Rows8 rows, size_t offset) {
    Head head;
    if constexpr (!Fields::has_min && !Fields::has_high) {
      head.d = load_f16_of_rows(rows, offset);
      return head;
    }
    __m256i x[4];
    load_quads(rows, offset, x);
    load_f16_pairs(x[0], head.d, head.m);
    head.high = Fields::has_min ? x[1] : _mm256_or_si256(_mm256_srli_epi32(x[0], 16), _mm256_slli_epi32(x[1], 16));
    return head;
  }

  /// Weights 4 n..4 n + 3 without the middle taken off.
  static inline __m256i values(const __m256i q[4], const Head& head, int n) {
    const __m256i low = _mm256_and_si256(n < 4 ? q[n] : _mm256_srli_epi16(q[n - 4], 4), _mm256_set1_epi8(15));
    if constexpr (!Fields::has_high) return low;
    // Two quads share a byte of fifth bits; a single bit of 1, 2, 4, 8 or of 16, 32, 64, 128 becomes 16.
    auto byte = [=](int lane) { return 0x01010101 * (4 * lane + n / 2); };
    const __m256i byte_of_quad = _mm256_setr_epi32(byte(0), byte(1), byte(2), byte(3), byte(0), byte(1), byte(2), byte(3));
    const __m256i bits = _mm256_shuffle_epi8(head.high, byte_of_quad);
    if (n & 1) return _mm256_or_si256(low, _mm256_min_epu8(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0x80402010))), _mm256_set1_epi8(16)));
    const __m256i as_16 = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 16, 16, 0, 16, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0));
    return _mm256_or_si256(low, _mm256_shuffle_epi8(as_16, _mm256_and_si256(bits, _mm256_set1_epi32(0x08040201))));
  }

  static inline __m256 add_block(__m256 acc, float d_y, __m256 d, __m256 m, __m256i isum, __m256i y_sum) {
    if constexpr (Fields::has_min) {
      const __m256 value = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(isum), _mm256_mul_ps(m, _mm256_cvtepi32_ps(y_sum)));
      return _mm256_fmadd_ps(_mm256_set1_ps(d_y), value, acc);
    }
    isum = _mm256_sub_epi32(isum, _mm256_slli_epi32(y_sum, Fields::has_high ? 4 : 3));
    return _mm256_fmadd_ps(_mm256_mul_ps(d, _mm256_set1_ps(d_y)), _mm256_cvtepi32_ps(isum), acc);
  }

  template <int C> static void rows8(Rows8 rows, int k, const Column* columns, float* const* out) {
    Prefetch prefetch(rows, 8, static_cast<size_t>(k / block_weights) * block_bytes);
    __m256 acc[C];
    for (int c = 0; c < C; ++c) acc[c] = _mm256_setzero_ps();
    for (int i = 0; i < k; i += 32, rows.base += block_bytes) {
      prefetch.to_l2<8 * block_bytes>();
      const Head head = load_head(rows, 0);
      __m256i q[4], sum[C], isum[C];
      load_quads(rows, offsetof(Block, q), q);
#pragma GCC unroll 8
      for (int n = 0; n < 8; ++n) {
        const __m256i value = values(q, head, n);
        for (int c = 0; c < C; ++c) {
          const __m256i y = broadcast_4(columns[c].q8_32 + i + 4 * n);
          if (n % quads_in_sum == 0) {
            if (n > 0) isum[c] = _mm256_madd_epi16(sum[c], _mm256_set1_epi16(1));
            sum[c] = _mm256_maddubs_epi16(value, y);
          } else {
            add_products_i16(sum[c], value, y);
          }
        }
      }
      for (int c = 0; c < C; ++c) {
        const __m256i last = _mm256_madd_epi16(sum[c], _mm256_set1_epi16(1));
        isum[c] = quads_in_sum == 8 ? last : _mm256_add_epi32(isum[c], last);
        acc[c] = add_block(acc[c], columns[c].scale_32[i / 32], head.d, head.m, isum[c], sum_of_32(columns[c].q8_32 + i));
      }
    }
    for (int c = 0; c < C; ++c) _mm256_storeu_ps(out[c], acc[c]);
  }

  /// Up to four blocks of 16 rows; [2] is rows 0..7 and 8..15, lanes are rows.
  struct alignas(64) Unpacked {
    __m256i q[32][2];        // [k / 4]: four values
    __m256 d[4][2], m[4][2]; // [k / 32]
  };

  static void unpack(Rows8 low, Rows8 high, int n, Prefetch& prefetch, Unpacked& out) {
    for (int b = 0; b < n / 32; ++b) {
      prefetch.to_l2<16 * block_bytes>();
      const size_t offset = static_cast<size_t>(b * block_bytes);
      for (int h = 0; h < 2; ++h) {
        const Rows8 rows = h ? high : low;
        const Head head = load_head(rows, offset);
        out.d[b][h] = head.d;
        if constexpr (Fields::has_min) out.m[b][h] = head.m;
        __m256i q[4];
        load_quads(rows, offset + offsetof(Block, q), q);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) out.q[8 * b + j][h] = values(q, head, j);
      }
    }
  }

  template <int C> static void tile(const Unpacked& w, int n, int i, const Column* columns, float (*sums)[16]) {
    for (int b = 0; b < n / 32; ++b) {
      __m256i sum[C][2], isum[C][2];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const __m256i y = broadcast_4(columns[c].q8_32 + i + 32 * b + 4 * j);
          for (int h = 0; h < 2; ++h) {
            const __m256i q = w.q[8 * b + j][h];
            if (j % quads_in_sum == 0) {
              if (j > 0) isum[c][h] = _mm256_madd_epi16(sum[c][h], _mm256_set1_epi16(1));
              sum[c][h] = _mm256_maddubs_epi16(q, y);
            } else {
              add_products_i16(sum[c][h], q, y);
            }
          }
        }
      for (int c = 0; c < C; ++c) {
        const __m256i y_sum = sum_of_32(columns[c].q8_32 + i + 32 * b);
        for (int h = 0; h < 2; ++h) {
          const __m256i last = _mm256_madd_epi16(sum[c][h], _mm256_set1_epi16(1));
          isum[c][h] = quads_in_sum == 8 ? last : _mm256_add_epi32(isum[c][h], last);
          float* at = sums[c] + 8 * h;
          _mm256_store_ps(at, add_block(_mm256_load_ps(at), columns[c].scale_32[i / 32 + b], w.d[b][h], w.m[b][h], isum[c][h], y_sum));
        }
      }
    }
  }
};

template <class Block> void dot_blocks_32(const DotArgs& args) { QuantizedDot<Blocks32<Block>>::dot(args); }

#elif !defined(FERRUM_SIMD_NEON)

template <class Block> void dot_blocks_32(const DotArgs& args) {
  for (int r = 0; r < args.rows; ++r) {
    for (int c = 0; c < args.column_count; ++c) args.out[c][r] = 0;
    const std::byte* at = args.weights + static_cast<size_t>(r) * args.row_bytes;
    for (int b = 0; b < args.k / 32; ++b, at += sizeof(Block)) {
      const auto block = load_block<Block>(at);
      const float d = f16_to_float(block.d);
      int8_t q[32];
      unpack_values_32(block, q);
      for (int c = 0; c < args.column_count; ++c) {
        const int8_t* y = args.columns[c].q8_32 + 32 * b;
        const float d_y = args.columns[c].scale_32[b];
        int isum = 0, y_sum = 0;
        for (int i = 0; i < 32; ++i) isum += q[i] * y[i], y_sum += y[i];
        float& out = args.out[c][r];
        if constexpr (Fields32<Block>::has_min)
          out = fma(d_y, fma(d, static_cast<float>(isum), f16_to_float(block.m) * static_cast<float>(y_sum)), out);
        else
          out = fma(d * d_y, static_cast<float>(isum), out);
      }
    }
  }
}

#endif
