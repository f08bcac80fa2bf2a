// A tile of gemm_rows rows of weights by gemm_columns columns of activations, by a threadgroup of four simdgroups, in float32.
//
// Each step brings gemm_depth columns of the weights and of the activations into threadgroup memory. Which columns is the format's choice
// (whole units, so that every byte is read once): the activations follow it. Simdgroup s has rows 32 (s % 2) .. + 31 and columns 16 (s / 2) .. + 15.
#pragma once
#include "weights.h"

namespace ferrum {

/// What a threadgroup multiplies. The tile's rows are two halves, each 32 rows of its own: `rows` of them exist, the others count as zeros.
struct TileHalf {
  device const uint8_t* first;
  int rows;
};
struct TileInput {
  TileHalf half_0, half_1;
  uint row_bytes;
  int cols;
  device const float* x;  // the row of activations that this thread brings: that of the tile's column thread_index / 4
};

struct TileThread {
  ushort index, simdgroup_index;
};

struct TileSums {
  simdgroup_float8x8 at[2][4];  // [8 columns of activations][8 rows of weights]
};

inline void clear(thread TileSums& sums) {
  #pragma unroll
  for (int c = 0; c < 2; ++c)
    #pragma unroll
    for (int r = 0; r < 4; ++r) sums.at[c][r] = make_filled_simdgroup_matrix<float, 8, 8>(0.f);
}

/// Tile of a matrix of `rows` rows from row `first` on.
inline TileInput tile_of(device const uint8_t* matrix, uint row_bytes, int first, int rows, int cols, device const float* x) {
  TileInput input;
  input.half_0.first = matrix + ulong(first) * row_bytes;
  input.half_0.rows = rows - first;
  input.half_1.first = matrix + ulong(first + 32) * row_bytes;
  input.half_1.rows = rows - first - 32;
  input.row_bytes = row_bytes;
  input.cols = cols;
  input.x = x;
  return input;
}

template <typename Format>
inline void load_weights(TileInput input, uint first_unit, TileThread self, threadgroup float* tile) {
  enum { units = shared::gemm_depth / 4 / Format::quads };  // of a row in a step
  for (uint job = self.index; job < shared::gemm_rows * units; job += shared::gemm_threads) {
    const uint row = job / units, unit = first_unit + job % units;
    const int row_of_half = int(row % 32);
    float4 w[Format::quads];
    #pragma unroll
    for (uint quad = 0; quad < Format::quads; ++quad) w[quad] = float4(0.f);
    if (unit < Format::units(input.cols) && row_of_half < (row < 32 ? input.half_0.rows : input.half_1.rows))
      Format::load((row < 32 ? input.half_0.first : input.half_1.first) + ulong(row_of_half) * input.row_bytes, unit, input.cols, w);
    threadgroup float4* out = (threadgroup float4*)(tile + row * shared::gemm_stride) + job % units * Format::quads;
    #pragma unroll
    for (uint quad = 0; quad < Format::quads; ++quad) out[quad] = w[quad];
  }
}

template <typename Format>
inline void load_activations(TileInput input, uint first_unit, TileThread self, threadgroup float* tile) {
  threadgroup float4* out = (threadgroup float4*)(tile + self.index / 4 * shared::gemm_stride);
  for (uint slot = self.index % 4; slot < shared::gemm_depth / 4; slot += 4) {
    const uint unit = first_unit + slot / Format::quads;
    out[slot] = unit < Format::units(input.cols) ? load_quad<Format>(input.x, Format::at(unit, slot % Format::quads), input.cols) : float4(0.f);
  }
}

inline void multiply_step(threadgroup const float* weights, threadgroup const float* activations, TileThread self, thread TileSums& sums) {
  weights += 32 * (self.simdgroup_index % 2) * shared::gemm_stride;
  activations += 16 * (self.simdgroup_index / 2) * shared::gemm_stride;
  for (uint k = 0; k < shared::gemm_depth; k += 8) {
    simdgroup_float8x8 x[2], w[4];
    #pragma unroll
    for (int c = 0; c < 2; ++c) simdgroup_load(x[c], activations + 8 * c * shared::gemm_stride + k, shared::gemm_stride);
    #pragma unroll
    for (int r = 0; r < 4; ++r) simdgroup_load(w[r], weights + 8 * r * shared::gemm_stride + k, shared::gemm_stride, ulong2(0, 0), true);
    #pragma unroll
    for (int c = 0; c < 2; ++c)
      #pragma unroll
      for (int r = 0; r < 4; ++r) simdgroup_multiply_accumulate(sums.at[c][r], x[c], w[r], sums.at[c][r]);
  }
}

/// Adds the products of the tile. `memory` has gemm_threadgroup_bytes.
template <typename Format>
inline void multiply_tile_of(TileInput input, TileThread self, threadgroup float* memory, thread TileSums& sums) {
  threadgroup float* activations = memory + shared::gemm_rows * shared::gemm_stride;
  for (uint unit = 0; unit < Format::units(input.cols); unit += shared::gemm_depth / 4 / Format::quads) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the step before has read its tile
    load_weights<Format>(input, unit, self, memory);
    load_activations<Format>(input, unit, self, activations);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    multiply_step(memory, activations, self, sums);
  }
}
inline void multiply_tile(int type, TileInput input, TileThread self, threadgroup float* memory, thread TileSums& sums) {
  FERRUM_WITH_FORMAT(type, input.cols, multiply_tile_of<Format>(input, self, memory, sums))
}

enum { tile_sums_stride = shared::gemm_rows + 4 };
static_assert(4 * shared::gemm_columns * tile_sums_stride <= shared::gemm_threadgroup_bytes, "the sums fit where the tiles were");

/// Brings the sums to threadgroup memory: that of column c and row r to memory[c * tile_sums_stride + r].
inline void share_sums(thread TileSums& sums, TileThread self, threadgroup float* memory) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  threadgroup float* out = memory + 16 * (self.simdgroup_index / 2) * tile_sums_stride + 32 * (self.simdgroup_index % 2);
  #pragma unroll
  for (int c = 0; c < 2; ++c)
    #pragma unroll
    for (int r = 0; r < 4; ++r) simdgroup_store(sums.at[c][r], out + 8 * c * tile_sums_stride + 8 * r, tile_sums_stride);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

}  // namespace ferrum
