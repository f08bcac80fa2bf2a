// The products of AVX-512 with VNNI: the lanes of a register are 16 weight rows, for one column as for many.

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

/// Sixteen bytes of each of 16 rows, transposed: lane r of out[i] is bytes 4 i..4 i + 3 of row r.
[[gnu::always_inline]] inline void load_quads(Rows16 rows, size_t offset, __m512i out[4]) {
  auto lane = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows.row(r) + offset)); };
  auto four = [&](int r) {
    __m512i x = _mm512_inserti32x4(_mm512_castsi128_si512(lane(r)), lane(r + 4), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(x, lane(r + 8), 2), lane(r + 12), 3);
  };
  __m512i a = four(0), b = four(1), c = four(2), d = four(3);
  __m512i ab01 = _mm512_unpacklo_epi32(a, b), ab23 = _mm512_unpackhi_epi32(a, b);
  __m512i cd01 = _mm512_unpacklo_epi32(c, d), cd23 = _mm512_unpackhi_epi32(c, d);
  out[0] = _mm512_unpacklo_epi64(ab01, cd01);
  out[1] = _mm512_unpackhi_epi64(ab01, cd01);
  out[2] = _mm512_unpacklo_epi64(ab23, cd23);
  out[3] = _mm512_unpackhi_epi64(ab23, cd23);
}

/// Byte b of each lane, unsigned.
template <int B> inline __m512i byte_of_lanes(__m512i x) {
  return B == 3 ? _mm512_srli_epi32(x, 24) : _mm512_and_si512(_mm512_srli_epi32(x, 8 * B), _mm512_set1_epi32(255));
}

/// The low halves of the lanes as f16.
inline __m512 low_f16_of_lanes(__m512i x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }

/// The products of a quantized type `Q` with any number of rows and columns; one column is bound by memory, and
/// goes, as fewer than 16 rows do, to `Few`, the type's QuantizedDot. Q gives
///   block_bytes, block_weights, step_weights,
///   Unpacked, unpack(Rows16, weights in this step, Prefetch&, Unpacked&),
///   tile<C>(Unpacked, weights in this step, position in k, columns, sums): adds to the 16 sums of C = 1..8 columns.
template <class Q, class Few> struct Rows16Dot {
  static void rows16(Rows16 rows, const DotArgs& args, int first_column, int count, int row) {
    auto& unpacked = *reinterpret_cast<typename Q::Unpacked*>(args.scratch);
    auto* sums = reinterpret_cast<float(*)[16]>(args.scratch + sizeof(typename Q::Unpacked));
    static_assert(sizeof(typename Q::Unpacked) % 64 == 0);
    static_assert(sizeof(typename Q::Unpacked) + sizeof(float[tuning::tile_columns_max][16]) <= tile_scratch_bytes);
    std::memset(sums, 0, static_cast<size_t>(count) * sizeof(float[16]));
    const Column* columns = args.columns + first_column;
    Prefetch prefetch(rows, 16, static_cast<size_t>(args.k / Q::block_weights) * Q::block_bytes);
    for (int i = 0; i < args.k; i += Q::step_weights) {
      const int n = args.k - i < Q::step_weights ? args.k - i : Q::step_weights;
      Q::unpack(rows, n, prefetch, unpacked);
      rows.base += static_cast<size_t>(n / Q::block_weights) * Q::block_bytes;
      int c = 0;
      for (; c + 8 <= count; c += 8) Q::template tile<8>(unpacked, n, i, columns + c, sums + c);
      switch (count - c) {
        case 1: Q::template tile<1>(unpacked, n, i, columns + c, sums + c); break;
        case 2: Q::template tile<2>(unpacked, n, i, columns + c, sums + c); break;
        case 3: Q::template tile<3>(unpacked, n, i, columns + c, sums + c); break;
        case 4: Q::template tile<4>(unpacked, n, i, columns + c, sums + c); break;
        case 5: Q::template tile<5>(unpacked, n, i, columns + c, sums + c); break;
        case 6: Q::template tile<6>(unpacked, n, i, columns + c, sums + c); break;
        case 7: Q::template tile<7>(unpacked, n, i, columns + c, sums + c); break;
        default: break;
      }
    }
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
