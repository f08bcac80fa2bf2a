// Products with Q6_K weights (BlockQ6_K in quant_types.h).

/// q - 32, in -32..31.
inline void unpack_values(const BlockQ6_K& block, int8_t q[256]) {
  for (int half = 0; half < 2; ++half)
    for (int group = 0; group < 4; ++group)
      for (int i = 0; i < 32; ++i) {
        int low = block.ql[64 * half + 32 * (group & 1) + i] >> (group < 2 ? 0 : 4) & 15;
        int high = block.qh[32 * half + i] >> 2 * group & 3;
        q[128 * half + 32 * group + i] = static_cast<int8_t>((low | high << 4) - 32);
      }
}

inline void dequantize_q6_k(const std::byte* row, int k, float* out) {
  for (int i = 0; i < k; i += 256, row += sizeof(BlockQ6_K)) {
    auto block = load_block<BlockQ6_K>(row);
    int8_t q[256];
    unpack_values(block, q);
    F8 d = set1(f16_to_float(block.d));
    for (int j = 0; j < 256; j += 8) store(out + i + j, (d * set1(block.scales[j / 16])) * load_i8(q + j));
  }
}

#if defined(FERRUM_SIMD_AVX2)

struct Q6_K {
  static constexpr int block_weights = 256, block_bytes = sizeof(BlockQ6_K), step_weights = 256;
  static constexpr int tile_columns = tuning::tile_columns_q6_k;
  static constexpr size_t qh_offset = offsetof(BlockQ6_K, qh), scales_offset = offsetof(BlockQ6_K, scales), d_offset = offsetof(BlockQ6_K, d);

  /// Signed bytes `first` and `second` of each lane as a pair of int16.
  static inline __m256i scale_pair(__m256i scales, int first, int second) {
    return _mm256_srai_epi16(_mm256_shuffle_epi8(scales, lane_bytes_as_high(first, second)), 8);
  }
  /// Four values of group 0..3, as in the comment of BlockQ6_K: unsigned bytes 0..63.
  template <int Group> static inline __m256i values(__m256i ql, __m256i qh) {
    const __m256i four = _mm256_set1_epi8(15), upper_two = _mm256_set1_epi8(48);
    __m256i low = _mm256_and_si256(Group < 2 ? ql : _mm256_srli_epi16(ql, 4), four);
    __m256i high = Group == 0 ? _mm256_slli_epi16(qh, 4) : Group == 1 ? _mm256_slli_epi16(qh, 2) : Group == 2 ? qh : _mm256_srli_epi16(qh, 2);
    return _mm256_or_si256(low, _mm256_and_si256(high, upper_two));
  }

  /// The unsigned products of one group of a 16-quad: two vpmaddubsw (4 * 63 * 127 = 32004) fit an int16.
  template <int Group, int C>
  static inline void add_group(const __m256i ql[4], const __m256i qh[4], __m256i scale, const int8_t* const* y, const int16_t* const* factors, int offset, __m256i* isum) {
    __m256i q0 = values<Group>(ql[0], qh[0]), q1 = values<Group>(ql[1], qh[1]), q2 = values<Group>(ql[2], qh[2]), q3 = values<Group>(ql[3], qh[3]);
    for (int c = 0; c < C; ++c) {
      const int8_t* at = y[c] + offset;
      __m256i first = _mm256_maddubs_epi16(q0, broadcast_4(at)), second = _mm256_maddubs_epi16(q2, broadcast_4(at + 8));
      add_products_i16(first, q1, broadcast_4(at + 4));
      add_products_i16(second, q3, broadcast_4(at + 12));
      __m256i scaled = _mm256_mullo_epi16(scale, broadcast_2(factors[c] + offset / 32));
      isum[c] = _mm256_add_epi32(isum[c], _mm256_add_epi32(_mm256_madd_epi16(scaled, first), _mm256_madd_epi16(scaled, second)));
    }
  }

  /// Eight rows and one column with lanes along k: no transposition, one horizontal sum of integers per block and row.
  static void rows8_one(Rows8 rows, int k, const Column& column, float* out) {
    Prefetch prefetch(rows, 8, static_cast<size_t>(k / block_weights) * block_bytes);
    const __m128i evens_odds = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    __m256 acc = _mm256_setzero_ps();
    for (int i = 0; i < k; i += 256, rows.base += block_bytes) {
      prefetch.next_block<block_bytes>();
      const int8_t* y = column.q8_256 + i;
      const __m256i y_sums = load_256(column.sums_16 + i / 16), factors = broadcast_16(column.factor_32 + i / 32);
      __m256i isum[8];
#pragma GCC unroll 1
      for (int r = 0; r < 8; ++r) {
        const std::byte* block = rows.row(r);
        prefetch.to_l2<block_bytes>();
        prefetch.to_l1<block_bytes>(r);
        __m128i scales = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + scales_offset));
        __m256i sum = _mm256_slli_epi32(_mm256_madd_epi16(_mm256_cvtepi8_epi16(scales), y_sums), 5);
        sum = _mm256_sub_epi32(_mm256_setzero_si256(), sum);
        // Low half: scales of the first 16 of each group of 32, high half: of the second 16.
        const __m256i scale = _mm256_mullo_epi16(_mm256_cvtepi8_epi16(_mm_shuffle_epi8(scales, evens_odds)), factors);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i low = load_256(block + 64 * half), high = load_256(block + 64 * half + 32), qh = load_256(block + qh_offset + 32 * half);
          auto add = [&](__m256i q, int group) {
            const int j = 4 * half + group;
            __m256i product = _mm256_maddubs_epi16(q, load_256(y + 32 * j));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(product, _mm256_shuffle_epi8(scale, _mm256_set1_epi16(static_cast<int16_t>(2 * j | (2 * j + 1) << 8)))));
          };
          add(values<0>(low, qh), 0);
          add(values<1>(high, qh), 1);
          add(values<2>(low, qh), 2);
          add(values<3>(high, qh), 3);
        }
        isum[r] = sum;
      }
      acc = add_block(acc, column.scale_256[i / 256], load_f16_of_rows(rows, d_offset), sum_lanes(isum));
    }
    _mm256_storeu_ps(out, acc);
  }

  template <int C> static void rows8(Rows8 rows, int k, const Column* columns, float* const* out) {
    if constexpr (C == 1) return rows8_one(rows, k, columns[0], out[0]);
    Prefetch prefetch(rows, 8, static_cast<size_t>(k / block_weights) * block_bytes);
    __m256 acc[C];
    for (int c = 0; c < C; ++c) acc[c] = _mm256_setzero_ps();
    for (int i = 0; i < k; i += 256, rows.base += block_bytes) {
      prefetch.next_block<block_bytes>();
      __m256i scales[4];  // bytes are the scales of sub-blocks 4 g..4 g + 3
      load_quads(rows, scales_offset, scales);
      const int8_t* y[C];
      const int16_t* factors[C];
      __m256i isum[C];
      for (int c = 0; c < C; ++c) {
        y[c] = columns[c].q8_256 + i;
        factors[c] = columns[c].factor_32 + i / 32;
        isum[c] = _mm256_setzero_si256();
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        __m256i pair = scale_pair(scales[j / 2], 2 * (j & 1), 2 * (j & 1) + 1);
        for (int c = 0; c < C; ++c) isum[c] = _mm256_add_epi32(isum[c], _mm256_madd_epi16(pair, broadcast_4(columns[c].sums_16 + i / 16 + 2 * j)));
      }
      for (int c = 0; c < C; ++c) isum[c] = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(isum[c], 5));
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part) {
          prefetch.to_l2<8 * block_bytes / 4>();
          prefetch.to_l1<block_bytes>(4 * half + 2 * part);
          prefetch.to_l1<block_bytes>(4 * half + 2 * part + 1);
          __m256i ql[4], qh[4];
          load_quads(rows, qh_offset + static_cast<size_t>(32 * half + 16 * part), qh);
          int offset = 128 * half + 16 * part;
          load_quads(rows, static_cast<size_t>(64 * half + 16 * part), ql);
          add_group<0, C>(ql, qh, scale_pair(scales[2 * half], part, part), y, factors, offset, isum);
          add_group<2, C>(ql, qh, scale_pair(scales[2 * half + 1], part, part), y, factors, offset + 64, isum);
          load_quads(rows, static_cast<size_t>(64 * half + 32 + 16 * part), ql);
          add_group<1, C>(ql, qh, scale_pair(scales[2 * half], 2 + part, 2 + part), y, factors, offset + 32, isum);
          add_group<3, C>(ql, qh, scale_pair(scales[2 * half + 1], 2 + part, 2 + part), y, factors, offset + 96, isum);
        }
      __m256 d = load_f16_of_rows(rows, d_offset);
      for (int c = 0; c < C; ++c) acc[c] = add_block(acc[c], columns[c].scale_256[i / 256], d, isum[c]);
    }
    for (int c = 0; c < C; ++c) _mm256_storeu_ps(out[c], acc[c]);
  }

  static inline __m256 add_block(__m256 acc, float d_y, __m256 d, __m256i isum) {
    return _mm256_fmadd_ps(_mm256_mul_ps(_mm256_set1_ps(d_y), d), _mm256_cvtepi32_ps(isum), acc);
  }

  /// One block of 16 rows; [2] is rows 0..7 and 8..15, lanes are rows.
  struct alignas(64) Unpacked {
    __m256i q[64][2];            // [k / 4]: four values, 0..63
    __m256i scale[16][2];        // twice as int16
    __m256i scale_pairs[8][2];   // of sub-blocks 2 j and 2 j + 1 as int16
    __m256 d[2];
  };

  static void unpack(Rows8 low, Rows8 high, int, Prefetch& prefetch, Unpacked& out) {
    prefetch.next_block<block_bytes>();
    for (int r = 0; r < 16; ++r) prefetch.to_l1<block_bytes>(r);
    unpack_rows8(low, 0, out);
    prefetch.to_l2<8 * block_bytes>();
    unpack_rows8(high, 1, out);
    prefetch.to_l2<8 * block_bytes>();
  }
  static inline void unpack_rows8(Rows8 rows, int h, Unpacked& out) {
    __m256i scales[4];
    load_quads(rows, scales_offset, scales);
    for (int s = 0; s < 16; ++s) out.scale[s][h] = scale_pair(scales[s / 4], s & 3, s & 3);
    for (int j = 0; j < 8; ++j) out.scale_pairs[j][h] = scale_pair(scales[j / 2], 2 * (j & 1), 2 * (j & 1) + 1);
    for (int half = 0; half < 2; ++half)
      for (int part = 0; part < 2; ++part) {
        __m256i low[4], high[4], qh[4];
        load_quads(rows, static_cast<size_t>(64 * half + 16 * part), low);
        load_quads(rows, static_cast<size_t>(64 * half + 32 + 16 * part), high);
        load_quads(rows, qh_offset + static_cast<size_t>(32 * half + 16 * part), qh);
        for (int n = 0; n < 4; ++n) {
          auto* quad = out.q + 32 * half + 4 * part + n;
          quad[0][h] = values<0>(low[n], qh[n]);
          quad[8][h] = values<1>(high[n], qh[n]);
          quad[16][h] = values<2>(low[n], qh[n]);
          quad[24][h] = values<3>(high[n], qh[n]);
        }
      }
    out.d[h] = load_f16_of_rows(rows, d_offset);
  }

  template <int C> static void tile(const Unpacked& w, int, int i, const Column* columns, float (*sums)[16]) {
    __m256i isum[C][2];
    const int8_t* y[C];
    for (int c = 0; c < C; ++c) {
      y[c] = columns[c].q8_256 + i;
      for (int h = 0; h < 2; ++h) {
        __m256i sum = _mm256_setzero_si256();
        for (int j = 0; j < 8; ++j) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w.scale_pairs[j][h], broadcast_4(columns[c].sums_16 + i / 16 + 2 * j)));
        isum[c][h] = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(sum, 5));
      }
    }
#pragma GCC unroll 1
    for (int s = 0; s < 16; ++s)
#pragma GCC unroll 2
      for (int n = 4 * s; n < 4 * s + 4; n += 2)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          __m256i first = broadcast_4(y[c] + 4 * n), second = broadcast_4(y[c] + 4 * n + 4), factor = broadcast_2(columns[c].factor_32 + i / 32 + s / 2);
          for (int h = 0; h < 2; ++h) {
            __m256i a = _mm256_maddubs_epi16(w.q[n][h], first);
            add_products_i16(a, w.q[n + 1][h], second);
            isum[c][h] = _mm256_add_epi32(isum[c][h], _mm256_madd_epi16(_mm256_mullo_epi16(w.scale[s][h], factor), a));
          }
        }
    for (int c = 0; c < C; ++c)
      for (int h = 0; h < 2; ++h) {
        float* sum = sums[c] + 8 * h;
        _mm256_store_ps(sum, add_block(_mm256_load_ps(sum), columns[c].scale_256[i / 256], w.d[h], isum[c][h]));
      }
  }
};

#if defined(FERRUM_SIMD_AVX512)

struct Q6_K16 {
  static constexpr int block_weights = 256, block_bytes = sizeof(BlockQ6_K);

  /// One block of 16 rows, lanes are rows.
  struct alignas(64) Unpacked {
    __m512i q[64];           // [k / 4]: four values, 0..63
    __m512i scale[16];       // int32
    __m512i scale_pairs[8];  // of sub-blocks 2 j and 2 j + 1 as int16
    __m512 d;
  };

  /// Eight quads of group 0..3, as in the comment of BlockQ6_K: unsigned bytes 0..63.
  template <int Group> [[gnu::always_inline]] static inline void unpack_group(const __m512i* ql, const __m512i* qh, __m512i* out) {
    const __m512i four = _mm512_set1_epi8(15), upper_two = _mm512_set1_epi8(48);
    for (int n = 0; n < 8; ++n) {
      const __m512i low = _mm512_and_si512(Group < 2 ? ql[n] : _mm512_srli_epi16(ql[n], 4), four);
      const __m512i high = Group == 0 ? _mm512_slli_epi16(qh[n], 4) : Group == 1 ? _mm512_slli_epi16(qh[n], 2) : Group == 2 ? qh[n] : _mm512_srli_epi16(qh[n], 2);
      out[n] = _mm512_ternarylogic_epi32(low, high, upper_two, 0xf8);  // low | (high & upper_two)
    }
  }

  static void unpack(Rows16 rows, Unpacked& out) {
    __m512i scales[4], last[4];  // bytes are the scales of sub-blocks 4 g..4 g + 3; the last four bytes of a block end with d
    load_quads(rows, offsetof(BlockQ6_K, scales), scales);
    load_quads(rows, sizeof(BlockQ6_K) - 16, last);
    out.d = low_f16_of_lanes(_mm512_srli_epi32(last[3], 16));
    for (int g = 0; g < 4; ++g) {
      for (int b = 0; b < 4; ++b) out.scale[4 * g + b] = _mm512_srai_epi32(_mm512_slli_epi32(scales[g], static_cast<unsigned>(24 - 8 * b)), 24);
      for (int j = 0; j < 2; ++j)
        out.scale_pairs[2 * g + j] = _mm512_srai_epi16(_mm512_shuffle_epi8(scales[g], _mm512_broadcast_i64x4(lane_bytes_as_high(2 * j, 2 * j + 1))), 8);
    }
    for (int half = 0; half < 2; ++half) {
      __m512i low[8], high[8], qh[8], *q = out.q + 32 * half;
      load_octs(rows, static_cast<size_t>(64 * half), low);
      load_octs(rows, static_cast<size_t>(64 * half + 32), high);
      load_octs(rows, offsetof(BlockQ6_K, qh) + static_cast<size_t>(32 * half), qh);
      unpack_group<0>(low, qh, q);
      unpack_group<1>(high, qh, q + 8);
      unpack_group<2>(low, qh, q + 16);
      unpack_group<3>(high, qh, q + 24);
    }
  }

  template <int C, bool Ahead> static void tile(const Unpacked& w, int i, const Column* columns, [[maybe_unused]] Prefetch& prefetch, float (*sums)[16]) {
    const int8_t* y[C];
    alignas(32) int32_t factors[C][8];
    __m512i isum[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      y[c] = columns[c].q8_256 + i;
      store_256(factors[c], _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(columns[c].factor_32 + i / 32))));
      isum[c] = _mm512_setzero_si512();
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) add_pairs(isum[c], w.scale_pairs[j], columns[c].sums_16 + i / 16 + 2 * j);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) isum[c] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(isum[c], 5));
#pragma GCC unroll 1
    for (int g = 0; g < 8; ++g) {  // 32 weights, whose halves have a scale each
      if constexpr (Ahead) prefetch_eighth<block_bytes>(prefetch, g);
      __m512i both[C];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m512i a[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) a[c] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int n = 4 * half; n < 4 * half + 4; ++n)
#pragma GCC unroll 8
          for (int c = 0; c < C; ++c) add_quads(a[c], w.q[8 * g + n], y[c] + 32 * g + 4 * n);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
          const __m512i scaled = _mm512_mullo_epi32(a[c], w.scale[2 * g + half]);
          both[c] = half ? _mm512_add_epi32(both[c], scaled) : scaled;
        }
      }
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) isum[c] = _mm512_add_epi32(isum[c], _mm512_mullo_epi32(both[c], _mm512_set1_epi32(factors[c][g])));
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const __m512 d = _mm512_mul_ps(_mm512_set1_ps(columns[c].scale_256[i / 256]), w.d);
      _mm512_store_ps(sums[c], _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(isum[c]), _mm512_load_ps(sums[c])));
    }
  }
};

inline void dot_q6_k(const DotArgs& args) { Rows16Dot<Q6_K16, QuantizedDot<Q6_K>>::dot(args); }

#else

inline void dot_q6_k(const DotArgs& args) { QuantizedDot<Q6_K>::dot(args); }

#endif

#elif !defined(FERRUM_SIMD_NEON)

inline void dot_q6_k(const DotArgs& args) {
  for (int r = 0; r < args.rows; ++r) {
    for (int c = 0; c < args.column_count; ++c) args.out[c][r] = 0;
    const std::byte* at = args.weights + static_cast<size_t>(r) * args.row_bytes;
    for (int b = 0; b < args.k / 256; ++b, at += sizeof(BlockQ6_K)) {
      auto block = load_block<BlockQ6_K>(at);
      float d = f16_to_float(block.d);
      int8_t q[256];
      unpack_values(block, q);
      for (int c = 0; c < args.column_count; ++c) {
        const Column& column = args.columns[c];
        const int8_t* y = column.q8_256 + 256 * b;
        int isum = 0;
        for (int s = 0; s < 16; ++s) {
          int sum = 0;
          for (int i = 16 * s; i < 16 * s + 16; ++i) sum += q[i] * y[i];
          isum += block.scales[s] * column.factor_32[8 * b + s / 2] * sum;
        }
        args.out[c][r] = fma(column.scale_256[b] * d, static_cast<float>(isum), args.out[c][r]);
      }
    }
  }
}

#endif
