// What the products of Q5_K, Q3_K and Q2_K share: 256 weights in sub-blocks of 16 or 32 with few bits, whose scales are integers.

/// A block as plain numbers, by sub-blocks of 16: w = d * scale[s] * q - dmin * min[s]; without minima dmin and min are not set.
/// Types give `to_plain(block, out)`.
struct PlainBlock {
  float d, dmin;
  int8_t scale[16], min[16], q[256];
};

template <class Block> constexpr bool has_min = requires(Block block) { block.dmin; };

template <class Block> void dequantize_sub_blocks(const std::byte* row, int k, float* out) {
  PlainBlock block;
  for (int i = 0; i < k; i += 256, row += sizeof(Block)) {
    to_plain(load_block<Block>(row), block);
    for (int s = 0; s < 16; ++s) {
      const F8 scale = set1(block.d * block.scale[s]);
      for (int j = 16 * s; j < 16 * s + 16; j += 8) {
        if constexpr (has_min<Block>)
          store(out + i + j, fma(scale, load_i8(block.q + j), set1(-(block.dmin * block.min[s]))));
        else
          store(out + i + j, scale * load_i8(block.q + j));
      }
    }
  }
}

#if defined(FERRUM_SIMD_AVX2)

/// The lower and upper 16 bits of each lane, f16, as float lanes.
inline void load_f16_pairs(__m256i x, __m256& low, __m256& high) {
  __m256i both = _mm256_packus_epi32(_mm256_and_si256(x, _mm256_set1_epi32(0xffff)), _mm256_srli_epi32(x, 16));
  both = _mm256_permute4x64_epi64(both, 0xd8);
  low = _mm256_cvtph_ps(_mm256_castsi256_si128(both));
  high = _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1));
}

/// The products of a type `T`, which gives
///   Block, bits: the low bits of a value, in bytes of 8 / bits values,
///   q_offset, and where has_high is set high_offset: bit n of 32 bytes is the next bit of the n-th 32 weights,
///   offset: what the values of a block without minima are less than their bits say,
///   load_head(Rows8) -> Head with d and dmin; scale(Head, s): of 16 weights, twice as int16; pair(Head, j): of sub-blocks 2 j and 2 j + 1 of 16 weights
///   what is multiplied with the sums of activations: the minima, or the scales where there are none.
/// Sixteen bytes, a chunk, hold `groups` times 16 weights, 32 apart. Values are below 32: four vpmaddubsw fit an int16.
template <class T> struct SubBlocks {
  using Block = typename T::Block;
  using Head = typename T::Head;
  static constexpr int block_weights = 256, block_bytes = sizeof(Block), step_weights = 256;
  static constexpr int tile_columns = T::tile_columns;
  static constexpr int groups = 8 / T::bits, chunks = 16 / groups;

  static constexpr int at(int chunk, int group) { return 32 * groups * (chunk / 2) + 16 * (chunk & 1) + 32 * group; }

  static inline __m256i values(__m256i low, __m256i high, int chunk, int group) {
    const __m256i value = _mm256_and_si256(_mm256_srli_epi16(low, T::bits * group), _mm256_set1_epi8((1 << T::bits) - 1));
    if constexpr (!T::has_high) return value;
    const int bit = at(chunk, group) / 32;
    high = bit < T::bits ? _mm256_slli_epi16(high, T::bits - bit) : _mm256_srli_epi16(high, bit - T::bits);
    return _mm256_or_si256(value, _mm256_and_si256(high, _mm256_set1_epi8(1 << T::bits)));
  }
  /// The same where two bits take a shift less: values of odd groups are four times as large, at most 28, and four vpmaddubsw still fit an int16.
  static constexpr bool in_place = T::bits == 2;
  static inline __m256i values_in_place(__m256i low, __m256i high, int chunk, int group) {
    const int place = 2 * (group & 1);
    const __m256i value = _mm256_and_si256(group < 2 ? low : _mm256_srli_epi16(low, 4), _mm256_set1_epi8(static_cast<char>(3 << place)));
    if constexpr (!T::has_high) return value;
    const int left = 2 + place - at(chunk, group) / 32;
    high = left == 0 ? high : left > 0 ? _mm256_slli_epi16(high, left) : _mm256_srli_epi16(high, -left);
    return _mm256_or_si256(value, _mm256_and_si256(high, _mm256_set1_epi8(static_cast<char>(4 << place))));
  }
  static inline void load_high(Rows8 rows, __m256i high[2][4]) {
    if constexpr (T::has_high)
      for (size_t part = 0; part < 2; ++part) load_quads(rows, T::high_offset + 16 * part, high[part]);
  }

  /// Adds the block's products; `msum` are those of `pair`.
  static inline __m256 add_block(__m256 acc, float d_y, __m256 d, __m256 dmin, __m256i isum, __m256i msum) {
    if constexpr (has_min<Block>) {
      const __m256 value = _mm256_fmsub_ps(d, _mm256_cvtepi32_ps(isum), _mm256_mul_ps(dmin, _mm256_cvtepi32_ps(msum)));
      return _mm256_fmadd_ps(_mm256_set1_ps(d_y), value, acc);
    } else {
      isum = _mm256_sub_epi32(isum, _mm256_mullo_epi32(msum, _mm256_set1_epi32(T::offset)));
      return _mm256_fmadd_ps(_mm256_mul_ps(_mm256_set1_ps(d_y), d), _mm256_cvtepi32_ps(isum), acc);
    }
  }

  template <int C> static void rows8(Rows8 rows, int k, const Column* columns, float* const* out) {
    Prefetch prefetch(rows, 8, static_cast<size_t>(k / block_weights) * block_bytes);
    __m256 acc[C];
    for (int c = 0; c < C; ++c) acc[c] = _mm256_setzero_ps();
    for (int i = 0; i < k; i += 256, rows.base += block_bytes) {
      prefetch.next_block<block_bytes>();
      const Head head = T::load_head(rows);
      __m256i high[2][4], isum[C], isum_4[C], msum[C];  // isum_4: of the odd groups, four times their sum, if in place
      load_high(rows, high);
      const int8_t* y[C];
      for (int c = 0; c < C; ++c) {
        y[c] = columns[c].q8_256 + i;
        isum[c] = isum_4[c] = msum[c] = _mm256_setzero_si256();
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const __m256i pair = T::pair(head, j);
        for (int c = 0; c < C; ++c) msum[c] = _mm256_add_epi32(msum[c], _mm256_madd_epi16(pair, broadcast_4(columns[c].sums_16 + i / 16 + 2 * j)));
      }
#pragma GCC unroll 8
      for (int chunk = 0; chunk < chunks; ++chunk) {
        prefetch.to_l2<8 * block_bytes / chunks>();
        for (int r = 8 / chunks * chunk; r < 8 / chunks * (chunk + 1); ++r) prefetch.to_l1<block_bytes>(r);
        __m256i low[4];
        load_quads(rows, T::q_offset + 16 * static_cast<size_t>(chunk), low);
#pragma GCC unroll 4
        for (int group = 0; group < groups; ++group) {
          __m256i sum[C];
#pragma GCC unroll 4
          for (int n = 0; n < 4; ++n) {
            const __m256i value = in_place ? values_in_place(low[n], high[chunk & 1][n], chunk, group) : values(low[n], high[chunk & 1][n], chunk, group);
            for (int c = 0; c < C; ++c) {
              const int8_t* four = y[c] + at(chunk, group) + 4 * n;
              if (n == 0)
                sum[c] = _mm256_maddubs_epi16(value, broadcast_4(four));
              else
                add_products_i16(sum[c], value, broadcast_4(four));
            }
          }
          const __m256i scale = T::scale(head, at(chunk, group) / 16);
          for (int c = 0; c < C; ++c) {
            const __m256i factor = broadcast_2(columns[c].factor_32 + i / 32 + at(chunk, group) / 32);
            __m256i& total = in_place && (group & 1) ? isum_4[c] : isum[c];
            total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_mullo_epi16(scale, factor), sum[c]));
          }
        }
      }
      if constexpr (in_place)
        for (int c = 0; c < C; ++c) isum[c] = _mm256_add_epi32(isum[c], _mm256_srai_epi32(isum_4[c], 2));
      for (int c = 0; c < C; ++c) acc[c] = add_block(acc[c], columns[c].scale_256[i / 256], head.d, head.dmin, isum[c], msum[c]);
    }
    for (int c = 0; c < C; ++c) _mm256_storeu_ps(out[c], acc[c]);
  }

  /// One block of 16 rows; [2] is rows 0..7 and 8..15, lanes are rows.
  struct alignas(64) Unpacked {
    __m256i q[64][2];      // [k / 4]: four values
    __m256i scale[16][2];  // twice as int16
    __m256i pair[8][2];
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
    const Head head = T::load_head(rows);
    out.d[h] = head.d;
    out.dmin[h] = head.dmin;
#pragma GCC unroll 16
    for (int s = 0; s < 16; ++s) out.scale[s][h] = T::scale(head, s);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) out.pair[j][h] = T::pair(head, j);
    __m256i high[2][4];
    load_high(rows, high);
#pragma GCC unroll 8
    for (int chunk = 0; chunk < chunks; ++chunk) {
      __m256i low[4];
      load_quads(rows, T::q_offset + 16 * static_cast<size_t>(chunk), low);
#pragma GCC unroll 4
      for (int group = 0; group < groups; ++group)
        for (int n = 0; n < 4; ++n) out.q[at(chunk, group) / 4 + n][h] = values(low[n], high[chunk & 1][n], chunk, group);
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
    for (int s = 0; s < 16; ++s) {
      __m256i a[C][2];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const __m256i four = broadcast_4(y[c] + 16 * s + 4 * n);
          for (int h = 0; h < 2; ++h) {
            if (n == 0)
              a[c][h] = _mm256_maddubs_epi16(w.q[4 * s][h], four);
            else
              add_products_i16(a[c][h], w.q[4 * s + n][h], four);
          }
        }
      for (int c = 0; c < C; ++c) {
        const __m256i factor = broadcast_2(columns[c].factor_32 + i / 32 + s / 2);
        for (int h = 0; h < 2; ++h) isum[c][h] = _mm256_add_epi32(isum[c][h], _mm256_madd_epi16(_mm256_mullo_epi16(w.scale[s][h], factor), a[c][h]));
      }
    }
    for (int c = 0; c < C; ++c)
      for (int h = 0; h < 2; ++h) {
        __m256i msum = _mm256_setzero_si256();
        for (int j = 0; j < 8; ++j) msum = _mm256_add_epi32(msum, _mm256_madd_epi16(w.pair[j][h], broadcast_4(columns[c].sums_16 + i / 16 + 2 * j)));
        float* sum = sums[c] + 8 * h;
        _mm256_store_ps(sum, add_block(_mm256_load_ps(sum), columns[c].scale_256[i / 256], w.d[h], w.dmin[h], isum[c][h], msum));
      }
  }
};

#elif !defined(FERRUM_SIMD_NEON)

template <class Block> void dot_sub_blocks(const DotArgs& args) {
  PlainBlock block;
  for (int r = 0; r < args.rows; ++r) {
    for (int c = 0; c < args.column_count; ++c) args.out[c][r] = 0;
    const std::byte* at = args.weights + static_cast<size_t>(r) * args.row_bytes;
    for (int b = 0; b < args.k / 256; ++b, at += sizeof(Block)) {
      to_plain(load_block<Block>(at), block);
      for (int c = 0; c < args.column_count; ++c) {
        const Column& column = args.columns[c];
        const int8_t* y = column.q8_256 + 256 * b;
        int isum = 0, msum = 0;
        for (int s = 0; s < 16; ++s) {
          int sum = 0;
          for (int i = 16 * s; i < 16 * s + 16; ++i) sum += block.q[i] * y[i];
          isum += block.scale[s] * column.factor_32[8 * b + s / 2] * sum;
          if constexpr (has_min<Block>) msum += block.min[s] * column.sums_16[16 * b + s];
        }
        float& out = args.out[c][r];
        if constexpr (has_min<Block>)
          out = fma(column.scale_256[b], fma(block.d, static_cast<float>(isum), -(block.dmin * static_cast<float>(msum))), out);
        else
          out = fma(column.scale_256[b] * block.d, static_cast<float>(isum), out);
      }
    }
  }
}

#endif
