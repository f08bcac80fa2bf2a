// Scalar functions, and the same by component.
#pragma once
#include "vectors.h"

namespace metal {

#define MSL_FUNCTION(name, value)                                     \
  inline float name(float x) { return value; }                        \
  inline half name(half h) { const float x = h; return half(value); } \
  template <class T, int N> inline vec<T, N> name(const vec<T, N>& v) { \
    vec<T, N> r;                                                      \
    for (int i = 0; i < N; i++) r.d[i] = name(v.d[i]);                \
    return r;                                                         \
  }
#define MSL_FUNCTIONS                                                                                                     \
  MSL_FUNCTION(exp, std::exp(x)) MSL_FUNCTION(exp2, std::exp2(x)) MSL_FUNCTION(exp10, std::pow(10.0f, x))                 \
  MSL_FUNCTION(log, std::log(x)) MSL_FUNCTION(log2, std::log2(x)) MSL_FUNCTION(log10, std::log10(x))                      \
  MSL_FUNCTION(sqrt, std::sqrt(x)) MSL_FUNCTION(rsqrt, 1.0f / std::sqrt(x)) MSL_FUNCTION(sin, std::sin(x))                \
  MSL_FUNCTION(cos, std::cos(x)) MSL_FUNCTION(tan, std::tan(x)) MSL_FUNCTION(tanh, std::tanh(x))                          \
  MSL_FUNCTION(fabs, std::fabs(x)) MSL_FUNCTION(floor, std::floor(x)) MSL_FUNCTION(ceil, std::ceil(x))                    \
  MSL_FUNCTION(rint, std::rint(x)) MSL_FUNCTION(round, std::round(x)) MSL_FUNCTION(trunc, std::trunc(x))                  \
  inline float pow(float a, float b) { return std::pow(a, b); }                                                           \
  inline float fmin(float a, float b) { return std::fmin(a, b); }                                                         \
  inline float fmax(float a, float b) { return std::fmax(a, b); }                                                         \
  inline float fmod(float a, float b) { return std::fmod(a, b); }                                                         \
  inline float divide(float a, float b) { return a / b; }
MSL_FUNCTIONS
namespace precise { MSL_FUNCTIONS }
namespace fast { MSL_FUNCTIONS }
#undef MSL_FUNCTIONS
#undef MSL_FUNCTION

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline half fma(half a, half b, half c) { return half(float(a) * float(b) + float(c)); }
template <class T, int N> inline vec<T, N> fma(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.d[i] = fma(a.d[i], b.d[i], c.d[i]);
  return r;
}
namespace precise { using metal::fma; }
namespace fast { using metal::fma; }

template <class T> struct is_scalar { enum { value = std::is_arithmetic<T>::value || is_same<T, half>::value }; };
#define MSL_SCALAR(T) typename enable_if<is_scalar<T>::value, T>::type
template <class T> inline MSL_SCALAR(T) min(T a, T b) { return b < a ? b : a; }
template <class T> inline MSL_SCALAR(T) max(T a, T b) { return a < b ? b : a; }
template <class T> inline MSL_SCALAR(T) clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T> inline MSL_SCALAR(T) abs(T x) { return x < T(0) ? T(-x) : x; }
template <class T> inline MSL_SCALAR(T) select(T a, T b, bool c) { return c ? b : a; }
template <class T> inline MSL_SCALAR(T) sign(T x) { return T((x > T(0)) - (x < T(0))); }
template <class T> inline MSL_SCALAR(T) mix(T a, T b, T t) { return a + (b - a) * t; }
#undef MSL_SCALAR
template <class T, int N> inline vec<T, N> min(const vec<T, N>& a, const vec<T, N>& b) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.d[i] = min(a.d[i], b.d[i]);
  return r;
}
template <class T, int N> inline vec<T, N> max(const vec<T, N>& a, const vec<T, N>& b) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.d[i] = max(a.d[i], b.d[i]);
  return r;
}
template <class T, int N> inline vec<T, N> clamp(const vec<T, N>& x, const vec<T, N>& low, const vec<T, N>& high) { return min(max(x, low), high); }
template <class T, int N> inline vec<T, N> abs(const vec<T, N>& a) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.d[i] = abs(a.d[i]);
  return r;
}
template <class T, int N> inline vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, const vec<bool, N>& c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.d[i] = c.d[i] ? b.d[i] : a.d[i];
  return r;
}
template <class T, int N> inline T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T s = T(0);
  for (int i = 0; i < N; i++) s = T(s + a.d[i] * b.d[i]);
  return s;
}
template <int N> inline bool all(vec<bool, N> a) {
  bool r = true;
  for (int i = 0; i < N; i++) r = r && a.d[i];
  return r;
}
template <int N> inline bool any(vec<bool, N> a) {
  bool r = false;
  for (int i = 0; i < N; i++) r = r || a.d[i];
  return r;
}

inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return std::fabs(x) == INFINITY; }
inline bool isfinite(float x) { return std::fabs(x) < INFINITY; }
inline uint popcount(uint x) { return uint(__builtin_popcount(x)); }
inline uint clz(uint x) { return x ? uint(__builtin_clz(x)) : 32; }
inline uint ctz(uint x) { return x ? uint(__builtin_ctz(x)) : 32; }
template <class T> inline T extract_bits(T x, uint offset, uint bits) { return bits == 0 ? T(0) : T(T(x << (8 * sizeof(T) - offset - bits)) >> (8 * sizeof(T) - bits)); }
template <class T> inline T mulhi(T a, T b) { return T((typename conditional<std::is_signed<T>::value, int64_t, uint64_t>::type(a) * b) >> 32); }

}  // namespace metal
#ifndef M_PI_F
#define M_PI_F 3.14159265358979323846f
#endif
