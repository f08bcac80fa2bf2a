// Vectors of two to four components and small matrices. A swizzle is a member that aliases the components.
#pragma once
#include "types.h"

namespace metal {

template <class T, int N> struct vec;
template <class T> struct same { typedef T type; };  // keeps a parameter out of deduction

template <class T, int M, int... I> struct swizzle {
  T d[M];
  typedef vec<T, int(sizeof...(I))> Vector;
  operator Vector() const { return Vector(d[I]...); }
  swizzle& operator=(const Vector& v) {
    const int index[] = {I...};
    const Vector copy = v;
    for (int k = 0; k < int(sizeof...(I)); k++) d[index[k]] = copy[k];
    return *this;
  }
  swizzle& operator=(const swizzle& other) { return *this = Vector(other); }
};

#define MSL_VECTOR_MEMBERS(N)                                                      \
  typedef T value_type;                                                            \
  vec() = default;                                                                 \
  vec(const vec& o) { memcpy(d, o.d, sizeof d); }                                  \
  vec& operator=(const vec& o) { memcpy(d, o.d, sizeof d); return *this; }         \
  vec(T s) { for (int i = 0; i < N; i++) d[i] = s; }                               \
  template <class U> explicit vec(const vec<U, N>& o) { for (int i = 0; i < N; i++) d[i] = T(o.d[i]); } \
  T& operator[](int i) { return d[i]; }                                            \
  const T& operator[](int i) const { return d[i]; }

template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    struct { T x, y; };
    struct { T r, g; };
    T d[2];
    swizzle<T, 2, 0, 1> xy;
    swizzle<T, 2, 1, 0> yx;
  };
  MSL_VECTOR_MEMBERS(2)
  vec(T a, T b) : d{a, b} {}
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    struct { T x, y, z; };
    struct { T r, g, b; };
    T d[4];
    swizzle<T, 4, 0, 1> xy;
    swizzle<T, 4, 1, 2> yz;
    swizzle<T, 4, 0, 1, 2> xyz;
  };
  MSL_VECTOR_MEMBERS(3)
  vec(T p, T q, T s) : d{p, q, s, T(0)} {}
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    struct { T x, y, z, w; };
    struct { T r, g, b, a; };
    T d[4];
    swizzle<T, 4, 0, 1> xy;
    swizzle<T, 4, 1, 2> yz;
    swizzle<T, 4, 2, 3> zw;
    swizzle<T, 4, 0, 2> xz;
    swizzle<T, 4, 1, 3> yw;
    swizzle<T, 4, 0, 1, 2> xyz;
    swizzle<T, 4, 1, 2, 3> yzw;
    swizzle<T, 4, 3, 2, 1, 0> wzyx;
  };
  MSL_VECTOR_MEMBERS(4)
  vec(T p, T q, T s, T t) : d{p, q, s, t} {}
  vec(vec<T, 2> p, vec<T, 2> q) : d{p[0], p[1], q[0], q[1]} {}
  vec(vec<T, 3> p, T q) : d{p[0], p[1], p[2], q} {}
};
#undef MSL_VECTOR_MEMBERS

#define MSL_OPERATOR(op)                                                                                                        \
  template <class T, int N> inline vec<T, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {                              \
    vec<T, N> r;                                                                                                                \
    for (int i = 0; i < N; i++) r.d[i] = T(a.d[i] op b.d[i]);                                                                   \
    return r;                                                                                                                   \
  }                                                                                                                             \
  template <class T, int N> inline vec<T, N> operator op(const vec<T, N>& a, typename same<T>::type b) { return a op vec<T, N>(b); } \
  template <class T, int N> inline vec<T, N> operator op(typename same<T>::type a, const vec<T, N>& b) { return vec<T, N>(a) op b; } \
  template <class T, int N> inline vec<T, N>& operator op##=(vec<T, N>& a, const vec<T, N>& b) { return a = a op b; }           \
  template <class T, int N> inline vec<T, N>& operator op##=(vec<T, N>& a, typename same<T>::type b) { return a = a op vec<T, N>(b); }
MSL_OPERATOR(+) MSL_OPERATOR(-) MSL_OPERATOR(*) MSL_OPERATOR(/) MSL_OPERATOR(%)
MSL_OPERATOR(&) MSL_OPERATOR(|) MSL_OPERATOR(^) MSL_OPERATOR(<<) MSL_OPERATOR(>>)
#undef MSL_OPERATOR
#define MSL_COMPARISON(op)                                                                             \
  template <class T, int N> inline vec<bool, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {  \
    vec<bool, N> r;                                                                                    \
    for (int i = 0; i < N; i++) r.d[i] = a.d[i] op b.d[i];                                             \
    return r;                                                                                          \
  }                                                                                                    \
  template <class T, int N> inline vec<bool, N> operator op(const vec<T, N>& a, typename same<T>::type b) { return a op vec<T, N>(b); }
MSL_COMPARISON(==) MSL_COMPARISON(!=) MSL_COMPARISON(<) MSL_COMPARISON(>) MSL_COMPARISON(<=) MSL_COMPARISON(>=)
#undef MSL_COMPARISON
template <class T, int N> inline vec<T, N> operator-(const vec<T, N>& a) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.d[i] = T(-a.d[i]);
  return r;
}
template <class T, int N> inline vec<T, N> operator~(const vec<T, N>& a) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.d[i] = T(~a.d[i]);
  return r;
}

/// Column-major.
template <class T, int C, int R> struct matrix {
  vec<T, R> columns[C];
  matrix() = default;
  explicit matrix(T s) {
    for (int c = 0; c < C; c++) {
      columns[c] = vec<T, R>(T(0));
      if (c < R) columns[c][c] = s;
    }
  }
  vec<T, R>& operator[](int i) { return columns[i]; }
  const vec<T, R>& operator[](int i) const { return columns[i]; }
};
template <class T, int C, int R> inline vec<T, R> operator*(const matrix<T, C, R>& m, const vec<T, C>& v) {
  vec<T, R> r(T(0));
  for (int c = 0; c < C; c++) r += m[c] * v[c];
  return r;
}

}  // namespace metal

#define MSL_VECTORS(T)          \
  typedef metal::vec<T, 2> T##2; \
  typedef metal::vec<T, 3> T##3; \
  typedef metal::vec<T, 4> T##4;
MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(bfloat) MSL_VECTORS(int) MSL_VECTORS(uint) MSL_VECTORS(short) MSL_VECTORS(ushort)
MSL_VECTORS(char) MSL_VECTORS(uchar) MSL_VECTORS(long) MSL_VECTORS(ulong) MSL_VECTORS(bool)
#undef MSL_VECTORS
typedef metal::matrix<float, 2, 2> float2x2;
typedef metal::matrix<float, 2, 4> float2x4;
typedef metal::matrix<float, 4, 4> float4x4;
typedef metal::matrix<half, 2, 4> half2x4;
typedef metal::matrix<half, 4, 4> half4x4;
