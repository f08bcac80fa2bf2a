// The vocabulary of simd.h with NEON, as every arm64 processor has it: eight float lanes are two registers.

inline float f16_to_float(uint16_t h) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0); }
inline uint16_t float_to_f16(float x) { return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }

struct F8 { float32x4_t low, high; };

inline F8 set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline F8 zero() { return set1(0.0f); }
inline F8 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline F8 load_f16(const uint16_t* p) {
  const float16x8_t x = vreinterpretq_f16_u16(vld1q_u16(p));
  return {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)};
}
inline F8 load_bf16(const uint16_t* p) {
  const uint16x8_t x = vld1q_u16(p);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(x, 16))};
}
inline void store(float* p, F8 x) { vst1q_f32(p, x.low), vst1q_f32(p + 4, x.high); }
inline void store_f16(uint16_t* p, F8 x) { vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.low), x.high))); }
inline F8 operator+(F8 a, F8 b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
inline F8 operator-(F8 a, F8 b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
inline F8 operator*(F8 a, F8 b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
inline F8 operator/(F8 a, F8 b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
/// a * b + c, rounded once.
inline F8 fma(F8 a, F8 b, F8 c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
/// The larger lane; the second where one is NaN, which the instructions for largest and smallest would return.
inline float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline float32x4_t smaller(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline F8 max(F8 a, F8 b) { return {larger(a.low, b.low), larger(a.high, b.high)}; }
inline F8 min(F8 a, F8 b) { return {smaller(a.low, b.low), smaller(a.high, b.high)}; }
inline F8 abs(F8 a) { return {vabsq_f32(a.low), vabsq_f32(a.high)}; }
inline F8 round(F8 a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }
/// 2^n for lanes that hold integers n in -126..127.
inline F8 exp2_of_integer(F8 n) {
  auto power = [](float32x4_t x) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(x), vdupq_n_s32(127)), 23)); };
  return {power(n.low), power(n.high)};
}
/// `yes` where a < b, else `no`.
inline F8 select_less(F8 a, F8 b, F8 yes, F8 no) {
  return {vbslq_f32(vcltq_f32(a.low, b.low), yes.low, no.low), vbslq_f32(vcltq_f32(a.high, b.high), yes.high, no.high)};
}
/// Bit i is set where lane i of a > lane i of b.
inline int mask_greater(F8 a, F8 b) {
  const uint16x8_t greater = vcombine_u16(vmovn_u32(vcgtq_f32(a.low, b.low)), vmovn_u32(vcgtq_f32(a.high, b.high)));
  const uint16x8_t bits = {1, 2, 4, 8, 16, 32, 64, 128};
  return vaddvq_u16(vandq_u16(greater, bits));
}
/// Sum in the fixed order ((0+4)+(2+6)) + ((1+5)+(3+7)).
inline float reduce_add(F8 a) {
  const float32x4_t x = vaddq_f32(a.low, a.high);
  return vpadds_f32(vadd_f32(vget_low_f32(x), vget_high_f32(x)));
}
inline float reduce_max(F8 a) {
  float v[4];
  vst1q_f32(v, larger(a.low, a.high));
  auto pick = [](float x, float y) { return x > y ? x : y; };
  return pick(pick(v[0], v[2]), pick(v[1], v[3]));
}
/// The larger of lanes that are not negative; NaN counts as larger than every number.
inline F8 max_or_nan(F8 a, F8 b) { return {vmaxq_f32(a.low, b.low), vmaxq_f32(a.high, b.high)}; }
inline float reduce_max_or_nan(F8 a) { return vmaxvq_f32(vmaxq_f32(a.low, a.high)); }

/// Four double lanes.
struct D4 { float64x2_t low, high; };

inline D4 set1_double(double x) { return {vdupq_n_f64(x), vdupq_n_f64(x)}; }
inline D4 widen(const float* p) {
  const float32x4_t x = vld1q_f32(p);
  return {vcvt_f64_f32(vget_low_f32(x)), vcvt_high_f64_f32(x)};
}
inline D4 operator+(D4 a, D4 b) { return {vaddq_f64(a.low, b.low), vaddq_f64(a.high, b.high)}; }
inline D4 operator-(D4 a, D4 b) { return {vsubq_f64(a.low, b.low), vsubq_f64(a.high, b.high)}; }
inline D4 operator*(D4 a, D4 b) { return {vmulq_f64(a.low, b.low), vmulq_f64(a.high, b.high)}; }
inline D4 fma(D4 a, D4 b, D4 c) { return {vfmaq_f64(c.low, a.low, b.low), vfmaq_f64(c.high, a.high, b.high)}; }
/// The larger lane; the second where one is NaN.
inline D4 max(D4 a, D4 b) { return {vbslq_f64(vcgtq_f64(a.low, b.low), a.low, b.low), vbslq_f64(vcgtq_f64(a.high, b.high), a.high, b.high)}; }
/// 2^n for lanes that hold n + 1.5 * 2^52, n in -1022..1023.
inline D4 exp2_of_shifted(D4 n) {
  auto power = [](float64x2_t x) { return vreinterpretq_f64_s64(vshlq_n_s64(vaddq_s64(vreinterpretq_s64_f64(x), vdupq_n_s64(1023)), 52)); };
  return {power(n.low), power(n.high)};
}
/// Sum in the fixed order (0+2) + (1+3).
inline double reduce_add(D4 a) { return vpaddd_f64(vaddq_f64(a.low, a.high)); }
