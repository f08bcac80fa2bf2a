// All kernels, in the namespace and with the vocabulary of one instruction set: FERRUM_ISA, and FERRUM_SIMD_AVX2 and FERRUM_SIMD_AVX512,
// or FERRUM_SIMD_NEON, FERRUM_SIMD_DOTPROD and FERRUM_SIMD_I8MM, where it has those.
#include <algorithm>
#include <initializer_list>
#include <limits>

#include "kernels.h"
#include "simd.h"
#include "tuning.h"

namespace ferrum::cpu::FERRUM_ISA {

#include "dot_common.inl"
#include "dot_rows16.inl"

#include "dot_q4_k.inl"
#include "dot_q6_k.inl"
#include "dot_q8_0.inl"

#include "dot_sub_blocks.inl"

#include "dot_q2_k.inl"
#include "dot_q3_k.inl"
#include "dot_q5_k.inl"

#include "dot_blocks_32.inl"
#include "dot_iq4.inl"

#include "dot_neon.inl"
#include "dot_neon_blocks_32.inl"
#include "dot_neon_blocks_256.inl"

#include "dot_float.inl"

#include "quantize.inl"

#include "attention_floats.inl"
#include "attention_q8_0.inl"
#include "attention.inl"

#include "candidates.inl"
#include "rows.inl"

/// The products of a weight type; one without them does not compile.
template <WeightType> struct ProductsOf;
template <class W> struct ProductsOfFloats {
  static constexpr DotKernel dot = dot_floats<W>, dot_float = dot_floats<W>;
  static constexpr DequantizeRow dequantize = dequantize_floats<W>;
};
template <DotKernel Dot, DequantizeRow Dequantize> struct ProductsOfBlocks {
  static constexpr DotKernel dot = Dot, dot_float = dot_float_quantized<Dequantize>;
  static constexpr DequantizeRow dequantize = Dequantize;
};
template <> struct ProductsOf<WeightType::F32> : ProductsOfFloats<WeightsF32> {};
template <> struct ProductsOf<WeightType::F16> : ProductsOfFloats<WeightsF16> {};
template <> struct ProductsOf<WeightType::BF16> : ProductsOfFloats<WeightsBF16> {};
template <> struct ProductsOf<WeightType::Q4_0> : ProductsOfBlocks<dot_blocks_32<BlockQ4_0>, dequantize_blocks_32<BlockQ4_0>> {};
template <> struct ProductsOf<WeightType::Q4_1> : ProductsOfBlocks<dot_blocks_32<BlockQ4_1>, dequantize_blocks_32<BlockQ4_1>> {};
template <> struct ProductsOf<WeightType::Q5_0> : ProductsOfBlocks<dot_blocks_32<BlockQ5_0>, dequantize_blocks_32<BlockQ5_0>> {};
template <> struct ProductsOf<WeightType::Q5_1> : ProductsOfBlocks<dot_blocks_32<BlockQ5_1>, dequantize_blocks_32<BlockQ5_1>> {};
template <> struct ProductsOf<WeightType::Q8_0> : ProductsOfBlocks<dot_q8_0, dequantize_q8_0> {};
template <> struct ProductsOf<WeightType::Q2_K> : ProductsOfBlocks<dot_q2_k, dequantize_sub_blocks<BlockQ2_K>> {};
template <> struct ProductsOf<WeightType::Q3_K> : ProductsOfBlocks<dot_q3_k, dequantize_sub_blocks<BlockQ3_K>> {};
template <> struct ProductsOf<WeightType::Q4_K> : ProductsOfBlocks<dot_q4_k, dequantize_q4_k> {};
template <> struct ProductsOf<WeightType::Q5_K> : ProductsOfBlocks<dot_q5_k, dequantize_sub_blocks<BlockQ5_K>> {};
template <> struct ProductsOf<WeightType::Q6_K> : ProductsOfBlocks<dot_q6_k, dequantize_q6_k> {};
template <> struct ProductsOf<WeightType::IQ4_NL> : ProductsOfBlocks<dot_iq4_nl, dequantize_blocks_32<BlockIQ4_NL>> {};
template <> struct ProductsOf<WeightType::IQ4_XS> : ProductsOfBlocks<dot_iq4_xs, dequantize_sub_blocks<BlockIQ4_XS>> {};

constexpr Kernels make_kernels(const char* name) {
#define X(type, id, weights, bytes, form) ProductsOf<WeightType::type>::FERRUM_FIELD,
  return {
      .name = name,
#define FERRUM_FIELD dot
      .dot = {FERRUM_WEIGHT_TYPES(X)},
#undef FERRUM_FIELD
#define FERRUM_FIELD dot_float
      .dot_float = {FERRUM_WEIGHT_TYPES(X)},
#undef FERRUM_FIELD
      .dot_scratch_bytes = dot_scratch_bytes,
#define FERRUM_FIELD dequantize
      .dequantize = {FERRUM_WEIGHT_TYPES(X)},
#undef FERRUM_FIELD
      .quantize_q8_32 = quantize_q8_32,
      .quantize_q8_256 = quantize_q8_256,
      .norm = norm,
      .qk_norm_rope = qk_norm_rope,
      .write_key = write_key,
      .write_value = write_value,
      .attention_tile = attention_tile,
      .attention_combine = attention_combine,
      .attention_result = attention_result,
      .softmax = softmax,
      .silu_product = silu_product,
      .add_weighted = add_weighted,
      .next_greater = next_greater,
      .sum_exp = sum_exp,
  };
#undef X
}

}  // namespace ferrum::cpu::FERRUM_ISA
