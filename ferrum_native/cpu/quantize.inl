// Packs float activations into int8 blocks.

/// 32 floats within +-127, rounded to nearest even. A lane that is no such number gives -128.
inline void store_i8(int8_t* q, const F8 x[4]) {
#if defined(FERRUM_SIMD_AVX2)
  __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0].v), _mm256_cvtps_epi32(x[1].v));
  __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(x[2].v), _mm256_cvtps_epi32(x[3].v));
  __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  store_256(q, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order));
#elif defined(FERRUM_SIMD_NEON)
  // The conversion makes 0 of NaN.
  auto rounded = [](float32x4_t v) { return vbslq_s32(vceqq_f32(v, v), vcvtnq_s32_f32(v), vdupq_n_s32(-128)); };
  auto eight = [&](F8 v) { return vcombine_s16(vqmovn_s32(rounded(v.low)), vqmovn_s32(rounded(v.high))); };
  for (int i = 0; i < 4; i += 2) vst1q_s8(q + 8 * i, vcombine_s8(vqmovn_s16(eight(x[i])), vqmovn_s16(eight(x[i + 1]))));
#else
  for (int i = 0; i < 32; ++i) {
    float rounded = std::nearbyint(x[i / 8].v[i % 8]);
    q[i] = static_cast<int8_t>(rounded >= -127 && rounded <= 127 ? static_cast<int>(rounded) : -128);
  }
#endif
}

/// Sums of 16 neighbours among 256 int8, times the factor of their 32.
inline void store_sums_16(const int8_t* q, const int16_t* factor_32, int16_t* sums) {
#if defined(FERRUM_SIMD_AVX2)
  __m256i x[8];
  for (int i = 0; i < 8; ++i) x[i] = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load_256(q + 32 * i));
  for (int n = 4; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = _mm256_hadd_epi16(x[2 * i], x[2 * i + 1]);
  __m128i even = _mm256_castsi256_si128(x[0]), odd = _mm256_extracti128_si256(x[0], 1);
  __m128i factors = _mm_loadu_si128(reinterpret_cast<const __m128i*>(factor_32));
  even = _mm_mullo_epi16(even, factors);
  odd = _mm_mullo_epi16(odd, factors);
  store_256(sums, _mm256_set_m128i(_mm_unpackhi_epi16(even, odd), _mm_unpacklo_epi16(even, odd)));
#elif defined(FERRUM_SIMD_NEON)
  int16x8_t x[16];
  for (int i = 0; i < 16; ++i) x[i] = vpaddlq_s8(vld1q_s8(q + 16 * i));
  for (int n = 8; n > 1; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = vpaddq_s16(x[2 * i], x[2 * i + 1]);
  const int16x8_t factors = vld1q_s16(factor_32);
  vst1q_s16(sums, vmulq_s16(x[0], vzip1q_s16(factors, factors)));
  vst1q_s16(sums + 8, vmulq_s16(x[1], vzip2q_s16(factors, factors)));
#else
  for (int i = 0; i < 16; ++i) {
    int sum = 0;
    for (int j = 0; j < 16; ++j) sum += q[16 * i + j];
    sums[i] = static_cast<int16_t>(factor_32[i / 2] * sum);
  }
#endif
}

/// Largest magnitude of 32 values; NaN if one is NaN, which the block's scale then carries on.
inline float largest_of_32(const float* x) {
  return reduce_max_or_nan(max_or_nan(max_or_nan(abs(load(x)), abs(load(x + 8))), max_or_nan(abs(load(x + 16)), abs(load(x + 24)))));
}

inline void quantize_32(const float* x, float inverse, int8_t* q) {
  F8 scaled[4];
  for (int j = 0; j < 4; ++j) scaled[j] = load(x + 8 * j) * set1(inverse);
  store_i8(q, scaled);
}

/// Blocks whose largest value is below this count as zeros: the inverse of their scale would not be finite.
constexpr float smallest_block = 0x1p-110f;

inline void quantize_q8_32(const float* x, int k, int8_t* q, float* scale) {
  for (int i = 0; i < k; i += 32) {
    const float largest = largest_of_32(x + i);
    const bool zeros = largest < smallest_block;
    scale[i / 32] = zeros ? 0.0f : largest / 127.0f;
    quantize_32(x + i, zeros ? 0.0f : 127.0f / largest, q + i);
  }
}

inline void quantize_q8_256(const float* x, int k, const PackedRow& out) {
  constexpr float steps = 127.0f * max_factor;
  for (int i = 0; i < k; i += 256) {
    float part[8];
    for (int s = 0; s < 8; ++s) part[s] = largest_of_32(x + i + 32 * s);
    const float largest = reduce_max_or_nan(load(part));
    const bool zeros = largest < smallest_block;
    out.scale[i / 256] = zeros ? 0.0f : largest / steps;
    const float inverse = zeros ? 0.0f : steps / largest, relative = zeros ? 0.0f : max_factor / largest;
    for (int s = 0; s < 8; ++s) {
      const float needed = std::ceil(part[s] * relative);
      const int factor = needed > 1.0f ? (needed < max_factor ? static_cast<int>(needed) : max_factor) : 1;  // 1 for NaN
      out.factor_32[i / 32 + s] = static_cast<int16_t>(factor);
      quantize_32(x + i + 32 * s, inverse / static_cast<float>(factor), out.q + i + 32 * s);
    }
    store_sums_16(out.q + i, out.factor_32 + i / 32, out.sums_16 + i / 16);
  }
}
