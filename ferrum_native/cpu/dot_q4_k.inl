// Products with Q4_K weights (BlockQ4_K in quant_types.h).

/// The 8 scales and 8 mins of one block, six bits each.
struct ScalesQ4_K {
  uint8_t scale[8], min[8];
};
inline ScalesQ4_K unpack_scales(const BlockQ4_K& block) {
  ScalesQ4_K out;
  const uint8_t* x = block.scales;
  for (int s = 0; s < 4; ++s) {
    out.scale[s] = x[s] & 63;
    out.min[s] = x[s + 4] & 63;
    out.scale[s + 4] = static_cast<uint8_t>((x[s + 8] & 15) | (x[s] >> 6) << 4);
    out.min[s + 4] = static_cast<uint8_t>((x[s + 8] >> 4) | (x[s + 4] >> 6) << 4);
  }
  return out;
}
inline void unpack_values(const BlockQ4_K& block, int8_t q[256]) {
  for (int pair = 0; pair < 4; ++pair)
    for (int i = 0; i < 32; ++i) {
      uint8_t both = block.q[32 * pair + i];
      q[64 * pair + i] = static_cast<int8_t>(both & 15);
      q[64 * pair + 32 + i] = static_cast<int8_t>(both >> 4);
    }
}

inline void dequantize_q4_k(const std::byte* row, int k, float* out) {
  for (int i = 0; i < k; i += 256, row += sizeof(BlockQ4_K)) {
    auto block = load_block<BlockQ4_K>(row);
    ScalesQ4_K scales = unpack_scales(block);
    int8_t q[256];
    unpack_values(block, q);
    float d = f16_to_float(block.d), dmin = f16_to_float(block.dmin);
    for (int s = 0; s < 8; ++s) {
      F8 scale = set1(d * scales.scale[s]), minus_min = set1(-(dmin * scales.min[s]));
      for (int j = 32 * s; j < 32 * s + 32; j += 8) store(out + i + j, fma(scale, load_i8(q + j), minus_min));
    }
  }
}

#if defined(FERRUM_SIMD_AVX2)

struct Q4_K {
  static constexpr int block_weights = 256, block_bytes = sizeof(BlockQ4_K), step_weights = 256;
  static constexpr int tile_columns = tuning::tile_columns_q4_k;

  /// What precedes the nibbles in the blocks of eight rows, lanes are rows.
  /// scale[h] and min[h]: bytes are sub-blocks 4 h..4 h + 3.
  struct Head {
    __m256 d, dmin;
    __m256i scale[2], min[2];
  };
  static inline Head load_head(Rows8 rows) {
    __m256i x[4];  // d and dmin, scales[0..3], scales[4..7], scales[8..11]
    load_quads(rows, 0, x);
    __m256i both = _mm256_packus_epi32(_mm256_and_si256(x[0], _mm256_set1_epi32(0xffff)), _mm256_srli_epi32(x[0], 16));
    both = _mm256_permute4x64_epi64(both, 0xd8);
    __m256i six = _mm256_set1_epi8(63), four = _mm256_set1_epi8(15), upper_two = _mm256_set1_epi8(48);
    Head head;
    head.d = _mm256_cvtph_ps(_mm256_castsi256_si128(both));
    head.dmin = _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1));
    head.scale[0] = _mm256_and_si256(x[1], six);
    head.min[0] = _mm256_and_si256(x[2], six);
    head.scale[1] = _mm256_or_si256(_mm256_and_si256(x[3], four), _mm256_and_si256(_mm256_srli_epi16(x[1], 2), upper_two));
    head.min[1] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(x[3], 4), four), _mm256_and_si256(_mm256_srli_epi16(x[2], 2), upper_two));
    return head;
  }

  /// Sums of 32 activations: those of sub-blocks 2 j and 2 j + 1 are the int16 pair j.
  static inline __m128i sums_32(const Column& column, int i) {
    __m256i x = load_256(column.sums_16 + i / 16);
    return _mm_hadd_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  }

  template <int C> static void rows8(Rows8 rows, int k, const Column* columns, float* const* out) {
    const __m256i low_nibbles = _mm256_set1_epi8(15);
    Prefetch prefetch(rows, 8, static_cast<size_t>(k / block_weights) * block_bytes);
    __m256 acc[C];
    for (int c = 0; c < C; ++c) acc[c] = _mm256_setzero_ps();
    for (int i = 0; i < k; i += 256, rows.base += block_bytes) {
      prefetch.next_block<block_bytes>();
      Head head = load_head(rows);
      const int8_t* y[C];
      __m256i isum[C], msum[C];
      for (int c = 0; c < C; ++c) {
        y[c] = columns[c].q8_256 + i;
        isum[c] = msum[c] = _mm256_setzero_si256();
        alignas(16) int32_t pair[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(pair), sums_32(columns[c], i));
        for (int j = 0; j < 4; ++j) {
          __m256i mins = _mm256_shuffle_epi8(head.min[j / 2], lane_bytes_as_u16(2 * (j & 1), 2 * (j & 1) + 1));
          msum[c] = _mm256_add_epi32(msum[c], _mm256_madd_epi16(mins, _mm256_set1_epi32(pair[j])));
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        prefetch.to_l2<8 * block_bytes / 4>();
        __m256i even[C], odd[C];  // products of sub-blocks 2 j and 2 j + 1: at most 8 * 2 * 15 * 127 = 30480 in a lane
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          prefetch.to_l1<block_bytes>(2 * j + half);
          __m256i q[4];
          load_quads(rows, static_cast<size_t>(16 + 32 * j + 16 * half), q);
#pragma GCC unroll 4
          for (int n = 0; n < 4; ++n) {
            __m256i low = _mm256_and_si256(q[n], low_nibbles), high = _mm256_and_si256(_mm256_srli_epi16(q[n], 4), low_nibbles);
            for (int c = 0; c < C; ++c) {
              const int8_t* at = y[c] + 64 * j + 16 * half + 4 * n;
              if (half + n == 0) {
                even[c] = _mm256_maddubs_epi16(low, broadcast_4(at));
                odd[c] = _mm256_maddubs_epi16(high, broadcast_4(at + 32));
                continue;
              }
              add_products_i16(even[c], low, broadcast_4(at));
              add_products_i16(odd[c], high, broadcast_4(at + 32));
            }
          }
        }
        __m256i scale_even = _mm256_shuffle_epi8(head.scale[j / 2], lane_bytes_as_u16(2 * (j & 1), 2 * (j & 1)));
        __m256i scale_odd = _mm256_shuffle_epi8(head.scale[j / 2], lane_bytes_as_u16(2 * (j & 1) + 1, 2 * (j & 1) + 1));
        for (int c = 0; c < C; ++c) {
          const int16_t* factor = columns[c].factor_32 + i / 32 + 2 * j;
          __m256i first = _mm256_madd_epi16(_mm256_mullo_epi16(scale_even, broadcast_2(factor)), even[c]);
          __m256i second = _mm256_madd_epi16(_mm256_mullo_epi16(scale_odd, broadcast_2(factor + 1)), odd[c]);
          isum[c] = _mm256_add_epi32(isum[c], _mm256_add_epi32(first, second));
        }
      }
      for (int c = 0; c < C; ++c) acc[c] = add_block(acc[c], columns[c].scale_256[i / 256], head.d, head.dmin, isum[c], msum[c]);
    }
    for (int c = 0; c < C; ++c) _mm256_storeu_ps(out[c], acc[c]);
  }

  static inline __m256 add_block(__m256 acc, float d_y, __m256 d, __m256 dmin, __m256i isum, __m256i msum) {
    __m256 value = _mm256_fmsub_ps(d, _mm256_cvtepi32_ps(isum), _mm256_mul_ps(dmin, _mm256_cvtepi32_ps(msum)));
    return _mm256_fmadd_ps(_mm256_set1_ps(d_y), value, acc);
  }

  /// One block of 16 rows; [2] is rows 0..7 and 8..15, lanes are rows.
  struct alignas(64) Unpacked {
    __m256i q[64][2];      // [k / 4]: four values
    __m256i scale[8][2];   // twice as int16
    __m256i mins[4][2];    // of sub-blocks 2 j and 2 j + 1 as int16
    __m256 d[2], dmin[2];
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
    const __m256i low_nibbles = _mm256_set1_epi8(15);
    Head head = load_head(rows);
    out.d[h] = head.d;
    out.dmin[h] = head.dmin;
    for (int j = 0; j < 4; ++j) {
      int first = 2 * (j & 1);
      out.scale[2 * j][h] = _mm256_shuffle_epi8(head.scale[j / 2], lane_bytes_as_u16(first, first));
      out.scale[2 * j + 1][h] = _mm256_shuffle_epi8(head.scale[j / 2], lane_bytes_as_u16(first + 1, first + 1));
      out.mins[j][h] = _mm256_shuffle_epi8(head.min[j / 2], lane_bytes_as_u16(first, first + 1));
      for (int half = 0; half < 2; ++half) {
        __m256i q[4];
        load_quads(rows, static_cast<size_t>(16 + 32 * j + 16 * half), q);
        for (int n = 0; n < 4; ++n) {
          out.q[16 * j + 4 * half + n][h] = _mm256_and_si256(q[n], low_nibbles);
          out.q[16 * j + 8 + 4 * half + n][h] = _mm256_and_si256(_mm256_srli_epi16(q[n], 4), low_nibbles);
        }
      }
    }
  }

  template <int C> static void tile(const Unpacked& w, int, int i, const Column* columns, float (*sums)[16]) {
    __m256i isum[C][2];
    const int8_t* y[C];
    for (int c = 0; c < C; ++c) {
      isum[c][0] = isum[c][1] = _mm256_setzero_si256();
      y[c] = columns[c].q8_256 + i;
    }
#pragma GCC unroll 1
    for (int s = 0; s < 8; ++s) {
      __m256i a[C][2];
#pragma GCC unroll 8
      for (int n = 0; n < 8; ++n)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          __m256i four = broadcast_4(y[c] + 32 * s + 4 * n);
          for (int h = 0; h < 2; ++h) {
            if (n == 0)
              a[c][h] = _mm256_maddubs_epi16(w.q[8 * s][h], four);
            else
              add_products_i16(a[c][h], w.q[8 * s + n][h], four);
          }
        }
      for (int c = 0; c < C; ++c) {
        const __m256i factor = broadcast_2(columns[c].factor_32 + i / 32 + s);
        for (int h = 0; h < 2; ++h) isum[c][h] = _mm256_add_epi32(isum[c][h], _mm256_madd_epi16(_mm256_mullo_epi16(w.scale[s][h], factor), a[c][h]));
      }
    }
    for (int c = 0; c < C; ++c) {
      alignas(16) int32_t pair[4];
      _mm_store_si128(reinterpret_cast<__m128i*>(pair), sums_32(columns[c], i));
      for (int h = 0; h < 2; ++h) {
        __m256i msum = _mm256_setzero_si256();
        for (int j = 0; j < 4; ++j) msum = _mm256_add_epi32(msum, _mm256_madd_epi16(w.mins[j][h], _mm256_set1_epi32(pair[j])));
        float* sum = sums[c] + 8 * h;
        _mm256_store_ps(sum, add_block(_mm256_load_ps(sum), columns[c].scale_256[i / 256], w.d[h], w.dmin[h], isum[c][h], msum));
      }
    }
  }
};

#if defined(FERRUM_SIMD_AVX512)

struct Q4_K16 {
  static constexpr int block_weights = 256, block_bytes = sizeof(BlockQ4_K);

  /// One block of 16 rows, lanes are rows.
  struct alignas(64) Unpacked {
    __m512i q[64];     // [k / 4]: four values
    __m512i scale[8];  // int32
    __m512i min[8];    // twice as int16
    __m512 d, dmin;
  };

  static void unpack(Rows16 rows, Unpacked& out) {
    const __m512i six = _mm512_set1_epi8(63), four = _mm512_set1_epi8(15), upper_two = _mm512_set1_epi8(48);
    __m512i x[4];  // d and dmin, scales[0..3], scales[4..7], scales[8..11]
    load_quads(rows, 0, x);
    out.d = low_f16_of_lanes(x[0]);
    out.dmin = low_f16_of_lanes(_mm512_srli_epi32(x[0], 16));
    auto with_upper = [&](__m512i low, __m512i high) { return _mm512_or_si512(_mm512_and_si512(low, four), _mm512_and_si512(_mm512_srli_epi16(high, 2), upper_two)); };
    const __m512i scale[2] = {_mm512_and_si512(x[1], six), with_upper(x[3], x[1])};
    const __m512i min[2] = {_mm512_and_si512(x[2], six), with_upper(_mm512_srli_epi16(x[3], 4), x[2])};
    for (int h = 0; h < 2; ++h)
      for (int b = 0; b < 4; ++b) {
        out.scale[4 * h + b] = byte_of_lanes(scale[h], b);
        out.min[4 * h + b] = _mm512_shuffle_epi8(min[h], _mm512_broadcast_i64x4(lane_bytes_as_u16(b, b)));
      }
    for (int j = 0; j < 4; ++j) {
      __m512i q[8];
      load_octs(rows, static_cast<size_t>(16 + 32 * j), q);
      for (int n = 0; n < 8; ++n) {
        out.q[16 * j + n] = _mm512_and_si512(q[n], four);
        out.q[16 * j + 8 + n] = _mm512_and_si512(_mm512_srli_epi16(q[n], 4), four);
      }
    }
  }

  template <int C, bool Ahead> static void tile(const Unpacked& w, int i, const Column* columns, [[maybe_unused]] Prefetch& prefetch, float (*sums)[16]) {
    const int8_t* y[C];
    const int16_t *factors[C], *sums_16[C];
    __m512i isum[C], msum[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      y[c] = columns[c].q8_256 + i;
      factors[c] = columns[c].factor_32 + i / 32;
      sums_16[c] = columns[c].sums_16 + i / 16;
      isum[c] = msum[c] = _mm512_setzero_si512();
    }
#pragma GCC unroll 1
    for (int s = 0; s < 8; ++s) {
      if constexpr (Ahead) prefetch_eighth<block_bytes>(prefetch, s);
      __m512i a[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) a[c] = _mm512_setzero_si512();
#pragma GCC unroll 8
      for (int n = 0; n < 8; ++n)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) add_quads(a[c], w.q[8 * s + n], y[c] + 32 * s + 4 * n);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) isum[c] = _mm512_add_epi32(isum[c], _mm512_mullo_epi32(a[c], _mm512_mullo_epi16(w.scale[s], _mm512_set1_epi16(factors[c][s]))));
    }
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) add_pairs(msum[c], w.min[s], sums_16[c] + 2 * s);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const __m512 value = _mm512_fmsub_ps(w.d, _mm512_cvtepi32_ps(isum[c]), _mm512_mul_ps(w.dmin, _mm512_cvtepi32_ps(msum[c])));
      _mm512_store_ps(sums[c], _mm512_fmadd_ps(_mm512_set1_ps(columns[c].scale_256[i / 256]), value, _mm512_load_ps(sums[c])));
    }
  }
};

struct Q4_K4 {
  static constexpr int block_weights = 256, block_bytes = sizeof(BlockQ4_K);

  /// Sums of 32 activations, [columns][k / 32] int16.
  static const std::byte* prepare(const DotArgs& args) {
    auto* out = reinterpret_cast<int16_t*>(args.scratch);
    for (int c = 0; c < args.column_count; ++c)
      for (int i = 0; i < args.k; i += 256) _mm_store_si128(reinterpret_cast<__m128i*>(out + (c * args.k + i) / 32), Q4_K::sums_32(args.columns[c], i));
    return args.scratch;
  }

  /// Scales and mins of the block whose first 16 bytes `head` holds for four rows: per quarter eight int16.
  struct Head { __m512i scale, min; };
  [[gnu::always_inline]] static inline Head unpack_head(__m512i head) {
    // Scales and mins of sub-blocks 0..3 are the low six bits of bytes; of sub-blocks 4..7 four bits of others and the upper two bits of these.
    const __m512i low_at = _mm512_broadcast_i32x4(_mm_setr_epi8(4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m512i upper_at = _mm512_broadcast_i32x4(_mm_setr_epi8(-1, -1, -1, -1, 4, 5, 6, 7, -1, -1, -1, -1, 8, 9, 10, 11));
    const __m512i low_mask = _mm512_set1_epi64(0x0f0f0f0f3f3f3f3f), upper_two = _mm512_set1_epi8(48);
    const __m512i bytes = _mm512_shuffle_epi8(head, low_at), upper = _mm512_srli_epi16(_mm512_shuffle_epi8(head, upper_at), 2);
    const __m512i low = _mm512_and_si512(_mm512_mask_blend_epi8(0xf000f000f000f000, bytes, _mm512_srli_epi16(bytes, 4)), low_mask);
    const __m512i both = _mm512_ternarylogic_epi32(low, upper, upper_two, 0xf8);  // low | (upper & upper_two)
    return {_mm512_unpacklo_epi8(both, _mm512_setzero_si512()), _mm512_unpackhi_epi8(both, _mm512_setzero_si512())};
  }

  template <int C> static void rows4(Rows rows, int k, const Column* columns, const std::byte* sums, float* const* out) {
    const __m512i low_nibbles = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
    Prefetch prefetch(rows, 4, static_cast<size_t>(k / block_weights) * block_bytes);
    __m512 acc[C];  // lane 0 of each quarter
    for (__m512& x : acc) x = _mm512_setzero_ps();
    for (int i = 0; i < k; i += 256, rows.base += block_bytes) {
      const __m512i start = load_rows4(rows, 0);
      const Head head = unpack_head(start);
      const __m512 d_dmin = _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 0, 2, 4, 6), start)));
      __m512i isum[C], msum[C], scale[C];
      const int8_t* y[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        y[c] = columns[c].q8_256 + i;
        isum[c] = zero;
        msum[c] = _mm512_madd_epi16(head.min, in_quarters(sums + static_cast<size_t>((c * k + i) / 32) * sizeof(int16_t)));
        scale[c] = _mm512_mullo_epi16(head.scale, in_quarters(columns[c].factor_32 + i / 32));
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        prefetch.to_l2<block_bytes>();
        __m512i even[C], odd[C];  // products of sub-blocks 2 j and 2 j + 1: at most 8 * 15 * 127 = 15240 in a lane
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m512i q = load_rows4(rows, static_cast<size_t>(16 + 32 * j + 16 * half));
          const __m512i low = _mm512_and_si512(q, low_nibbles), high = _mm512_and_si512(_mm512_srli_epi16(q, 4), low_nibbles);
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) {
            even[c] = _mm512_dpbusd_epi32(half ? even[c] : zero, low, in_quarters(y[c] + 64 * j + 16 * half));
            odd[c] = _mm512_dpbusd_epi32(half ? odd[c] : zero, high, in_quarters(y[c] + 64 * j + 32 + 16 * half));
          }
        }
        const auto byte = static_cast<char>(4 * j);
        const __m512i pattern = _mm512_add_epi8(_mm512_set1_epi8(byte), _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3)));
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) isum[c] = _mm512_dpwssd_epi32(isum[c], _mm512_packs_epi32(even[c], odd[c]), _mm512_shuffle_epi8(scale[c], pattern));
      }
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        __m512i pair = _mm512_add_epi32(_mm512_unpacklo_epi32(isum[c], msum[c]), _mm512_unpackhi_epi32(isum[c], msum[c]));
        pair = _mm512_add_epi32(pair, _mm512_shuffle_epi32(pair, _MM_PERM_BADC));  // lane 0 of a quarter: isum, lane 1: msum
        const __m512 sums_of_row = _mm512_cvtepi32_ps(pair), minus = _mm512_mul_ps(d_dmin, sums_of_row);
        const __m512 value = _mm512_fmsub_ps(d_dmin, sums_of_row, _mm512_movehdup_ps(minus));
        acc[c] = _mm512_fmadd_ps(_mm512_set1_ps(columns[c].scale_256[i / 256]), value, acc[c]);
      }
    }
    for (int c = 0; c < C; ++c) {
      const __m512 results = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12), acc[c]);
      _mm_storeu_ps(out[c], _mm512_castps512_ps128(results));
    }
  }
};

inline void dot_q4_k(const DotArgs& args) {
  if (args.rows >= 4 && args.column_count <= Rows4Dot<Q4_K4>::most_columns) return Rows4Dot<Q4_K4>::dot(args);
  Rows16Dot<Q4_K16, QuantizedDot<Q4_K>>::dot(args);
}

#else

inline void dot_q4_k(const DotArgs& args) { QuantizedDot<Q4_K>::dot(args); }

#endif

#elif !defined(FERRUM_SIMD_NEON)

inline void dot_q4_k(const DotArgs& args) {
  for (int r = 0; r < args.rows; ++r) {
    for (int c = 0; c < args.column_count; ++c) args.out[c][r] = 0;
    const std::byte* at = args.weights + static_cast<size_t>(r) * args.row_bytes;
    for (int b = 0; b < args.k / 256; ++b, at += sizeof(BlockQ4_K)) {
      auto block = load_block<BlockQ4_K>(at);
      float d = f16_to_float(block.d), dmin = f16_to_float(block.dmin);
      ScalesQ4_K scales = unpack_scales(block);
      int8_t q[256];
      unpack_values(block, q);
      for (int c = 0; c < args.column_count; ++c) {
        const Column& column = args.columns[c];
        const int8_t* y = column.q8_256 + 256 * b;
        const int16_t* sums = column.sums_16 + 16 * b;
        int isum = 0, msum = 0;
        for (int s = 0; s < 8; ++s) {
          int sum = 0;
          for (int i = 32 * s; i < 32 * s + 32; ++i) sum += q[i] * y[i];
          isum += scales.scale[s] * column.factor_32[8 * b + s] * sum;
          msum += scales.min[s] * (sums[2 * s] + sums[2 * s + 1]);
        }
        float value = fma(d, static_cast<float>(isum), -(dmin * static_cast<float>(msum)));
        args.out[c][r] = fma(column.scale_256[b], value, args.out[c][r]);
      }
    }
  }
}

#endif
