// What the dot products of all types share: unaligned loads, float lanes from bytes, scratch, and the walk over rows and columns.

inline uint16_t load_u16(const void* p) {
  uint16_t x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class Block> inline Block load_block(const std::byte* p) {
  Block block;
  std::memcpy(&block, p, sizeof block);
  return block;
}

/// Fetches a line `bytes` after p into the L2 cache. Never faults, so it may lie past the end of what p points into; the address is an
/// integer, as such a pointer must not be formed.
inline void prefetch(const std::byte* p, size_t bytes) { __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + bytes), 0, 2); }

/// Eight int8 as float lanes.
inline F8 load_i8(const int8_t* p) {
#if defined(FERRUM_SIMD_AVX2)
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
#elif defined(FERRUM_SIMD_NEON)
  const int16x8_t wide = vmovl_s8(vld1_s8(p));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
#else
  return each([=](int i) { return static_cast<float>(p[i]); });
#endif
}

/// Every use of DotArgs::scratch fits: 16 rows of one unpacked step with sums for tile_columns_max columns, 8 rows of blocks,
/// or 4 rows of floats.
constexpr size_t tile_scratch_bytes = 16384;
inline size_t dot_scratch_bytes(int k) { return tile_scratch_bytes + static_cast<size_t>(k) * 16; }

#if defined(FERRUM_SIMD_AVX2)

inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
/// Four bytes in all eight lanes.
inline __m256i broadcast_4(const void* p) {
  int32_t x;
  std::memcpy(&x, p, sizeof x);
  return _mm256_set1_epi32(x);
}

/// One int16 in all sixteen lanes.
inline __m256i broadcast_2(const int16_t* p) { return _mm256_set1_epi16(*p); }
/// Eight int16 in both halves.
inline __m256i broadcast_16(const int16_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

/// The sum of eight products of unsigned and signed bytes goes into int16 lanes. One statement for the compiler: left to itself, gcc
/// computes all the products of a tile first and spills them.
inline void add_products_i16(__m256i& sum, __m256i u8, __m256i s8) {
  __m256i product = _mm256_maddubs_epi16(u8, s8);
  asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(product));
}

/// Weight rows at one position; row r is `stride` bytes after row r - 1.
struct Rows {
  const std::byte* base;
  size_t stride;
  const std::byte* row(int r) const { return base + static_cast<size_t>(r) * stride; }
};
using Rows8 = Rows;  // as a parameter: eight of them

/// Sixteen bytes of each row, transposed: lane r of out[i] is bytes 4 i..4 i + 3 of row r.
[[gnu::always_inline]] inline void load_quads(Rows8 rows, size_t offset, __m256i out[4]) {
  auto pair = [&](int r) {
    __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows.row(r) + offset));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows.row(r + 4) + offset)), 1);
  };
  __m256i a = pair(0), b = pair(1), c = pair(2), d = pair(3);
  __m256i ab01 = _mm256_unpacklo_epi32(a, b), ab23 = _mm256_unpackhi_epi32(a, b);
  __m256i cd01 = _mm256_unpacklo_epi32(c, d), cd23 = _mm256_unpackhi_epi32(c, d);
  out[0] = _mm256_unpacklo_epi64(ab01, cd01);
  out[1] = _mm256_unpackhi_epi64(ab01, cd01);
  out[2] = _mm256_unpacklo_epi64(ab23, cd23);
  out[3] = _mm256_unpackhi_epi64(ab23, cd23);
}

/// The f16 at `offset` of each row as float lanes.
inline __m256 load_f16_of_rows(Rows8 rows, size_t offset) {
  __m128i x = _mm_cvtsi32_si128(load_u16(rows.row(0) + offset));
  x = _mm_insert_epi16(x, load_u16(rows.row(1) + offset), 1);
  x = _mm_insert_epi16(x, load_u16(rows.row(2) + offset), 2);
  x = _mm_insert_epi16(x, load_u16(rows.row(3) + offset), 3);
  x = _mm_insert_epi16(x, load_u16(rows.row(4) + offset), 4);
  x = _mm_insert_epi16(x, load_u16(rows.row(5) + offset), 5);
  x = _mm_insert_epi16(x, load_u16(rows.row(6) + offset), 6);
  x = _mm_insert_epi16(x, load_u16(rows.row(7) + offset), 7);
  return _mm256_cvtph_ps(x);
}

/// Shuffle control that gives each lane of 4 bytes its bytes `first` and `second` as two unsigned int16.
inline __m256i lane_bytes_as_u16(int first, int second) {
  auto lane = [=](int i) { return static_cast<int>(0x80008000u | static_cast<unsigned>(4 * i + first) | static_cast<unsigned>(4 * i + second) << 16); };
  return _mm256_setr_epi32(lane(0), lane(1), lane(2), lane(3), lane(0), lane(1), lane(2), lane(3));
}
/// The same with the bytes in the upper halves: an arithmetic shift by 8 makes signed int16 of them.
inline __m256i lane_bytes_as_high(int first, int second) {
  auto lane = [=](int i) { return static_cast<int>(0x00800080u | static_cast<unsigned>(4 * i + first) << 8 | static_cast<unsigned>(4 * i + second) << 24); };
  return _mm256_setr_epi32(lane(0), lane(1), lane(2), lane(3), lane(0), lane(1), lane(2), lane(3));
}

/// Lane r of the result is the sum of the lanes of x[r].
inline __m256i sum_lanes(const __m256i x[8]) {
  const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3]));
  const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(x[4], x[5]), _mm256_hadd_epi32(x[6], x[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

/// Fetches memory ahead of the rows being computed. Never faults, so it may run past the end of the weights; addresses are integers, as
/// such pointers must not be formed.
class Prefetch {
 public:
  Prefetch(Rows8 rows, int row_count, size_t row_bytes)
      : linear_(address(rows.base) + group(rows, row_count) + tuning::prefetch_bytes), use_(address(rows.base)), stride_(rows.stride),
        left_(row_bytes), to_next_group_(group(rows, row_count) - row_bytes) {}

  /// The first group of a call, all at once: nothing has fetched it, and eight rows read in turn would wait for every line.
  static void first_group(Rows8 rows, int row_count) { fetch<_MM_HINT_T1>(address(rows.base), group(rows, row_count) + tuning::prefetch_bytes); }

  /// The next bytes in the order of addresses, into the L2 cache: the hardware does not follow eight short streams.
  template <int Bytes> void to_l2() {
    fetch<_MM_HINT_T1>(linear_, Bytes);
    linear_ += Bytes;
  }
  /// The same into the L1 cache, which is faster where 16 rows are read at once.
  template <int Bytes> void linear_to_l1() {
    fetch<_MM_HINT_T0>(linear_, Bytes);
    linear_ += Bytes;
  }
  /// Turns to the block after the one to be computed; at the end of the rows that is the first block of the next group.
  template <int BlockBytes> void next_block() {
    use_ += BlockBytes;
    left_ -= BlockBytes;
    if (left_ == 0) use_ += to_next_group_;
  }
  /// That block of row `r`, into the L1 cache.
  template <int BlockBytes> void to_l1(int r) const { fetch<_MM_HINT_T0>(use_ + static_cast<size_t>(r) * stride_, BlockBytes); }

 private:
  uintptr_t linear_, use_;
  size_t stride_, left_, to_next_group_;

  static uintptr_t address(const std::byte* p) { return reinterpret_cast<uintptr_t>(p); }
  static size_t group(Rows8 rows, int row_count) { return rows.stride * static_cast<size_t>(row_count); }
  template <auto Hint> static void fetch(uintptr_t from, size_t bytes) {
    for (uintptr_t line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(from + line), Hint);
  }
};

/// The products of a quantized type `Q` with any number of rows and columns. Q gives
///   block_bytes, block_weights, tile_columns,
///   rows8<C>(Rows8, k, columns, out):  8 rows and C = 1..4 columns in registers; out[c] takes 8 floats,
///   Unpacked, step_weights, unpack(Rows8 of rows 0..7, Rows8 of 8..15, weights in this step, Prefetch&, Unpacked&),
///   tile<C>(Unpacked, weights in this step, position in k, columns, sums): adds to the 16 sums of C = 1..4 columns.
template <class Q> struct QuantizedDot {
  using Out = float* const*;

  static size_t row_bytes(int k) { return static_cast<size_t>(k / Q::block_weights) * Q::block_bytes; }

  static void rows8(Rows8 rows, int k, const Column* columns, int count, Out out, int row) {
    for (int c = 0; c < count; c += 4) {
      float* at[4];
      int n = count - c < 4 ? count - c : 4;
      for (int i = 0; i < n; ++i) at[i] = out[c + i] + row;
      switch (n) {
        case 1: Q::template rows8<1>(rows, k, columns + c, at); break;
        case 2: Q::template rows8<2>(rows, k, columns + c, at); break;
        case 3: Q::template rows8<3>(rows, k, columns + c, at); break;
        default: Q::template rows8<4>(rows, k, columns + c, at);
      }
    }
  }

  static void rows16(Rows8 low, int k, const Column* columns, int count, Out out, int row, std::byte* scratch) {
    auto& unpacked = *reinterpret_cast<typename Q::Unpacked*>(scratch);
    auto* sums = reinterpret_cast<float(*)[16]>(scratch + sizeof(typename Q::Unpacked));
    static_assert(sizeof(typename Q::Unpacked) % 64 == 0);
    static_assert(sizeof(typename Q::Unpacked) + sizeof(float[tuning::tile_columns_max][16]) <= tile_scratch_bytes);
    std::memset(sums, 0, static_cast<size_t>(count) * sizeof(float[16]));
    Rows8 high{low.row(8), low.stride};
    Prefetch prefetch(low, 16, row_bytes(k));
    for (int i = 0; i < k; i += Q::step_weights) {
      int n = k - i < Q::step_weights ? k - i : Q::step_weights;
      Q::unpack(low, high, n, prefetch, unpacked);
      size_t step_bytes = static_cast<size_t>(n / Q::block_weights) * Q::block_bytes;
      low.base += step_bytes;
      high.base += step_bytes;
      int c = 0;
      for (; c + 4 <= count; c += 4) Q::template tile<4>(unpacked, n, i, columns + c, sums + c);
      switch (count - c) {
        case 1: Q::template tile<1>(unpacked, n, i, columns + c, sums + c); break;
        case 2: Q::template tile<2>(unpacked, n, i, columns + c, sums + c); break;
        case 3: Q::template tile<3>(unpacked, n, i, columns + c, sums + c); break;
        default: break;
      }
    }
    for (int c = 0; c < count; ++c) std::memcpy(out[c] + row, sums[c], sizeof(float[16]));
  }

  /// Fewer than eight rows: copied, with blocks of zeros below them.
  static void few_rows(const DotArgs& args) {
    size_t bytes = row_bytes(args.k);
    std::memset(args.scratch, 0, 8 * bytes);
    for (int r = 0; r < args.rows; ++r) std::memcpy(args.scratch + static_cast<size_t>(r) * bytes, args.weights + static_cast<size_t>(r) * args.row_bytes, bytes);
    for (int c = 0; c < args.column_count; ++c) {
      float products[8];
      float* out = products;
      rows8({args.scratch, bytes}, args.k, args.columns + c, 1, &out, 0);
      std::memcpy(args.out[c], products, static_cast<size_t>(args.rows) * sizeof(float));
    }
  }

  static void dot(const DotArgs& args) {
    if (args.rows < 8) return few_rows(args);
    auto rows_at = [&](int r) { return Rows8{args.weights + static_cast<size_t>(r) * args.row_bytes, args.row_bytes}; };
    for (int c = 0; c < args.column_count; c += tuning::tile_columns_max) {
      int left = args.column_count - c, count = left < tuning::tile_columns_max ? left : tuning::tile_columns_max;
      const bool tiles = count >= Q::tile_columns && args.rows >= 16;
      Prefetch::first_group(rows_at(0), tiles ? 16 : 8);
      int r = 0;
      if (tiles)
        for (; r + 16 <= args.rows; r += 16) rows16(rows_at(r), args.k, args.columns + c, count, args.out + c, r, args.scratch);
      for (; r < args.rows; r += 8) {
        int first = r + 8 <= args.rows ? r : args.rows - 8;  // the last group overlaps the one before it: the same bits again
        rows8(rows_at(first), args.k, args.columns + c, count, args.out + c, first);
      }
    }
  }
};

#endif
