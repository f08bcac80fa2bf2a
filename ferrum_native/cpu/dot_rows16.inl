// The products of AVX-512 with VNNI: the lanes of a register are 16 weight rows, for two columns and more; or four rows, for few.

#if defined(FERRUM_SIMD_AVX512)

using Rows16 = Rows;  // as a parameter: sixteen of them

/// Adds to each lane the products of its four unsigned bytes with the four signed bytes at y. The load is inside the instruction: left to
/// itself, gcc makes two of it.
[[gnu::always_inline]] inline void add_quads(__m512i& sum, __m512i u8, const int8_t* y) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u8), "m"(*reinterpret_cast<const int8_t(*)[4]>(y)));
}
/// Adds to each lane the products of its two int16 with the two int16 at y.
[[gnu::always_inline]] inline void add_pairs(__m512i& sum, __m512i i16, const int16_t* y) {
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(i16), "m"(*reinterpret_cast<const int16_t(*)[2]>(y)));
}

/// Four rows of four lanes in each 128 bits, transposed.
[[gnu::always_inline]] inline void transpose_lanes(__m512i a, __m512i b, __m512i c, __m512i d, __m512i out[4]) {
  __m512i ab01 = _mm512_unpacklo_epi32(a, b), ab23 = _mm512_unpackhi_epi32(a, b);
  __m512i cd01 = _mm512_unpacklo_epi32(c, d), cd23 = _mm512_unpackhi_epi32(c, d);
  out[0] = _mm512_unpacklo_epi64(ab01, cd01);
  out[1] = _mm512_unpackhi_epi64(ab01, cd01);
  out[2] = _mm512_unpacklo_epi64(ab23, cd23);
  out[3] = _mm512_unpackhi_epi64(ab23, cd23);
}

/// Sixteen bytes of each of 16 rows, transposed: lane r of out[i] is bytes 4 i..4 i + 3 of row r.
[[gnu::always_inline]] inline void load_quads(Rows16 rows, size_t offset, __m512i out[4]) {
  auto lane = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows.row(r) + offset)); };
  auto four = [&](int r) {
    __m512i x = _mm512_inserti32x4(_mm512_castsi128_si512(lane(r)), lane(r + 4), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(x, lane(r + 8), 2), lane(r + 12), 3);
  };
  transpose_lanes(four(0), four(1), four(2), four(3), out);
}

/// The same of 32 bytes, with half the loads.
[[gnu::always_inline]] inline void load_octs(Rows16 rows, size_t offset, __m512i out[8]) {
  auto half = [&](int r) { return load_256(rows.row(r) + offset); };
  auto two = [&](int r) { return _mm512_inserti64x4(_mm512_castsi256_si512(half(r)), half(r + 4), 1); };
  __m512i low[4], high[4];  // of rows 0..7 and 8..15: quads i of rows 0..3, i + 4 of them, i of rows 4..7, i + 4 of them
  transpose_lanes(two(0), two(1), two(2), two(3), low);
  transpose_lanes(two(8), two(9), two(10), two(11), high);
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm512_shuffle_i32x4(low[i], high[i], 0x88);
    out[i + 4] = _mm512_shuffle_i32x4(low[i], high[i], 0xdd);
  }
}

/// The products of a quantized type `Q` with few columns: four rows at a time, whose 16 bytes at one place are the quarters of a register, as
/// they lie in memory: nothing is transposed, so each column costs more. Q gives
///   prepare(DotArgs): sums of the activations of all columns, in its scratch,
///   rows4<C>(Rows, k, columns, these sums, out): four rows and C columns; out[c] takes four floats.
template <class Q> struct Rows4Dot {
  static constexpr int most_columns = 3;

  static void dot(const DotArgs& args) {
    const std::byte* sums = Q::prepare(args);
    Prefetch::first_group(Rows{args.weights, args.row_bytes}, 4);
    for (int r = 0; r < args.rows; r += 4) {
      const int first = r + 4 <= args.rows ? r : args.rows - 4;  // the last group overlaps the one before it: the same bits again
      const Rows rows{args.weights + static_cast<size_t>(first) * args.row_bytes, args.row_bytes};
      float* out[most_columns];
      for (int c = 0; c < args.column_count; ++c) out[c] = args.out[c] + first;
      switch (args.column_count) {
        case 1: Q::template rows4<1>(rows, args.k, args.columns, sums, out); break;
        case 2: Q::template rows4<2>(rows, args.k, args.columns, sums, out); break;
        default: Q::template rows4<3>(rows, args.k, args.columns, sums, out);
      }
    }
  }
};

/// Sixteen bytes of each of four rows.
[[gnu::always_inline]] inline __m512i load_rows4(Rows rows, size_t offset) {
  auto lane = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows.row(r) + offset)); };
  const __m512i x = _mm512_inserti32x4(_mm512_castsi128_si512(lane(0)), lane(1), 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(x, lane(2), 2), lane(3), 3);
}
/// Sixteen bytes in all four quarters.
[[gnu::always_inline]] inline __m512i in_quarters(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p))); }

/// Byte b of each lane, unsigned.
[[gnu::always_inline]] inline __m512i byte_of_lanes(__m512i x, int b) {
  return _mm512_and_si512(_mm512_srli_epi32(x, static_cast<unsigned>(8 * b)), _mm512_set1_epi32(255));
}

/// The low halves of the lanes as f16.
inline __m512 low_f16_of_lanes(__m512i x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }

/// An eighth of what is to be fetched during one block of 16 rows. Spread over the products: in one burst it halves the speed of memory.
template <int BlockBytes> [[gnu::always_inline]] inline void prefetch_eighth(Prefetch& prefetch, int eighth) {
  prefetch.linear_to_l1<2 * BlockBytes>();
  prefetch.to_l1<BlockBytes>(2 * eighth);
  prefetch.to_l1<BlockBytes>(2 * eighth + 1);
}

/// The products of a quantized type `Q` with any number of rows and columns. One column is bound by memory, which fewer rows at once read faster:
/// it goes, as fewer than 16 rows do, to `Few`, the type's QuantizedDot. Q gives
///   block_bytes, block_weights,
///   Unpacked, unpack(Rows16, Unpacked&): one block of each row,
///   tile<C, Ahead>(Unpacked, position in k, columns, Prefetch&, sums): adds its products to the 16 sums of C = 1..8 columns; Ahead: prefetches.
template <class Q, class Few> struct Rows16Dot {
  using Sums = float (*)[16];

  static void tiles(Rows16 rows, int k, const Column* columns, int count, std::byte* scratch, Sums sums) {
    auto& unpacked = *reinterpret_cast<typename Q::Unpacked*>(scratch);
    Prefetch prefetch(rows, 16, static_cast<size_t>(k / Q::block_weights) * Q::block_bytes);
    for (int i = 0; i < k; i += Q::block_weights, rows.base += Q::block_bytes) {
      Q::unpack(rows, unpacked);
      prefetch.template next_block<Q::block_bytes>();
      int c = count < 8 ? count : 8;
      switch (c) {  // the first columns, while whose products the memory of the next rows is asked for
        case 1: Q::template tile<1, true>(unpacked, i, columns, prefetch, sums); break;
        case 2: Q::template tile<2, true>(unpacked, i, columns, prefetch, sums); break;
        case 3: Q::template tile<3, true>(unpacked, i, columns, prefetch, sums); break;
        case 4: Q::template tile<4, true>(unpacked, i, columns, prefetch, sums); break;
        case 5: Q::template tile<5, true>(unpacked, i, columns, prefetch, sums); break;
        case 6: Q::template tile<6, true>(unpacked, i, columns, prefetch, sums); break;
        case 7: Q::template tile<7, true>(unpacked, i, columns, prefetch, sums); break;
        default: Q::template tile<8, true>(unpacked, i, columns, prefetch, sums);
      }
      for (; c + 8 <= count; c += 8) Q::template tile<8, false>(unpacked, i, columns + c, prefetch, sums + c);
      for (; c + 4 <= count; c += 4) Q::template tile<4, false>(unpacked, i, columns + c, prefetch, sums + c);
      switch (count - c) {
        case 1: Q::template tile<1, false>(unpacked, i, columns + c, prefetch, sums + c); break;
        case 2: Q::template tile<2, false>(unpacked, i, columns + c, prefetch, sums + c); break;
        case 3: Q::template tile<3, false>(unpacked, i, columns + c, prefetch, sums + c); break;
        default: break;
      }
    }
  }

  static void rows16(Rows16 rows, const DotArgs& args, int first_column, int count, int row) {
    auto* sums = reinterpret_cast<Sums>(args.scratch + sizeof(typename Q::Unpacked));
    static_assert(sizeof(typename Q::Unpacked) % 64 == 0);
    static_assert(sizeof(typename Q::Unpacked) + sizeof(float[tuning::tile_columns_max][16]) <= tile_scratch_bytes);
    std::memset(sums, 0, static_cast<size_t>(count) * sizeof(float[16]));
    const Column* columns = args.columns + first_column;
    tiles(rows, args.k, columns, count, args.scratch, sums);
    for (int c = 0; c < count; ++c) std::memcpy(args.out[first_column + c] + row, sums[c], sizeof(float[16]));
  }

  static void dot(const DotArgs& args) {
    if (args.rows < 16 || args.column_count == 1) return Few::dot(args);
    auto rows_at = [&](int r) { return Rows16{args.weights + static_cast<size_t>(r) * args.row_bytes, args.row_bytes}; };
    for (int c = 0; c < args.column_count; c += tuning::tile_columns_max) {
      const int left = args.column_count - c, count = left < tuning::tile_columns_max ? left : tuning::tile_columns_max;
      Prefetch::first_group(rows_at(0), 16);
      for (int r = 0; r < args.rows; r += 16) {
        const int first = r + 16 <= args.rows ? r : args.rows - 16;  // the last group overlaps the one before it: the same bits again
        rows16(rows_at(first), args, c, count, first);
      }
    }
  }
};

#endif
