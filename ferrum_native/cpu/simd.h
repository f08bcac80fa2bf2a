// The SIMD vocabulary of the CPU backend: eight float lanes, with AVX2+FMA+F16C, NEON and plain C++ below the same names.
// Included by the isa_*.cpp files only, inside their own instruction set's flags. All versions round alike, lane by lane,
// so that every kernel written with this vocabulary gives the same bits on all.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(FERRUM_SIMD_AVX512)
// gcc 12 takes the undefined operands inside its own AVX-512 intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(FERRUM_SIMD_AVX2)
#include <immintrin.h>
#elif defined(FERRUM_SIMD_NEON)
#include <arm_neon.h>
#endif

namespace ferrum::cpu::FERRUM_ISA {

constexpr int lanes = 8;

#if defined(FERRUM_SIMD_AVX2)

struct F8 { __m256 v; };

inline F8 zero() { return {_mm256_setzero_ps()}; }
inline F8 set1(float x) { return {_mm256_set1_ps(x)}; }
inline F8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline F8 load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline F8 load_bf16(const uint16_t* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline void store(float* p, F8 x) { _mm256_storeu_ps(p, x.v); }
inline void store_f16(uint16_t* p, F8 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
inline F8 operator+(F8 a, F8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F8 operator-(F8 a, F8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F8 operator*(F8 a, F8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F8 operator/(F8 a, F8 b) { return {_mm256_div_ps(a.v, b.v)}; }
/// a * b + c, rounded once.
inline F8 fma(F8 a, F8 b, F8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
/// The larger lane; the second where one is NaN.
inline F8 max(F8 a, F8 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F8 min(F8 a, F8 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F8 abs(F8 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline F8 round(F8 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
/// 2^n for lanes that hold integers n in -126..127.
inline F8 exp2_of_integer(F8 n) {
  __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_castsi256_ps(bits)};
}
/// `yes` where a < b, else `no`.
inline F8 select_less(F8 a, F8 b, F8 yes, F8 no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
/// Bit i is set where lane i of a > lane i of b.
inline int mask_greater(F8 a, F8 b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)); }
/// Sum in the fixed order ((0+4)+(2+6)) + ((1+5)+(3+7)).
inline float reduce_add(F8 a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float reduce_max(F8 a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
/// The larger of lanes that are not negative; NaN counts as larger than every number.
inline F8 max_or_nan(F8 a, F8 b) { return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)))}; }
inline float reduce_max_or_nan(F8 a) {
  __m128i x = _mm256_castsi256_si128(_mm256_castps_si256(a.v));
  x = _mm_max_epi32(x, _mm256_extracti128_si256(_mm256_castps_si256(a.v), 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(x));
}
inline float f16_to_float(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
inline uint16_t float_to_f16(float x) {
  return static_cast<uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT), 0));
}
inline float fma(float a, float b, float c) { return _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c))); }

/// Four double lanes.
struct D4 { __m256d v; };

inline D4 set1_double(double x) { return {_mm256_set1_pd(x)}; }
inline D4 widen(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
inline D4 operator+(D4 a, D4 b) { return {_mm256_add_pd(a.v, b.v)}; }
inline D4 operator-(D4 a, D4 b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline D4 operator*(D4 a, D4 b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline D4 fma(D4 a, D4 b, D4 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
/// The larger lane; the second where one is NaN.
inline D4 max(D4 a, D4 b) { return {_mm256_max_pd(a.v, b.v)}; }
/// 2^n for lanes that hold n + 1.5 * 2^52, n in -1022..1023.
inline D4 exp2_of_shifted(D4 n) {
  return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_add_epi64(_mm256_castpd_si256(n.v), _mm256_set1_epi64x(1023)), 52))};
}
/// Sum in the fixed order (0+2) + (1+3).
inline double reduce_add(D4 a) {
  const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}

#elif defined(FERRUM_SIMD_NEON)

#include "simd_neon.inl"

#else

inline float f16_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa ? 0x400000u | mantissa << 13 : 0u);
  } else if (exponent != 0) {
    bits = sign | (exponent + 112u) << 23 | mantissa << 13;
  } else {
    float x = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&bits, &x, 4);
    bits |= sign;
  }
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
/// Round to nearest, ties to even, as the F16C instructions do.
inline uint16_t float_to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x1ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    float scaled;
    std::memcpy(&scaled, &magnitude, 4);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(scaled * 0x1p24f)));
  }
  uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }

struct F8 { float v[8]; };

template <class F> inline F8 each(F f) {
  F8 out;
  for (int i = 0; i < 8; ++i) out.v[i] = f(i);
  return out;
}
inline F8 zero() { return each([](int) { return 0.0f; }); }
inline F8 set1(float x) { return each([=](int) { return x; }); }
inline F8 load(const float* p) { return each([=](int i) { return p[i]; }); }
inline F8 load_f16(const uint16_t* p) { return each([=](int i) { return f16_to_float(p[i]); }); }
inline F8 load_bf16(const uint16_t* p) {
  return each([=](int i) {
    uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  });
}
inline void store(float* p, F8 x) { std::memcpy(p, x.v, sizeof x.v); }
inline void store_f16(uint16_t* p, F8 x) {
  for (int i = 0; i < 8; ++i) p[i] = float_to_f16(x.v[i]);
}
inline F8 operator+(F8 a, F8 b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline F8 operator-(F8 a, F8 b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline F8 operator*(F8 a, F8 b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline F8 operator/(F8 a, F8 b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline F8 fma(F8 a, F8 b, F8 c) { return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); }); }
inline F8 max(F8 a, F8 b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline F8 min(F8 a, F8 b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline F8 abs(F8 a) { return each([&](int i) { return std::fabs(a.v[i]); }); }
inline F8 round(F8 a) { return each([&](int i) { return std::nearbyint(a.v[i]); }); }
inline F8 exp2_of_integer(F8 n) {
  return each([&](int i) {
    int32_t integer = n.v[i] == n.v[i] ? static_cast<int32_t>(n.v[i]) : 0;  // NaN lanes are overwritten by the caller's product
    uint32_t bits = static_cast<uint32_t>(integer + 127) << 23;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  });
}
inline F8 select_less(F8 a, F8 b, F8 yes, F8 no) { return each([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; }); }
inline int mask_greater(F8 a, F8 b) {
  int mask = 0;
  for (int i = 0; i < 8; ++i) mask |= (a.v[i] > b.v[i]) << i;
  return mask;
}
inline float reduce_add(F8 a) {
  const float* v = a.v;
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
inline float reduce_max(F8 a) {
  auto pick = [](float x, float y) { return x > y ? x : y; };
  const float* v = a.v;
  return pick(pick(pick(v[0], v[4]), pick(v[2], v[6])), pick(pick(v[1], v[5]), pick(v[3], v[7])));
}
struct D4 { double v[4]; };

template <class F> inline D4 each_double(F f) {
  D4 out;
  for (int i = 0; i < 4; ++i) out.v[i] = f(i);
  return out;
}
inline D4 set1_double(double x) { return each_double([=](int) { return x; }); }
inline D4 widen(const float* p) { return each_double([=](int i) { return static_cast<double>(p[i]); }); }
inline D4 operator+(D4 a, D4 b) { return each_double([&](int i) { return a.v[i] + b.v[i]; }); }
inline D4 operator-(D4 a, D4 b) { return each_double([&](int i) { return a.v[i] - b.v[i]; }); }
inline D4 operator*(D4 a, D4 b) { return each_double([&](int i) { return a.v[i] * b.v[i]; }); }
inline D4 fma(D4 a, D4 b, D4 c) { return each_double([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); }); }
inline D4 max(D4 a, D4 b) { return each_double([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline D4 exp2_of_shifted(D4 n) {
  return each_double([&](int i) {
    uint64_t bits;
    std::memcpy(&bits, &n.v[i], 8);
    bits = (bits + 1023) << 52;
    double power;
    std::memcpy(&power, &bits, 8);
    return power;
  });
}
inline double reduce_add(D4 a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float larger_or_nan(float a, float b) { return a > b || a != a ? a : b; }
inline F8 max_or_nan(F8 a, F8 b) { return each([&](int i) { return larger_or_nan(a.v[i], b.v[i]); }); }
inline float reduce_max_or_nan(F8 a) {
  float largest = a.v[0];
  for (float x : a.v) largest = larger_or_nan(largest, x);
  return largest;
}

#endif

/// The first n (1..8) values, the other lanes 0.
inline F8 load_part(const float* p, int n) {
  float padded[8] = {};
  std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(float));
  return load(padded);
}
inline void store_part(float* p, F8 x, int n) {
  float padded[8];
  store(padded, x);
  std::memcpy(p, padded, static_cast<size_t>(n) * sizeof(float));
}
/// Calls f(i, n) for the vectors of [0, size): n lanes from index i, 8 but for a tail. `get` and `put` move n lanes.
template <class F> inline void each_vector(int size, F f) {
  int i = 0;
  for (; i + lanes <= size; i += lanes) f(i, lanes);
  if (i < size) f(i, size - i);
}
inline F8 get(const float* p, int n) { return n == lanes ? load(p) : load_part(p, n); }
inline void put(float* p, F8 x, int n) { n == lanes ? store(p, x) : store_part(p, x, n); }

#if defined(FERRUM_SIMD_AVX512)

/// Sixteen float lanes.
struct Wide { __m512 v; };

inline Wide wide_set1(float x) { return {_mm512_set1_ps(x)}; }
inline Wide wide_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Wide wide_load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store(float* p, Wide x) { _mm512_storeu_ps(p, x.v); }
inline F8 low_half(Wide x) { return {_mm512_castps512_ps256(x.v)}; }
inline F8 high_half(Wide x) { return {_mm512_extractf32x8_ps(x.v, 1)}; }
inline Wide operator+(Wide a, Wide b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Wide operator-(Wide a, Wide b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Wide operator*(Wide a, Wide b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Wide fma(Wide a, Wide b, Wide c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Wide max(Wide a, Wide b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Wide min(Wide a, Wide b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Wide round(Wide a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Wide exp2_of_integer(Wide n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
inline Wide select_less(Wide a, Wide b, Wide yes, Wide no) { return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)}; }
/// The first n lanes, the others `rest`.
inline Wide first_lanes(Wide x, int n, float rest) { return {_mm512_mask_blend_ps(static_cast<__mmask16>((1u << n) - 1), _mm512_set1_ps(rest), x.v)}; }

#else

/// Sixteen float lanes.
struct Wide { F8 low, high; };

inline Wide wide_set1(float x) { return {set1(x), set1(x)}; }
inline Wide wide_load(const float* p) { return {load(p), load(p + 8)}; }
inline Wide wide_load_f16(const uint16_t* p) { return {load_f16(p), load_f16(p + 8)}; }
inline void store(float* p, Wide x) { store(p, x.low), store(p + 8, x.high); }
inline F8 low_half(Wide x) { return x.low; }
inline F8 high_half(Wide x) { return x.high; }
inline Wide operator+(Wide a, Wide b) { return {a.low + b.low, a.high + b.high}; }
inline Wide operator-(Wide a, Wide b) { return {a.low - b.low, a.high - b.high}; }
inline Wide operator*(Wide a, Wide b) { return {a.low * b.low, a.high * b.high}; }
inline Wide fma(Wide a, Wide b, Wide c) { return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)}; }
inline Wide max(Wide a, Wide b) { return {max(a.low, b.low), max(a.high, b.high)}; }
/// The first n lanes, the others `rest`.
inline Wide first_lanes(Wide x, int n, float rest) {
  float lanes_of_x[16];
  store(lanes_of_x, x);
  for (int i = n; i < 16; ++i) lanes_of_x[i] = rest;
  return wide_load(lanes_of_x);
}

#endif

template <class Vector> Vector all_lanes(float x);
template <> inline F8 all_lanes<F8>(float x) { return set1(x); }
template <> inline Wide all_lanes<Wide>(float x) { return wide_set1(x); }

/// exp(x), relative error below 2e-7 (Cephes' expf: range reduction by ln 2 in two parts, then a polynomial of degree 5).
/// Below -87.3: 0 (also for -inf); above 88: exp(88). NaN stays NaN.
template <class Vector> inline Vector exp_of_lanes(Vector x) {
  auto all = [](float value) { return all_lanes<Vector>(value); };
  Vector clamped = min(all(88.0f), max(all(-87.3f), x));
  Vector n = round(clamped * all(1.44269504f));
  Vector r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), clamped));
  Vector p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  Vector e = fma(p, r * r, r) + all(1.0f);
  return select_less(x, all(-87.3f), all(0.0f), e * exp2_of_integer(n));
}
inline F8 exp(F8 x) { return exp_of_lanes(x); }
#if defined(FERRUM_SIMD_AVX512)
inline Wide exp(Wide x) { return exp_of_lanes(x); }
#else
inline Wide exp(Wide x) { return {exp(x.low), exp(x.high)}; }
#endif

/// exp(x) of one value: the same polynomial as the vector body, so that a tail gives the same bits.
inline float exp(float x) {
  float out[8];
  store(out, exp(set1(x)));
  return out[0];
}

}  // namespace ferrum::cpu::FERRUM_ISA
