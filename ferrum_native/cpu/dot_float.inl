// Products of float activations: with F32, F16 and BF16 weights as they lie, with quantized weights through rows of floats in scratch.

struct WeightsF32 {
  static constexpr int bytes = 4;
  static F8 at(const std::byte* p) { return load(reinterpret_cast<const float*>(p)); }
};
struct WeightsF16 {
  static constexpr int bytes = 2;
  static F8 at(const std::byte* p) { return load_f16(reinterpret_cast<const uint16_t*>(p)); }
};
struct WeightsBF16 {
  static constexpr int bytes = 2;
  static F8 at(const std::byte* p) { return load_bf16(reinterpret_cast<const uint16_t*>(p)); }
};

template <class W> struct FloatDot {
  struct Rows {
    const std::byte* base;
    size_t stride;
    const std::byte* row(int r) const { return base + static_cast<size_t>(r) * stride; }
  };

  /// R rows and C columns; V of the four partial vectors at a time, so that R * C * V stay in registers.
  /// With V < 4 the walk over k goes in panels that stay in the L1 cache from one partial vector to the next. Ahead: fetches the next R rows.
  template <int R, int C, int V, bool Ahead> static void tile(Rows rows, int k, const Column* columns, float* const* out, int row) {
    constexpr int panel = 512;
    F8 partial[4][R][C];
    for (auto& v : partial)
      for (auto& r : v)
        for (F8& x : r) x = zero();
    int whole = k & ~31;
    for (int first = 0; first < whole; first += panel) {
      int last = whole - first < panel ? whole : first + panel;
      for (int v = 0; v < 4; v += V) {
        F8 acc[V][R][C];
        std::memcpy(acc, partial + v, sizeof acc);
        for (int i = first + 8 * v; i < last; i += 32)
#pragma GCC unroll 4
          for (int j = 0; j < V; ++j) {
            F8 y[C];
            for (int c = 0; c < C; ++c) y[c] = load(columns[c].values + i + 8 * j);
            for (int r = 0; r < R; ++r) {
              if (Ahead && v + j == 0)
                for (size_t line = 0; line < 32 * W::bytes; line += 64) prefetch(rows.row(r), static_cast<size_t>(R) * rows.stride + static_cast<size_t>(i) * W::bytes + line);
              F8 w = W::at(rows.row(r) + static_cast<size_t>(i + 8 * j) * W::bytes);
              for (int c = 0; c < C; ++c) acc[j][r][c] = fma(w, y[c], acc[j][r][c]);
            }
          }
        std::memcpy(partial + v, acc, sizeof acc);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) {
        F8 v[4] = {partial[0][r][c], partial[1][r][c], partial[2][r][c], partial[3][r][c]};
        if (whole < k) add_tail(rows.row(r), columns[c].values, whole, k, v);
        out[c][row + r] = reduce_add((v[0] + v[1]) + (v[2] + v[3]));
      }
  }

  static void add_tail(const std::byte* row, const float* values, int whole, int k, F8 v[4]) {
    alignas(4) std::byte w[32 * W::bytes] = {};
    float y[32] = {};
    size_t count = static_cast<size_t>(k - whole);
    std::memcpy(w, row + static_cast<size_t>(whole) * W::bytes, count * W::bytes);
    std::memcpy(y, values + whole, count * sizeof(float));
    for (int j = 0; j < 4; ++j) v[j] = fma(W::at(w + 8 * j * W::bytes), load(y + 8 * j), v[j]);
  }

  template <int R, int V> static void columns_of_rows(Rows rows, int k, const Column* columns, int count, float* const* out, int row) {
    const int first = count < 3 ? count : 3;
    if (first == 3) tile<R, 3, V, V == 4>(rows, k, columns, out, row);
    if (first == 2) tile<R, 2, V, V == 4>(rows, k, columns, out, row);
    if (first == 1) tile<R, 1, V, false>(rows, k, columns, out, row);  // one column reads in the order of addresses
    int c = first;
    for (; c + 3 <= count; c += 3) tile<R, 3, V, false>(rows, k, columns + c, out + c, row);
    if (count - c == 2) tile<R, 2, V, false>(rows, k, columns + c, out + c, row);
    if (count - c == 1) tile<R, 1, V, false>(rows, k, columns + c, out + c, row);
  }

  static void rows_at(Rows rows, int row_count, const DotArgs& args, int row) {
    int r = 0;
    if (args.column_count >= tuning::tile_columns_float)
      for (; r + 4 <= row_count; r += 4) columns_of_rows<4, 1>({rows.row(r), rows.stride}, args.k, args.columns, args.column_count, args.out, row + r);
    for (; r < row_count; ++r) columns_of_rows<1, 4>({rows.row(r), rows.stride}, args.k, args.columns, args.column_count, args.out, row + r);
  }
};

/// The columns in groups that stay in the L2 cache over all rows.
template <class F> inline void each_column_group(DotArgs args, F&& f) {
  const Column* columns = args.columns;
  float* const* out = args.out;
  for (int c = 0, count = args.column_count; c < count; c += tuning::group_columns_float) {
    args.columns = columns + c;
    args.out = out + c;
    args.column_count = count - c < tuning::group_columns_float ? count - c : tuning::group_columns_float;
    f(args);
  }
}

template <class W> inline void dot_floats(const DotArgs& all) {
  each_column_group(all, [](const DotArgs& args) { FloatDot<W>::rows_at({args.weights, args.row_bytes}, args.rows, args, 0); });
}

using DequantizeRow = void (*)(const std::byte* row, int k, float* out);

template <DequantizeRow Dequantize> inline void dot_float_quantized(const DotArgs& all) {
  each_column_group(all, [](const DotArgs& args) {
    auto* floats = reinterpret_cast<float*>(args.scratch);
    const size_t k = static_cast<size_t>(args.k);
    for (int row = 0; row < args.rows; row += 4) {
      const int count = args.rows - row < 4 ? args.rows - row : 4;
      for (int r = 0; r < count; ++r) Dequantize(args.weights + static_cast<size_t>(row + r) * args.row_bytes, args.k, floats + static_cast<size_t>(r) * k);
      FloatDot<WeightsF32>::rows_at({args.scratch, k * sizeof(float)}, count, args, row);
    }
  });
}

template <class W> inline void dequantize_floats(const std::byte* row, int k, float* out) {
  int whole = k & ~7;
  for (int i = 0; i < whole; i += 8) store(out + i, W::at(row + static_cast<size_t>(i) * W::bytes));
  alignas(4) std::byte w[8 * W::bytes] = {};
  float tail[8];
  std::memcpy(w, row + static_cast<size_t>(whole) * W::bytes, static_cast<size_t>(k - whole) * W::bytes);
  store(tail, W::at(w));
  std::memcpy(out + whole, tail, static_cast<size_t>(k - whole) * sizeof(float));
}
