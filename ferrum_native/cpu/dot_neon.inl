// What the products of quantized types share with NEON. A few columns: the lanes of a register are neighbours of one weight row, which need no
// transposition, and one horizontal addition makes lanes of four rows. Many columns, where the processor has dot products: the lanes are rows.

#if defined(FERRUM_SIMD_NEON)

/// Four weight rows; where there are fewer, the last one again.
struct Rows4 {
  const std::byte* row[4];
  size_t stride;

  static Rows4 at(const DotArgs& args, int first) {
    Rows4 rows;
    rows.stride = args.row_bytes;
    for (int r = 0; r < 4; ++r) rows.row[r] = args.weights + static_cast<size_t>(std::min(first + r, args.rows - 1)) * args.row_bytes;
    return rows;
  }
};

inline uint8x16_t load_bytes(const std::byte* p) { return vld1q_u8(reinterpret_cast<const uint8_t*>(p)); }
inline int8x16_t as_signed(uint8x16_t x) { return vreinterpretq_s8_u8(x); }

/// The f16 at `offset` of each row as float lanes.
inline float32x4_t load_f16_of_rows(const Rows4& rows, size_t offset) {
  uint16_t x[4];
  for (int r = 0; r < 4; ++r) x[r] = load_u16(rows.row[r] + offset);
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)));
}

/// Adds 16 products of signed bytes to the lanes; which to which is the instruction set's affair: only the total of the lanes counts.
/// Without dot products two products meet in an int16: 2 * 128 * 127 = 32512 fits.
[[gnu::always_inline]] inline int32x4_t add_products(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(FERRUM_SIMD_DOTPROD)
  return vdotq_s32(sum, a, b);
#else
  return vpadalq_s16(sum, vmlal_high_s8(vmull_s8(vget_low_s8(a), vget_low_s8(b)), a, b));
#endif
}

/// Lane i of the result is the sum of the lanes of x[i].
inline int32x4_t sum_lanes(const int32x4_t x[4]) { return vpaddq_s32(vpaddq_s32(x[0], x[1]), vpaddq_s32(x[2], x[3])); }

/// Fetches the lines of `bytes` bytes that begin `from` bytes after p.
inline void prefetch_lines(const std::byte* p, size_t from, size_t bytes) {
  for (size_t line = 0; line < bytes; line += 64) prefetch(p, from + line);
}

#if defined(FERRUM_SIMD_DOTPROD)

/// Sixteen weights of each of eight rows, in the order in which `add_tile` multiplies them.
struct Weights8x16 {
  int8x16_t q[8];
};

#if defined(FERRUM_SIMD_I8MM)

/// q[4 i + p] are bytes 8 i..8 i + 7 of rows 2 p and 2 p + 1.
inline void arrange(const int8x16_t rows[8], Weights8x16& out) {
  for (int p = 0; p < 4; ++p) {
    const int64x2_t even = vreinterpretq_s64_s8(rows[2 * p]), odd = vreinterpretq_s64_s8(rows[2 * p + 1]);
    out.q[p] = vreinterpretq_s8_s64(vzip1q_s64(even, odd));
    out.q[4 + p] = vreinterpretq_s8_s64(vzip2q_s64(even, odd));
  }
}

/// The products of 16 `Count` weights of eight rows with C columns: lane r of sums[c][h] is row 4 h + r.
template <int Count, int C> [[gnu::always_inline]]
inline void tile_products(const Weights8x16* w, const int8_t* const* y, int offset, int32x4_t (*sums)[2]) {
  constexpr int pairs = (C + 1) / 2;
  int32x4_t sum[pairs][4];  // of two columns and two rows: row 2 p with both columns, row 2 p + 1 with both
  for (auto& of_columns : sum)
    for (int32x4_t& x : of_columns) x = vdupq_n_s32(0);
#pragma GCC unroll 2
  for (int n = 0; n < Count; ++n) {
    int8x16_t both[pairs][2];
#pragma GCC unroll 4
    for (int c = 0; c < pairs; ++c) {
      const int64x2_t first = vreinterpretq_s64_s8(vld1q_s8(y[2 * c] + offset + 16 * n));
      const int64x2_t second = 2 * c + 1 < C ? vreinterpretq_s64_s8(vld1q_s8(y[2 * c + 1] + offset + 16 * n)) : first;
      both[c][0] = vreinterpretq_s8_s64(vzip1q_s64(first, second));
      both[c][1] = vreinterpretq_s8_s64(vzip2q_s64(first, second));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p)
#pragma GCC unroll 4
        for (int c = 0; c < pairs; ++c) sum[c][p] = vmmlaq_s32(sum[c][p], w[n].q[4 * i + p], both[c][i]);
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
    for (int h = 0; h < 2; ++h) {
      const int32x4_t low = sum[c / 2][2 * h], high = sum[c / 2][2 * h + 1];
      sums[c][h] = c % 2 ? vuzp2q_s32(low, high) : vuzp1q_s32(low, high);
    }
}

#else

/// q[2 n + h]: lane r is bytes 4 n..4 n + 3 of row 4 h + r.
inline void arrange(const int8x16_t rows[8], Weights8x16& out) {
  for (int h = 0; h < 2; ++h) {
    auto row = [&](int r) { return vreinterpretq_s32_s8(rows[4 * h + r]); };
    const int32x4_t a = vzip1q_s32(row(0), row(2)), b = vzip1q_s32(row(1), row(3)), c = vzip2q_s32(row(0), row(2)), d = vzip2q_s32(row(1), row(3));
    out.q[h] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
    out.q[2 + h] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
    out.q[4 + h] = vreinterpretq_s8_s32(vzip1q_s32(c, d));
    out.q[6 + h] = vreinterpretq_s8_s32(vzip2q_s32(c, d));
  }
}

template <int N, int C> [[gnu::always_inline]] inline void add_quad(const Weights8x16& w, const int8x16_t* y, int32x4_t (*sums)[2]) {
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c)
    for (int h = 0; h < 2; ++h) sums[c][h] = vdotq_laneq_s32(sums[c][h], w.q[2 * N + h], y[c], N);
}

/// The products of 16 `Count` weights of eight rows with C columns: lane r of sums[c][h] is row 4 h + r.
template <int Count, int C> [[gnu::always_inline]]
inline void tile_products(const Weights8x16* w, const int8_t* const* y, int offset, int32x4_t (*sums)[2]) {
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) sums[c][0] = sums[c][1] = vdupq_n_s32(0);
#pragma GCC unroll 2
  for (int n = 0; n < Count; ++n) {
    int8x16_t four[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) four[c] = vld1q_s8(y[c] + offset + 16 * n);
    add_quad<0, C>(w[n], four, sums);
    add_quad<1, C>(w[n], four, sums);
    add_quad<2, C>(w[n], four, sums);
    add_quad<3, C>(w[n], four, sums);
  }
}

#endif
#endif

/// The products of a quantized type `Q` with any number of rows and columns. Q gives
///   block_weights, block_bytes,
///   rows4<C>(Rows4, k, columns, products): four rows and C = 1..4 columns,
/// and for many columns
///   Unpacked, unpack(Rows4 of rows 0..3, of rows 4..7, position in k, weights in this step, Unpacked&): up to 256 weights of eight rows,
///   tile<C>(Unpacked, position in k, weights in this step, columns, sums): adds to the 8 sums of C = 1..4 columns.
template <class Q> struct NeonDot {
  static constexpr int most_columns = 4;  // in registers; by the count of instructions, eight unpacked rows need fewer from here on

  static void rows4(const DotArgs& args, int first_column, int count, int row) {
    const int first = std::max(0, std::min(row, args.rows - 4));  // the last group overlaps the one before it: the same bits again
    const Rows4 rows = Rows4::at(args, first);
    for (int c = first_column; c < first_column + count; c += most_columns) {
      const int n = std::min(first_column + count - c, most_columns);
      float32x4_t products[most_columns];
      switch (n) {
        case 1: Q::template rows4<1>(rows, args.k, args.columns + c, products); break;
        case 2: Q::template rows4<2>(rows, args.k, args.columns + c, products); break;
        case 3: Q::template rows4<3>(rows, args.k, args.columns + c, products); break;
        default: Q::template rows4<4>(rows, args.k, args.columns + c, products);
      }
      for (int i = 0; i < n; ++i) std::memcpy(args.out[c + i] + first, products + i, static_cast<size_t>(std::min(args.rows, 4)) * sizeof(float));
    }
  }

#if defined(FERRUM_SIMD_DOTPROD)
  static void rows8(const DotArgs& args, int first_column, int count, int row) {
    auto& unpacked = *reinterpret_cast<typename Q::Unpacked*>(args.scratch);
    auto* sums = reinterpret_cast<float(*)[8]>(args.scratch + sizeof(typename Q::Unpacked));
    static_assert(sizeof(typename Q::Unpacked) % 64 == 0);
    static_assert(sizeof(typename Q::Unpacked) + sizeof(float[tuning::tile_columns_max][8]) <= tile_scratch_bytes);
    std::memset(sums, 0, static_cast<size_t>(count) * sizeof(float[8]));
    const Rows4 low = Rows4::at(args, row), high = Rows4::at(args, row + 4);
    const Column* columns = args.columns + first_column;
    for (int i = 0; i < args.k; i += 256) {
      const int n = std::min(args.k - i, 256);
      const size_t at = static_cast<size_t>(i / Q::block_weights) * Q::block_bytes, bytes = static_cast<size_t>(n / Q::block_weights) * Q::block_bytes;
      prefetch_lines(low.row[0], 8 * (args.row_bytes + at) + tuning::prefetch_bytes, 8 * bytes);
      Q::unpack(low, high, i, n, unpacked);
      int c = 0;
      for (; c + 4 <= count; c += 4) Q::template tile<4>(unpacked, i, n, columns + c, sums + c);
      switch (count - c) {
        case 1: Q::template tile<1>(unpacked, i, n, columns + c, sums + c); break;
        case 2: Q::template tile<2>(unpacked, i, n, columns + c, sums + c); break;
        case 3: Q::template tile<3>(unpacked, i, n, columns + c, sums + c); break;
        default: break;
      }
    }
    for (int c = 0; c < count; ++c) std::memcpy(args.out[first_column + c] + row, sums[c], sizeof(float[8]));
  }
#endif

  static void dot(const DotArgs& args) {
    for (int c = 0; c < args.column_count; c += tuning::tile_columns_max) {
      const int count = std::min(args.column_count - c, tuning::tile_columns_max);
      prefetch_lines(args.weights, 0, 4 * args.row_bytes + tuning::prefetch_bytes);  // the first group: nothing has fetched it
      int r = 0;
#if defined(FERRUM_SIMD_DOTPROD)
      if (count > most_columns)
        for (; r + 8 <= args.rows; r += 8) rows8(args, c, count, r);
#endif
      for (; r < args.rows; r += 4) rows4(args, c, count, r);
    }
  }
};

#endif
