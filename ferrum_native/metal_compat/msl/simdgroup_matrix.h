// 8x8 matrices spread over a simdgroup: each lane holds two neighbouring elements of one row.
#pragma once
#include "lanes.h"

namespace metal {

inline uint msl_matrix_row(uint lane) { return (lane >> 2 & 4) + (lane >> 1 & 3); }
inline uint msl_matrix_column(uint lane) { return (lane >> 1 & 4) + (lane & 1) * 2; }
inline uint msl_matrix_lane(uint row, uint column) { return (row & 4) << 2 | (column & 4) << 1 | (row & 3) << 1 | (column >> 1 & 1); }

template <class T, int R, int C> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup matrices are 8x8");
  static_assert(is_same<T, float>::value || is_same<T, half>::value, "simdgroup matrices hold half or float");
  simdgroup_matrix() = default;
  /// `x` on the diagonal, zero elsewhere.
  explicit simdgroup_matrix(T x) {
    const uint row = msl_matrix_row(msl_runtime->lane()), column = msl_matrix_column(msl_runtime->lane());
    elements = vec<T, 2>(row == column ? x : T(0), row == column + 1 ? x : T(0));
  }
  vec<T, 2>& thread_elements() { return elements; }
  vec<T, 2> elements;
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;

template <class T, int R, int C> inline simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T x) {
  simdgroup_matrix<T, R, C> m;
  m.elements = vec<T, 2>(x);
  return m;
}

/// Loads and stores are no meeting of lanes, but all lanes must take part: builds with checks meet to see it.
inline void msl_matrix_meeting(const char* operation, const char* file, int line) {
#ifdef MSL_CHECKS
  const msl::Site site{file, line, operation};
  const char nothing = 0;
  MSL_MEETING msl_runtime->exchange(&nothing, 1, 0, &site);
#else
  (void)operation, (void)file, (void)line;
#endif
}
template <class T, class S> inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const S* from, ulong row_elements = 8, vec<ulong, 2> origin = vec<ulong, 2>(0), bool transpose = false, MSL_HERE) {
  static_assert(is_same<T, S>::value, "simdgroup_load: element types must match");
  msl_matrix_meeting("simdgroup_load", msl_file, msl_line);
  const uint row = msl_matrix_row(msl_runtime->lane()), column = msl_matrix_column(msl_runtime->lane());
  from += origin.y * row_elements + origin.x;
  for (uint k = 0; k < 2; k++) m.elements[int(k)] = transpose ? from[(column + k) * row_elements + row] : from[row * row_elements + column + k];
}
template <class T, class S> inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, S* to, ulong row_elements = 8, vec<ulong, 2> origin = vec<ulong, 2>(0), bool transpose = false, MSL_HERE) {
  static_assert(is_same<T, S>::value, "simdgroup_store: element types must match");
  msl_matrix_meeting("simdgroup_store", msl_file, msl_line);
  const uint row = msl_matrix_row(msl_runtime->lane()), column = msl_matrix_column(msl_runtime->lane());
  to += origin.y * row_elements + origin.x;
  for (uint k = 0; k < 2; k++) (transpose ? to[(column + k) * row_elements + row] : to[row * row_elements + column + k]) = m.elements[int(k)];
}

struct MatrixOperands { float a[2], b[2]; };
/// d = a b + c, in float.
template <class D, class A, class B, class C> inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c, MSL_HERE) {
  typedef MatrixOperands T;
  const T value{{float(a.elements[0]), float(a.elements[1])}, {float(b.elements[0]), float(b.elements[1])}};
  MSL_EXCHANGE("simdgroup_multiply_accumulate");
  const uint row = msl_matrix_row(msl_runtime->lane()), column = msl_matrix_column(msl_runtime->lane());
  float sum0 = float(c.elements[0]), sum1 = float(c.elements[1]);
  for (uint k = 0; k < 8; k++) {
    const float x = lanes[msl_matrix_lane(row, k)].a[k & 1];
    const T y = lanes[msl_matrix_lane(k, column)];
    sum0 += x * y.b[0];
    sum1 += x * y.b[1];
  }
  d.elements = vec<D, 2>(D(sum0), D(sum1));
}
template <class D, class A, class B> inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b, MSL_HERE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)), msl_file, msl_line);
}

}  // namespace metal
