// Which elements of an 8x8 matrix a lane of its simdgroup holds: two neighbours of one row. Only this file knows.
#pragma once
#include <metal_stdlib>

using namespace metal;

namespace ferrum {

inline ushort fragment_row(ushort lane) { return ushort(((lane >> 2) & 4) + ((lane >> 1) & 3)); }
/// Of the first of the two.
inline ushort fragment_column(ushort lane) { return ushort(((lane >> 1) & 4) + (lane & 1) * 2); }

inline simdgroup_float8x8 make_fragment(float first, float second) {
  simdgroup_float8x8 matrix;
  matrix.thread_elements()[0] = first;
  matrix.thread_elements()[1] = second;
  return matrix;
}

/// Over the four lanes that share a row.
inline float fragment_row_max(float value) {
  value = max(value, simd_shuffle_xor(value, ushort(1)));
  return max(value, simd_shuffle_xor(value, ushort(8)));
}
inline float fragment_row_sum(float value) {
  value += simd_shuffle_xor(value, ushort(1));
  return value + simd_shuffle_xor(value, ushort(8));
}

}  // namespace ferrum
