// Products with Q8_0 weights (BlockQ8_0 in quant_types.h).

inline void dequantize_q8_0(const std::byte* row, int k, float* out) {
  for (int i = 0; i < k; i += 32, row += sizeof(BlockQ8_0)) {
    auto block = load_block<BlockQ8_0>(row);
    F8 d = set1(f16_to_float(block.d));
    for (int j = 0; j < 32; j += 8) store(out + i + j, d * load_i8(block.q + j));
  }
}

#if defined(FERRUM_SIMD_AVX2)

struct Q8_0 {
  static constexpr int block_weights = 32, block_bytes = sizeof(BlockQ8_0), step_weights = 128;
  static constexpr int tile_columns = tuning::tile_columns_q8_0;

  /// |w| . (y with the sign of w), as vpmaddubsw wants an unsigned side: 2 * 128 * 127 = 32512 fits an int16.
  static inline void add_quad(__m256i& isum, __m256i magnitude, __m256i w, __m256i y) {
    __m256i product = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(y, w));
    isum = _mm256_add_epi32(isum, _mm256_madd_epi16(product, _mm256_set1_epi16(1)));
  }
  static inline __m256 add_block(__m256 acc, float d_y, __m256 d, __m256i isum) {
    return _mm256_fmadd_ps(_mm256_mul_ps(d, _mm256_set1_ps(d_y)), _mm256_cvtepi32_ps(isum), acc);
  }

  template <int C> static void rows8(Rows8 rows, int k, const Column* columns, float* const* out) {
    Prefetch prefetch(rows, 8, static_cast<size_t>(k / block_weights) * block_bytes);
    __m256 acc[C];
    for (int c = 0; c < C; ++c) acc[c] = _mm256_setzero_ps();
    for (int i = 0; i < k; i += 32, rows.base += block_bytes) {
      prefetch.to_l2<8 * block_bytes>();
      __m256 d = load_f16_of_rows(rows, 0);
      __m256i isum[C];
      for (int c = 0; c < C; ++c) isum[c] = _mm256_setzero_si256();
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m256i q[4];
        load_quads(rows, static_cast<size_t>(2 + 16 * half), q);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
          __m256i magnitude = _mm256_abs_epi8(q[n]);
          for (int c = 0; c < C; ++c) add_quad(isum[c], magnitude, q[n], broadcast_4(columns[c].q8_32 + i + 16 * half + 4 * n));
        }
      }
      for (int c = 0; c < C; ++c) acc[c] = add_block(acc[c], columns[c].scale_32[i / 32], d, isum[c]);
    }
    for (int c = 0; c < C; ++c) _mm256_storeu_ps(out[c], acc[c]);
  }

  /// Up to four blocks of 16 rows; [2] is rows 0..7 and 8..15, lanes are rows.
  struct alignas(64) Unpacked {
    __m256i q[32][2];  // [k / 4]: four values
    __m256 d[4][2];    // [k / 32]
  };

  static void unpack(Rows8 low, Rows8 high, int n, Prefetch& prefetch, Unpacked& out) {
    for (int b = 0; b < n / 32; ++b) {
      prefetch.to_l2<16 * block_bytes>();
      size_t offset = static_cast<size_t>(b * block_bytes);
      for (int h = 0; h < 2; ++h) {
        Rows8 rows = h ? high : low;
        out.d[b][h] = load_f16_of_rows(rows, offset);
        for (int half = 0; half < 2; ++half) {
          __m256i q[4];
          load_quads(rows, offset + static_cast<size_t>(2 + 16 * half), q);
          for (int j = 0; j < 4; ++j) out.q[8 * b + 4 * half + j][h] = q[j];
        }
      }
    }
  }

  template <int C> static void tile(const Unpacked& w, int n, int i, const Column* columns, float (*sums)[16]) {
    for (int b = 0; b < n / 32; ++b) {
      __m256i isum[C][2];
      for (int c = 0; c < C; ++c) isum[c][0] = isum[c][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j)
        for (int h = 0; h < 2; ++h) {
          __m256i q = w.q[8 * b + j][h], magnitude = _mm256_abs_epi8(q);
          for (int c = 0; c < C; ++c) add_quad(isum[c][h], magnitude, q, broadcast_4(columns[c].q8_32 + i + 32 * b + 4 * j));
        }
      for (int c = 0; c < C; ++c)
        for (int h = 0; h < 2; ++h) {
          float* sum = sums[c] + 8 * h;
          _mm256_store_ps(sum, add_block(_mm256_load_ps(sum), columns[c].scale_32[i / 32 + b], w.d[b][h], isum[c][h]));
        }
    }
  }
};

inline void dot_q8_0(const DotArgs& args) { QuantizedDot<Q8_0>::dot(args); }

#elif !defined(FERRUM_SIMD_NEON)

inline void dot_q8_0(const DotArgs& args) {
  for (int r = 0; r < args.rows; ++r) {
    for (int c = 0; c < args.column_count; ++c) args.out[c][r] = 0;
    const std::byte* at = args.weights + static_cast<size_t>(r) * args.row_bytes;
    for (int b = 0; b < args.k / 32; ++b, at += sizeof(BlockQ8_0)) {
      auto block = load_block<BlockQ8_0>(at);
      float d = f16_to_float(block.d);
      for (int c = 0; c < args.column_count; ++c) {
        const int8_t* y = args.columns[c].q8_32 + 32 * b;
        int isum = 0;
        for (int i = 0; i < 32; ++i) isum += block.q[i] * y[i];
        args.out[c][r] = fma(d * args.columns[c].scale_32[b], static_cast<float>(isum), args.out[c][r]);
      }
    }
  }
}

#endif
