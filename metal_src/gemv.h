// Products of a few rows of a weight with a few columns of activations, by one simdgroup.
#pragma once
#include "weights.h"

namespace ferrum {

/// Where the rows of weights and the activations (the columns) of a simdgroup's products lie, and the lane's sums. Rows and columns that do not
/// exist repeat others: computed, not stored.
template <int row_count, int column_count> struct Products {
  device const uint8_t* row[row_count];
  device const float* x[column_count];
  float sum[row_count][column_count];
};

/// Rows first .. first + row_count - 1 of a matrix of `rows` rows.
template <int row_count, int column_count>
inline void set_rows(thread Products<row_count, column_count>& products, device const uint8_t* matrix, uint row_bytes, int first, int rows) {
  for (int r = 0; r < row_count; ++r) products.row[r] = matrix + ulong(min(first + r, rows - 1)) * row_bytes;
}

/// Lane `lane` multiplies units lane, lane + 32, ... The weights of a unit are loaded once for all columns. Loops are unrolled so that the
/// arrays are registers.
template <typename Format, int row_count, int column_count>
inline void multiply_units(thread Products<row_count, column_count>& products, int cols, ushort lane) {
  #pragma unroll
  for (int r = 0; r < row_count; ++r)
    #pragma unroll
    for (int c = 0; c < column_count; ++c) products.sum[r][c] = 0.f;
  for (uint unit = lane; unit < Format::units(cols); unit += shared::simdgroup_lanes) {
    float4 w[row_count][Format::quads];
    #pragma unroll
    for (int r = 0; r < row_count; ++r) Format::load(products.row[r], unit, cols, w[r]);
    #pragma unroll
    for (int c = 0; c < column_count; ++c) {
      float4 partial[row_count];
      #pragma unroll
      for (int r = 0; r < row_count; ++r) partial[r] = float4(0.f);
      #pragma unroll
      for (uint quad = 0; quad < Format::quads; ++quad) {
        const float4 x = load_quad<Format>(products.x[c], Format::at(unit, quad), cols);
        #pragma unroll
        for (int r = 0; r < row_count; ++r) partial[r] += w[r][quad] * x;
      }
      #pragma unroll
      for (int r = 0; r < row_count; ++r) products.sum[r][c] += (partial[r].x + partial[r].y) + (partial[r].z + partial[r].w);
    }
  }
}

/// Every lane has all sums afterwards.
template <int row_count, int column_count>
inline void multiply(int type, thread Products<row_count, column_count>& products, int cols, ushort lane) {
  FERRUM_WITH_FORMAT(type, cols, multiply_units<Format>(products, cols, lane))
  #pragma unroll
  for (int r = 0; r < row_count; ++r)
    #pragma unroll
    for (int c = 0; c < column_count; ++c) products.sum[r][c] = simd_sum(products.sum[r][c]);
}

/// Pairs at `pairs[position ..]` that one expert multiplies in a pass; the runs of an expert start at every `most`th of its pairs.
struct ExpertRun {
  int expert;
  int count;  // 0: the position is inside a run
};
inline ExpertRun run_at(int position, int most, device const int32_t* ids, device const int32_t* start, device const int32_t* pairs) {
  ExpertRun run;
  run.expert = ids[pairs[position]];
  run.count = (position - start[run.expert]) % most == 0 ? min(most, start[run.expert + 1] - position) : 0;
  return run;
}

}  // namespace ferrum
